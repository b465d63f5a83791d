"""Values of frozen tensors that a device keeps on its disk, so that they travel once.

    FOLDER/<run>/frozen-<hash>.values    u32 length of the JSON part · JSON · float32 values

A file holds the tensors that came together.  The JSON part has, in the order of the values, [name,
shape, hash of the mask, hash] of each, packed where it is masked; the file is named by the hash of
those hashes.  Of several values of one tensor the newest count, and a file all of whose tensors
have newer ones goes.  Between tasks no value is in memory, which a small device has less of than of
disk: a task reads them like those that came with it, under the same limit.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import chain
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedlean import wire
from fedlean.core import Masks, Params
from fedlean.runtime.checkpoint import write_atomically
from fedlean.runtime.remote.held import keep_newest
from fedlean.tree import pack, read_only

log = logging.getLogger("fedlean")
FILES = 64  # of one run: what is lost with an older one costs a message
_MAX_JSON_BYTES = 1 << 20


class _Place(NamedTuple):
    """Where the values of one tensor are, and what they must be."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    pattern: str
    hash: str


class HeldFrozen(Mapping[str, np.ndarray]):
    """The newest values by tensor name, packed and read-only, read when they are asked for."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._known: dict[str, _Place] | None = None

    def keep(self, values: Params, masks: Masks) -> None:
        """Writes those that are not held yet.

        Where the disk has no room they are not kept, and are sent again when they are missed.
        """
        hashes, held = wire.frozen_hashes(values, masks), self._places()
        fresh = {n: one for n, one in hashes.items() if n not in held or held[n].hash != one}
        if not fresh:
            return
        packed = pack({name: values[name] for name in fresh}, masks)
        table = [
            [name, list(value.shape), wire.pattern_of(name, masks), fresh[name]]
            for name, value in packed.items()
        ]
        text = json.dumps(table).encode()
        arrays = (np.ascontiguousarray(value, "<f4") for value in packed.values())
        pieces = (array.reshape(-1).view(np.uint8).data for array in arrays)
        path = self._folder / f"frozen-{wire.hash_of(fresh)}.values"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, chain((len(text).to_bytes(4, "little"), text), pieces))
            _make_newest(path)
        except OSError as error:
            log.warning("the frozen tensors are not kept: %s", error)
        self._known = None
        self._tidy()

    def __getitem__(self, name: str) -> np.ndarray:
        """A file that was changed goes, so that what is sent again can be kept."""
        place = self._places()[name]
        try:
            value = np.fromfile(place.path, "<f4", prod(place.shape), offset=place.offset)
            value = value.reshape(place.shape).astype(np.float32, copy=False)
            if wire.packed_hash(name, value, place.pattern) == place.hash:
                return read_only({name: value})[name]
        except (OSError, ValueError, TypeError):
            pass
        self._drop(place.path)
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places())

    def __len__(self) -> int:
        return len(self._places())

    def _places(self) -> dict[str, _Place]:
        if self._known is None:
            self._known = {}
            for path in sorted(self._folder.glob("frozen-*.values"), key=_written):
                try:
                    self._known |= _read_table(path)
                except (OSError, ValueError, TypeError):
                    self._drop(path)
        return self._known

    def _tidy(self) -> None:
        needed = {place.path for place in self._places().values()}
        for path in self._folder.glob("frozen-*.values"):
            if path not in needed:
                self._drop(path)
        keep_newest(needed, FILES)
        self._known = None

    def _drop(self, path: Path) -> None:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        known = self._known or {}
        self._known = {name: place for name, place in known.items() if place.path != path}


def _written(path: Path) -> tuple[int, str]:
    try:
        return path.stat().st_mtime_ns, path.name
    except OSError:
        return 0, path.name


def _make_newest(path: Path) -> None:
    """Later than the others by its time: a board's clock may stand still, or begin in the past."""
    others = (one for one in path.parent.glob("frozen-*.values") if one != path)
    last = max((_written(one)[0] for one in others), default=0)
    if _written(path)[0] <= last:
        os.utime(path, ns=(last + 1, last + 1))


def _read_table(path: Path) -> dict[str, _Place]:
    """The tensors of one file.  Raises ValueError where it is not one of ours."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(4), "little")
        if length > _MAX_JSON_BYTES:
            raise ValueError(f"{path.name} begins with no length of a table")
        table = json.loads(file.read(length))
    places, offset = {}, 4 + length
    for name, sides, pattern, key in table:
        shape = tuple(map(int, sides))
        places[str(name)] = _Place(path, offset, shape, str(pattern), str(key))
        offset += 4 * prod(shape)
    if offset != path.stat().st_size:
        raise ValueError(f"{path.name} has not the {offset} bytes that it speaks of")
    said = wire.hash_of({name: place.hash for name, place in places.items()})
    if path.name != f"frozen-{said}.values":
        raise ValueError(f"{path.name} holds other tensors than its name says")
    return places
