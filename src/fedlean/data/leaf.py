"""LEAF's JSON layout with square grey images, as FEMNIST is published: one client per writer.

`train/*.json` and `test/*.json` (or under `data/`), each `{"users": [...], "num_samples": [...],
"user_data": {user: {"x": [[pixel, ...], ...], "y": [label, ...]}}}`, pixels in 0..1, row by row.
Files are read one at a time.  LEAF's text and synthetic sets are not covered.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np

from fedlean.data.dataset import MAX_CLASSES, Dataset

BYTE_TOLERANCE = 1e-3  # in grey levels; LEAF writes byte / 255 with all its digits
Examples = tuple[np.ndarray, np.ndarray]  # x uint8 or float32 (n, 1, H, W), y int64 (n,)


def find_leaf(folder: Path) -> dict[str, Path]:
    """{"leaf": folder that holds train/} when the folder is in LEAF's layout, else {}."""
    for base in (folder, folder / "data"):
        if any(base.glob("train/*.json")):
            return {"leaf": base}
    return {}


def load_leaf(name: str, base: Path) -> Dataset:
    """The data set under `base`: users in sorted order, client ids 0.. over those who train.

    Pixels become bytes when all of them are whole 255ths, else float32.  Classes are 0..largest
    label, so FEMNIST has 62.  Raises ValueError naming the file and user.
    """
    train, test = _read_split(base, "train"), _read_split(base, "test")
    pieces = [piece for split in (train, test) for user in split.values() for piece in user]
    exact = all(x.dtype == np.uint8 for x, _ in pieces)
    sizes = [sum(len(y) for _, y in user) for user in train.values()]
    clients = np.repeat(np.arange(len(train), dtype=np.int32), sizes)
    train_x, train_y = _join(train, exact)
    test_x, test_y = _join(test, exact)
    return Dataset.from_images(
        name,
        (train_x, train_y),
        (test_x, test_y),
        classes=int(max(train_y.max(), test_y.max())) + 1,
        scale=255.0 if exact else 1.0,
        clients=clients,
    )


def _read_split(base: Path, split: str) -> dict[str, list[Examples]]:
    """Every user's examples, users sorted; a user may be spread over several files."""
    paths = sorted((base / split).glob("*.json"))
    parts: dict[str, list[Examples]] = {}
    for path in paths:
        for user, examples in _read_file(path):
            parts.setdefault(user, []).append(examples)
    if not parts:
        raise ValueError(
            f"{base / split}: got {len(paths)} .json files and no examples, expected at least 1;"
            " run LEAF's preprocess.sh with '-t sample', which writes train and test"
        )
    sides = {x.shape[1:] for pieces in parts.values() for x, _ in pieces}
    if len(sides) > 1:
        raise ValueError(f"{base / split}: got images of {sorted(sides)}, expected one size")
    return {user: parts[user] for user in sorted(parts)}


def _join(users: dict[str, list[Examples]], exact: bool) -> Examples:
    """All examples in order, as bytes if `exact`, else as floats."""
    pieces = [piece for user in users.values() for piece in user]
    xs = [x for x, _ in pieces]
    if not exact:
        xs = [x / np.float32(255) if x.dtype == np.uint8 else x for x in xs]
    return np.concatenate(xs), np.concatenate([y for _, y in pieces])


def _read_file(path: Path) -> Iterator[tuple[str, Examples]]:
    """(user, examples) of one file, users without examples left out."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); fetch it again") from error
    users, counts, data = _parts(path, content)
    for user, count in zip(users, counts, strict=True):
        where = f"{path}: user {user!r}"
        record = data.get(user)
        if not isinstance(record, dict) or not {"x", "y"} <= record.keys():
            raise ValueError(f"{where}: expected an entry in user_data with x and y")
        x, y = record["x"], record["y"]
        if not isinstance(x, list) or not isinstance(y, list) or not len(x) == len(y) == count:
            got = [len(each) if isinstance(each, list) else type(each).__name__ for each in (x, y)]
            raise ValueError(f"{where}: got {got} entries of x and y, expected lists of {count}")
        if y:
            yield user, (_pixels(where, x), _labels(where, y))


def _parts(path: Path, content: Any) -> tuple[list[str], list[Any], dict[str, Any]]:
    keys = ("users", "num_samples", "user_data")
    users, counts, data = (
        (content.get(key) for key in keys) if isinstance(content, dict) else (None,) * 3
    )
    if not isinstance(users, list) or not isinstance(counts, list) or not isinstance(data, dict):
        raise ValueError(
            f"{path}: expected LEAF's lists users and num_samples and mapping user_data,"
            f" got {sorted(content) if isinstance(content, dict) else type(content).__name__}"
        )
    if not all(isinstance(user, str) for user in users) or not len(set(users)) == len(
        counts
    ) == len(users):
        raise ValueError(
            f"{path}: got {len(users)} users and {len(counts)} num_samples, expected as many"
            " different names as counts"
        )
    return users, counts, data


def _pixels(where: str, rows: list[Any]) -> np.ndarray:
    try:
        x = np.asarray(rows, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: x is not rows of numbers of one length ({error}); FedLean reads LEAF's"
            " image sets given as pixels, as FEMNIST"
        ) from error
    side = isqrt(x.shape[1]) if x.ndim == 2 else 0
    if side == 0 or side * side != x.shape[1]:
        raise ValueError(
            f"{where}: x has shape {x.shape}, expected (examples, side²): square grey images"
        )
    if not (np.isfinite(x).all() and x.min() >= 0 and x.max() <= 1):
        raise ValueError(f"{where}: x is in {x.min()}..{x.max()}, expected pixels in 0..1")
    x = x.reshape(-1, 1, side, side)
    levels = np.rint(x * 255)
    if np.abs(x * 255 - levels).max() < BYTE_TOLERANCE:
        return levels.astype(np.uint8)
    return x.astype(np.float32)


def _labels(where: str, values: list[Any]) -> np.ndarray:
    if not all(type(value) is int and 0 <= value < MAX_CLASSES for value in values):
        raise ValueError(f"{where}: y has other values than integers in 0..{MAX_CLASSES - 1}")
    return np.array(values, np.int64)
