"""What a device keeps on its disk between messages: specs, patterns and client states, per run.

    FOLDER/identity                                 what the device is known by, where it has no key
    FOLDER/<run>/spec-<hash>.json                   the model
    FOLDER/<run>/pattern-<hash>.safetensors         packed bits of the masks
    FOLDER/<run>/frozen-<hash>.values               of frozen tensors (`frozen`)
    FOLDER/<run>/states-<client>/<step>.safetensors its state after that step (`checkpoint`)

Losing any of it costs a message or a method's memory, never the run: the device says what it lacks.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedlean.core import ClientState, Masks
from fedlean.runtime.checkpoint import read_checkpoint, save_checkpoint, write_atomically
from fedlean.spec import ModelSpec
from fedlean.tree import pattern_hash, read_only

RUNS = 4  # of which a device keeps files
SPECS = 16  # of one run: methods that train block after block have many
PATTERNS = 4  # of one run


class HeldSpecs(Mapping[str, ModelSpec]):
    """Specs by hash; the last one stays in memory."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._last: tuple[str, ModelSpec] | None = None

    def keep(self, spec: ModelSpec) -> None:
        if self._last is None or self._last[0] != spec.hash:
            self._last = (spec.hash, spec)
        path = self._path(spec.hash)
        if not path.is_file():
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, spec.to_json().encode())
            keep_newest(self._folder.glob("spec-*.json"), SPECS)

    def __getitem__(self, key: str) -> ModelSpec:
        if self._last and self._last[0] == key:
            return self._last[1]
        try:
            spec = ModelSpec.from_json(self._path(key).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise KeyError(key) from None
        if spec.hash != key:  # the file was changed
            raise KeyError(key)
        self._last = (key, spec)
        return spec

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and _found(self, key)

    def __iter__(self) -> Iterator[str]:
        return (path.stem.removeprefix("spec-") for path in self._folder.glob("spec-*.json"))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _path(self, key: str) -> Path:
        return self._folder / f"spec-{key}.json"


class HeldPatterns(Mapping[str, Masks]):
    """Masks by pattern hash; the last ones stay in memory."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._last: tuple[str, Masks] | None = None

    def keep(self, masks: Masks) -> None:
        """Writes a new pattern; of the older ones the newest few stay."""
        if not masks:
            return
        key = pattern_hash(masks)
        self._last = (key, masks)
        path = self._path(key)
        if path.is_file():
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        bits = {name: np.packbits(mask) for name, mask in masks.items()}
        shapes = {name: ",".join(map(str, mask.shape)) for name, mask in masks.items()}
        write_atomically(path, save(bits, metadata=shapes))
        keep_newest(self._folder.glob("pattern-*.safetensors"), PATTERNS)

    def __getitem__(self, key: str) -> Masks:
        if self._last and self._last[0] == key:
            return self._last[1]
        try:
            masks = _read_masks(self._path(key))
        except (OSError, ValueError, KeyError, SafetensorError):
            raise KeyError(key) from None
        if pattern_hash(masks) != key:  # the file was changed
            raise KeyError(key)
        self._last = (key, masks)
        return masks

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and _found(self, key)

    def __iter__(self) -> Iterator[str]:
        paths = self._folder.glob("pattern-*.safetensors")
        return (path.stem.removeprefix("pattern-") for path in paths)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _path(self, key: str) -> Path:
        return self._folder / f"pattern-{key}.safetensors"


class HeldStates:
    """The client's state after a step; the server says which step's counts."""

    def __init__(self, folder: Path):
        self._folder = folder

    def read(self, step: int | None) -> tuple[ClientState, bool]:
        """The state after `step` and whether it was lost; None: no state yet."""
        if step is None:
            return {}, False
        path = self._path(step)
        try:
            return dict(read_checkpoint(path)["state"]), False
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            return {}, True

    def write(self, step: int, state: ClientState, *, committed: int | None) -> None:
        """After `step`; of the earlier ones only that of `committed` can still be asked for."""
        if self._folder.is_dir():
            for path in self._folder.iterdir():
                name = path.name.split(".")[0]
                if name.isdigit() and int(name) < step and int(name) != committed:
                    path.unlink(missing_ok=True)
        tree: dict[str, Any] = {"state": dict(state)}
        save_checkpoint(self._folder, step, tree)

    def _path(self, step: int) -> Path:
        return self._folder / f"{step:08d}.safetensors"


def kept_identity(folder: Path) -> str:
    """A name that was drawn when it was first asked for, and is kept in FOLDER/identity."""
    path = folder / "identity"
    try:
        kept = path.read_text(encoding="ascii").strip()
        if len(kept) == 32 and kept.isalnum():
            return kept
    except (OSError, ValueError):
        pass
    drawn = uuid.uuid4().hex
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, drawn.encode())
    path.chmod(0o600)  # who reads it can sign in as this device
    return drawn


def forget_old_runs(folder: Path, current: str) -> None:
    """Removes the files of all runs but the newest few and the current one."""
    if not folder.is_dir():
        return
    runs = sorted((path for path in folder.iterdir() if path.is_dir()), key=_modified)
    for path in runs[:-RUNS]:
        if path.name != current:
            shutil.rmtree(path, ignore_errors=True)


def keep_newest(paths: Iterable[Path], count: int) -> None:
    for old in sorted(paths, key=_modified)[:-count]:
        old.unlink(missing_ok=True)


def _read_masks(path: Path) -> Masks:
    with safe_open(path, framework="numpy") as file:
        shapes = file.metadata() or {}
        masks = {}
        for name, text in shapes.items():
            shape = tuple(int(side) for side in text.split(","))
            count = int(np.prod(shape))
            masks[name] = np.unpackbits(file.get_tensor(name), count=count).view(bool)
            masks[name] = masks[name].reshape(shape)
        return read_only(masks)


def _found(held: Mapping[str, Any], key: str) -> bool:
    try:
        held[key]
    except KeyError:
        return False
    return True


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
