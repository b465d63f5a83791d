"""IDX files, the format of MNIST, Fashion-MNIST and EMNIST: finding the four files, and the set.

A set is four files under one prefix, each plain or .gz: `[PREFIX-]train-images-idx3-ubyte`,
`...-labels-idx1-ubyte`, and the same with `t10k` or `test`; `train-images.idx3-ubyte` too.  A
device has the first two only, and a server may have the others only.
`fedlean.data.idxfile` reads one such file.  Only unsigned bytes are covered, as published.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from pathlib import Path

import numpy as np

from fedlean.data.idxfile import idx_blocks, idx_shape, read_idx
from fedlean.data.labels import classes_of
from fedlean.data.source import READING_BYTES, Room, Source, labels_bytes, take, unlimited

NAME = re.compile(
    r"(?:(?P<prefix>.+)[-_.])?(?P<part>train|t10k|test)-(?P<kind>images|labels)"
    r"[-.]idx[0-9]-ubyte(?:\.gz)?"
)
PARTS = ("train", "test")
KEYS = tuple(f"{part}-{kind}" for part in PARTS for kind in ("images", "labels"))
IdxFiles = Mapping[str, Path]  # one of KEYS -> file


def find_idx(folder: Path) -> dict[str, IdxFiles]:
    """The IDX sets of a folder by prefix ("" for files without one); sets may be incomplete.

    Raises ValueError when two different files claim the same role.
    """
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()):
        match = NAME.fullmatch(path.name)
        if not match or not path.is_file():
            continue
        part = "train" if match["part"] == "train" else "test"
        files = found.setdefault(match["prefix"] or "", {})
        known = files.setdefault(f"{part}-{match['kind']}", path)
        # Downloaders leave the .gz beside what they unpacked; plain sorts first and wins.
        if path not in (known, known.with_name(known.name + ".gz")):
            raise ValueError(
                f"{folder}: {known.name} and {path.name} are both {part} {match['kind']} of one"
                " data set, expected one such file; move one away"
            )
    return dict(found)


def idx_source(name: str, files: IdxFiles, prefix: str = "", room: Room = unlimited) -> Source:
    """The data set `name` in `files`; `classes_of` says how labels become classes.

    EMNIST publishes its images transposed: a prefix that starts with "emnist" turns them back.
    Raises ValueError naming the file for anything missing, damaged or contradictory, or what `room`
    raises.
    """
    pairs = [[key for key in KEYS if key.startswith(part) and key in files] for part in PARTS]
    missing = [key for key in KEYS if key not in files]
    if not any(len(pair) == 2 for pair in pairs) or any(len(pair) == 1 for pair in pairs):
        raise ValueError(
            f"data set {name!r}: got {', '.join(path.name for path in files.values())}, but no"
            f" file of {', '.join(missing)}; expected images with their labels in one folder"
        )
    transposed = prefix.lower().startswith("emnist")
    labels = {
        part: _labels(files[f"{part}-labels"], room)
        for part, pair in zip(PARTS, pairs, strict=True)
        if pair
    }
    class_names, y = classes_of(np.concatenate([*labels.values()]))
    train, test = (
        _Images(files[f"{part}-images"], len(labels[part]), transposed) if part in labels else None
        for part in PARTS
    )
    some, count = train or test, 0 if train is None else train.count
    assert some is not None
    if test is not None and test.shape != some.shape:
        raise ValueError(
            f"{test.path}: got images of {test.shape[1:]}, expected {some.shape[1:]} as in"
            f" {some.path.name}"
        )

    def read(wanted: np.ndarray, tested: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        none = np.empty((0, *some.shape), np.uint8)
        both = (train, wanted), (test, tested)
        x_train, x_test = (each.read(rows) if each else none for each, rows in both)
        return x_train, x_test

    return Source(
        name=name,
        y_train=y[:count],
        y_test=y[count:],
        class_names=class_names,
        clients=None,
        input_shape=some.shape,
        dtype=np.dtype(np.uint8),
        scale=255.0,
        read=read,
        reading_bytes=READING_BYTES + 4 * prod(some.shape),
        room=room,
    )


class _Images:
    """One file of images, of which the header is read."""

    def __init__(self, path: Path, count: int, transposed: bool) -> None:
        _, height, width = idx_shape(path, dimensions=3, count=count)
        self.path, self.count, self._transposed = path, count, transposed
        self.shape = (1, width, height) if transposed else (1, height, width)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """uint8 (len(rows), 1, H, W)."""
        x = np.empty((len(rows), *self.shape), np.uint8)
        if len(rows):
            blocks = idx_blocks(self.path, dimensions=3, count=self.count)
            take(map(self._oriented, blocks), rows, x)
        return x

    def _oriented(self, block: np.ndarray) -> np.ndarray:
        return (block.transpose(0, 2, 1) if self._transposed else block)[:, None]


def _labels(path: Path, room: Room) -> np.ndarray:
    """uint8 (n,)."""
    (count,) = idx_shape(path, dimensions=1)
    what = f"reading the labels of {count} examples in {path}"
    room(labels_bytes(count), what, "divide the set among the devices")
    return read_idx(path, dimensions=1)
