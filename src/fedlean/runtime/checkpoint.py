"""States on disk: one safetensors file per checkpoint, written atomically, the two newest kept.

Generic over every method's state: a tree of mappings, tuples, arrays, numbers and strings becomes a
JSON skeleton (in the file's metadata) and named tensors.  A sidecar, written last, holds step,
length and digest: byte for byte it follows from the file and its name, so that a checkpoint of
which either file was cut short, damaged or exchanged is passed over for the one before it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedlean.jsonfile import parse_json, read_bytes
from fedlean.tree import read_only

KEPT = 2
SIDECAR_BYTES = 1000  # at most
_OWN = re.compile(r"([0-9]{8,18})\.(safetensors|json)(\..*)?")  # leftovers of writers as well


def write_atomically(path: Path, data: bytes | Iterable[bytes | memoryview]) -> None:
    """All of `data`, in one piece or several, or nothing, even when the power fails.

    In a folder that others may write, nobody can put a link where the data goes first.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            for piece in (data,) if isinstance(data, bytes) else data:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def state_tree(state: Any) -> dict[str, Any]:
    """A method's state dataclass as a mapping of its fields."""
    return {field.name: getattr(state, field.name) for field in fields(state)}


def save_checkpoint(folder: Path, step: int, tree: Mapping[str, Any]) -> None:
    """Writes checkpoint `step` and removes all but the KEPT newest.

    Raises ValueError where `folder` is a link: what it leads to is not the run's to clean up.
    """
    tensors: dict[str, np.ndarray] = {}
    skeleton = _flatten(tree, "", tensors)
    data = save(tensors, metadata={"tree": json.dumps(skeleton), "step": str(step)})
    _refuse_link(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{step:08d}.safetensors", data)
    write_atomically(folder / f"{step:08d}.json", _sidecar(step, data))
    own = {path: int(match[1]) for path in folder.iterdir() if (match := _OWN.fullmatch(path.name))}
    whole = sorted(at for path, at in own.items() if path.suffix == ".json")
    kept = [at for at in whole if at <= step][-KEPT:]
    for path, at in own.items():
        if (at not in kept or path.suffix not in (".safetensors", ".json")) and not path.is_dir():
            path.unlink(missing_ok=True)


def load_checkpoint(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The newest whole checkpoint, and a line for every newer one that is not.

    Raises ValueError when there is none, or where `folder` is a link.
    """
    _refuse_link(folder)
    skipped: list[str] = []
    for path in sorted(folder.glob("*.safetensors"), reverse=True):
        try:
            return read_checkpoint(path), skipped
        except (OSError, ValueError) as error:
            skipped.append(f"checkpoint {path.name} is unusable ({error}); using the one before it")
    reasons = "; ".join(line.removesuffix("; using the one before it") for line in skipped)
    raise ValueError(
        f"no usable checkpoint in {folder}: {reasons or 'there is none'}; "
        f"{begin_anew(folder.parent)}"
    )


def _refuse_link(folder: Path) -> None:
    if folder.is_symlink():
        raise ValueError(f"{folder} is a link, expected a folder of the run's own: remove it")


def begin_anew(folder: Path) -> str:
    """What to do about a run in `folder` that cannot be gone on with; it is repeated as it was."""
    of_run = quote(str(folder))
    return f"to begin it anew: rm -r {of_run}/checkpoint && fedlean resume {of_run}"


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The tree in one checkpoint.  Raises ValueError or OSError where it is not whole."""
    name = _OWN.fullmatch(path.name)
    if name is None or path.stem != f"{int(name[1]):08d}":
        raise ValueError("its name is not the number of a step")
    step, sidecar = int(name[1]), path.with_suffix(".json")
    if not sidecar.is_file():
        raise ValueError("its digest is missing: it was cut short")
    said = read_bytes(sidecar, SIDECAR_BYTES)
    data = _announced(path, step, said)
    if said != _sidecar(step, data):
        raise ValueError("its digest does not match")
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        if metadata.get("step", str(step)) != str(step):  # early checkpoints do not say it
            raise ValueError(f"it is of step {metadata['step']}")
        # NaN is a state's own affair; how deep its trees are, too
        tree = _restore(json.loads(metadata["tree"]), tensors)
    except (SafetensorError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"it holds a {type(tree).__name__}, expected a mapping")
    return tree


def _sidecar(step: int, data: bytes) -> bytes:
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    return json.dumps({"step": step, "blake2b": digest, "bytes": len(data)}).encode()


def _announced(path: Path, step: int, sidecar: bytes) -> bytes:
    """The file, once its sidecar has said that its length and step are these."""
    said = parse_json(sidecar)
    if not isinstance(said, dict) or said.keys() != {"step", "blake2b", "bytes"}:
        raise ValueError("its sidecar does not say step, digest and length")
    if said["step"] != step:
        raise ValueError(f"its sidecar is of step {said['step']!r:.40}")
    length = path.stat().st_size
    if said["bytes"] != length:
        raise ValueError(f"{length} bytes of {said['bytes']!r:.40}")
    return read_bytes(path, length)


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
        if array.dtype == np.bool_:  # a mask
            (array,) = read_only({"": array}).values()
        return array.reshape(()) if node["scalar"] else array
    if "map" in node:
        return {key: _restore(item, tensors) for key, item in node["map"].items()}
    if "tuple" in node:
        return tuple(_restore(item, tensors) for item in node["tuple"])
    return node["value"]
