"""A file for each example, in a folder for each class.

CLASS/*.png, say, or train/CLASS/*.png and test/CLASS/*.png.  What is in a file is the business of
`pictures` and `recordings`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from fedlean.data.columns import two_tables
from fedlean.data.labels import classes_of
from fedlean.data.rows import Rows, rows_source
from fedlean.data.source import Room, Source, labels_bytes

HALVES = ("train", "test")
PATH_BYTES = 400  # of a file's path, as Python keeps it

Files = Mapping[str, Sequence[Path]]  # half -> files, each in the folder of its class
Decode = Callable[[Path, np.ndarray], None]  # (file, out): sets out (C, ...) to what it holds


def find_by_class(folder: Path, endings: Collection[str]) -> Files:
    """The files of a folder, those with one of the `endings`; {} where it has no such layout.

    Folders of classes are the test half's or the training half's where they lie in train/ and
    test/; else all of them are for training.
    """
    halves = {half: _of_classes(folder / half, endings) for half in HALVES}
    found = {half: files for half, files in halves.items() if files}
    if not found and (files := _of_classes(folder, endings)):
        found = {"train": files}
    return found


def by_class_source(
    name: str,
    files: Files,
    room: Room,
    examine: Callable[[Path], tuple[tuple[int, ...], np.dtype, float]],
    decode: Decode,
    decoding_bytes: Callable[[Path], int],
) -> Source:
    """The set of the files, whose classes are the names of their folders.

    examine: of the first file, the shape and type of every example and the value that counts as
    1.0.  decoding_bytes: what decoding one takes beside its result.  Raises ValueError naming the
    file that is damaged, and what `room` raises.
    """
    some = next(iter(files.values()))[0]
    count = sum(map(len, files.values()))
    what = f"the names of {count} files around {some.parent.parent}"
    room(labels_bytes(count, PATH_BYTES * count), what, "divide the files among the devices")
    names, y = classes_of(np.array([path.parent.name for of in files.values() for path in of]))
    held = [len(files.get(half, ())) for half in HALVES]
    columns = two_tables(y[: held[0]], y[held[0] :], names=names)
    shape, dtype, scale = examine(some)

    def rows(half: str) -> Rows | None:
        paths = files.get(half)
        if not paths:
            return None

        def fill(wanted: np.ndarray, out: np.ndarray) -> None:
            for i, row in enumerate(wanted.tolist()):
                decode(paths[row], out[i])

        return Rows(shape, dtype, scale, decoding_bytes(some), fill)

    return rows_source(name, columns, rows("train"), rows("test"), room)


def _of_classes(folder: Path, endings: Collection[str]) -> list[Path]:
    """Files in the folders of a folder, in ascending order."""
    if not folder.is_dir():
        return []
    return sorted(
        path
        for below in folder.iterdir()
        if not below.name.startswith(".") and below.is_dir() and os.access(below, os.R_OK | os.X_OK)
        for path in below.iterdir()
        if path.suffix.lower() in endings and not path.name.startswith(".")
    )
