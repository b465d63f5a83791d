"""Values of frozen tensors that a device keeps on its disk, so that they travel once.

    FOLDER/<run>/frozen-<hash>.values    u32 length of the JSON part · JSON · float32 values

The JSON part has the hash of the masks and, in the order of the values, [name, shape] of each
tensor, packed where it is masked.  Between tasks none of it is in memory, which a small device has
less of than of disk: a task reads them like those that came with it, under the same limit.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import chain
from math import prod
from pathlib import Path

import numpy as np

from fedlean import wire
from fedlean.core import Masks, Params
from fedlean.runtime.checkpoint import write_atomically
from fedlean.runtime.remote.held import keep_newest
from fedlean.tree import pack

log = logging.getLogger("fedlean")
FROZEN = 2  # of one run: those of the task, and those that it came after
_MAX_JSON_BYTES = 1 << 20


class HeldFrozen(Mapping[str, Params]):
    """Packed values by `wire.frozen_hash`, read when they are asked for."""

    def __init__(self, folder: Path):
        self._folder = folder

    def keep(self, values: Params, masks: Masks) -> None:
        """Writes new values; of the older ones the newest few stay.

        Where the disk has no room they are not kept, and are sent again when they are missed.
        """
        key = wire.frozen_hash(values, masks)
        path = self._path(key)
        if key == wire.NO_FROZEN or path.is_file():
            return
        packed = pack(values, masks)
        table = [[name, list(value.shape)] for name, value in packed.items()]
        text = json.dumps([wire.pattern_of(values, masks), table]).encode()
        arrays = (np.ascontiguousarray(value, "<f4") for value in packed.values())
        pieces = (array.reshape(-1).view(np.uint8).data for array in arrays)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, chain((_length(text), text), pieces))
        except OSError as error:
            log.warning("the frozen tensors are not kept: %s", error)
        keep_newest(self._folder.glob("frozen-*.values"), FROZEN)

    def __getitem__(self, key: str) -> Params:
        """A file that was changed goes, so that what is sent again can be kept."""
        path = self._path(key)
        try:
            pattern, values = _read(path)
            if wire.hash_of(values, pattern) == key:
                return values
        except (OSError, ValueError, TypeError):
            pass
        with suppress(OSError):
            path.unlink(missing_ok=True)
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        paths = self._folder.glob("frozen-*.values")
        return (path.stem.removeprefix("frozen-") for path in paths)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _path(self, key: str) -> Path:
        return self._folder / f"frozen-{key}.values"


def _length(text: bytes) -> bytes:
    return len(text).to_bytes(4, "little")


def _read(path: Path) -> tuple[str, dict[str, np.ndarray]]:
    """Hash of the masks, and the values.  Raises ValueError where the file is not one of ours."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(4), "little")
        if length > _MAX_JSON_BYTES:
            raise ValueError(f"{path.name} begins with no length of a table")
        pattern, table = json.loads(file.read(length))
        shapes = {str(name): tuple(map(int, shape)) for name, shape in table}
        expected = 4 + length + 4 * sum(map(prod, shapes.values()))
        if expected != path.stat().st_size:
            raise ValueError(f"{path.name} has not the {expected} bytes that it speaks of")
        values = {
            name: np.fromfile(file, "<f4", prod(shape))
            .reshape(shape)
            .astype(np.float32, copy=False)
            for name, shape in shapes.items()
        }
        return str(pattern), values
