"""States on disk: one safetensors file per checkpoint, written atomically, the two newest kept.

Generic over every method's state: a tree of mappings, tuples, arrays, numbers and strings becomes a
JSON skeleton (in the file's metadata) and named tensors.  A sidecar holds the digest; it is written
last, so a file without one, or with another digest, was cut short and the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

KEPT = 2


def write_atomically(path: Path, data: bytes) -> None:
    """All of `data` or nothing, even when the power fails."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def state_tree(state: Any) -> dict[str, Any]:
    """A method's state dataclass as a mapping of its fields."""
    return {field.name: getattr(state, field.name) for field in fields(state)}


def save_checkpoint(folder: Path, step: int, tree: Mapping[str, Any]) -> None:
    """Writes checkpoint `step` and removes all but the KEPT newest."""
    tensors: dict[str, np.ndarray] = {}
    skeleton = _flatten(tree, "", tensors)
    data = save(tensors, metadata={"tree": json.dumps(skeleton)})
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{step:08d}.safetensors", data)
    sidecar = json.dumps({"step": step, "blake2b": digest, "bytes": len(data)})
    write_atomically(folder / f"{step:08d}.json", sidecar.encode())
    whole = sorted(path.stem for path in folder.glob("*.json"))
    kept = [stem for stem in whole if int(stem) <= step][-KEPT:]
    for path in folder.iterdir():  # leftovers of a killed writer as well
        if path.name.split(".")[0] not in kept:
            path.unlink()


def load_checkpoint(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The newest whole checkpoint, and a line for every newer one that was cut short.

    Raises ValueError when there is none.
    """
    skipped: list[str] = []
    for path in sorted(folder.glob("*.safetensors"), reverse=True):
        try:
            return read_checkpoint(path), skipped
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            skipped.append(f"checkpoint {path.name} is unusable ({error}); using the one before it")
    raise ValueError(
        f"no usable checkpoint in {folder}: the run had not begun, or its files are damaged"
    )


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The tree in one checkpoint.  Raises ValueError, OSError or KeyError where it is not whole."""
    sidecar = path.with_suffix(".json")
    if not sidecar.is_file():
        raise ValueError("its digest is missing: it was cut short")
    expected = json.loads(sidecar.read_text())
    data = path.read_bytes()
    if len(data) != expected["bytes"]:
        raise ValueError(f"{len(data)} bytes of {expected['bytes']}")
    if hashlib.blake2b(data, digest_size=16).hexdigest() != expected["blake2b"]:
        raise ValueError("its digest does not match")
    with safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        skeleton = json.loads(file.metadata()["tree"])
    return _restore(skeleton, tensors)


def _flatten(value: Any, path: str, tensors: dict[str, np.ndarray]) -> Any:
    """JSON skeleton of `value`; arrays go to `tensors` under their path."""
    if isinstance(value, np.ndarray):
        # safetensors needs a dimension and contiguous memory
        path = f"{len(tensors)}{path}"  # keys may hold slashes
        tensors[path] = np.ascontiguousarray(value).reshape(value.shape or (1,))
        return {"array": path, "scalar": value.shape == ()}
    if isinstance(value, Mapping):
        items = {str(key): _flatten(item, f"{path}/{key}", tensors) for key, item in value.items()}
        return {"map": items}
    if isinstance(value, tuple | list):
        return {"tuple": [_flatten(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise TypeError(f"state holds {type(value).__name__} at {path}, which cannot be checkpointed")


def _restore(node: Any, tensors: Mapping[str, np.ndarray]) -> Any:
    if "array" in node:
        array = tensors[node["array"]]
        return array.reshape(()) if node["scalar"] else array
    if "map" in node:
        return {key: _restore(item, tensors) for key, item in node["map"].items()}
    if "tuple" in node:
        return tuple(_restore(item, tensors) for item in node["tuple"])
    return node["value"]
