"""`dataset.json`: a data set of which this machine has no example, as a server may know it.

`{"input_shape": [6, 128], "classes": ["run", "sit", "walk"], "range": [-20, 20]}`: the shape of an
example (channels first), the names of the classes, and about the smallest and the largest value.
"""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from fedlean.data.labels import check_class_names
from fedlean.data.source import Room, Source, unlimited
from fedlean.jsonfile import read_json

FILE = "dataset.json"
KEYS = {"input_shape", "classes", "range"}
MOST_AXES = 3


def find_description(folder: Path) -> dict[str, Path]:
    """{"description": file} where a folder holds one, else {}."""
    path = folder / FILE
    return {"description": path} if path.is_file() else {}


def described_source(name: str, path: Path, room: Room = unlimited) -> Source:
    """A source without examples.  Raises ValueError naming what of the file cannot be meant."""
    try:
        shape, classes, value_range = _read(path)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error

    def read(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        none = np.empty((0, *shape), np.float32)
        return none, none

    return Source(
        name=name,
        y_train=np.empty(0, np.int64),
        y_test=np.empty(0, np.int64),
        class_names=classes,
        clients=None,
        input_shape=shape,
        dtype=np.dtype(np.float32),
        scale=1.0,
        read=read,
        room=room,
        value_range=value_range,
    )


def _read(path: Path) -> tuple[tuple[int, ...], tuple[str, ...], tuple[float, float]]:
    found: Any = read_json(path)
    if not isinstance(found, dict) or found.keys() != KEYS:
        got = sorted(found) if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"got {got}, expected {sorted(KEYS)}")
    shape, classes, ends = (found[key] for key in ("input_shape", "classes", "range"))
    whole = isinstance(shape, list) and all(type(side) is int and side > 0 for side in shape)
    if not whole or not 1 <= len(shape) <= MOST_AXES:
        raise ValueError(f"input_shape is {shape!r:.80}, expected 1 to 3 sides as [6, 128]")
    if not isinstance(classes, list) or not all(isinstance(each, str) for each in classes):
        raise ValueError(f"classes is {classes!r:.80}, expected a list of names")
    check_class_names(classes)
    numbers = isinstance(ends, list) and all(type(end) in (int, float) for end in ends)
    if not numbers or len(ends) != 2 or not (ends[0] <= ends[1] and all(map(isfinite, ends))):
        raise ValueError(f"range is {ends!r:.80}, expected the smallest and the largest value")
    return tuple(shape), tuple(classes), (float(ends[0]), float(ends[1]))
