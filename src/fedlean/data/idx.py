"""IDX files, the format of MNIST, Fashion-MNIST and EMNIST: finding the four files, and the set.

A set is four files under one prefix, each plain or .gz: `[PREFIX-]train-images-idx3-ubyte`,
`...-labels-idx1-ubyte`, and the same with `t10k` or `test`; `train-images.idx3-ubyte` too.
`fedlean.data.idxfile` reads one such file.  Only unsigned bytes are covered, as published.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fedlean.data.dataset import Dataset
from fedlean.data.idxfile import read_idx

NAME = re.compile(
    r"(?:(?P<prefix>.+)[-_.])?(?P<part>train|t10k|test)-(?P<kind>images|labels)"
    r"[-.]idx[0-9]-ubyte(?:\.gz)?"
)
KEYS = ("train-images", "train-labels", "test-images", "test-labels")
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


def load_idx(name: str, files: IdxFiles, prefix: str = "") -> Dataset:
    """The data set `name` in `files`; labels become classes in the order of their values.

    EMNIST publishes its images transposed: a prefix that starts with "emnist" turns them back.
    Raises ValueError naming the file for anything missing, damaged or contradictory.
    """
    missing = [key for key in KEYS if key not in files]
    if missing:
        raise ValueError(
            f"data set {name!r}: got {', '.join(path.name for path in files.values())}, but no"
            f" file of {', '.join(missing)}; expected all four files of the set in one folder"
        )
    transposed = prefix.lower().startswith("emnist")
    train_x, train_labels = _read_part(files, "train", transposed)
    test_x, test_labels = _read_part(files, "test", transposed)
    values, train_y = np.unique(train_labels, return_inverse=True)  # EMNIST letters count from 1
    unknown = np.setdiff1d(test_labels, values)
    if len(unknown):
        raise ValueError(
            f"{files['test-labels']}: got labels {unknown.tolist()}, which no training example"
            f" has, expected labels among {values.tolist()}; check that both files are of one set"
        )
    counts_from_zero = np.array_equal(values, np.arange(len(values)))
    return Dataset.from_images(
        name,
        (train_x, train_y.astype(np.int64)),
        (test_x, np.searchsorted(values, test_labels).astype(np.int64)),
        classes=len(values),
        scale=255.0,
        class_names=() if counts_from_zero else tuple(str(value) for value in values),
    )


def _read_part(files: IdxFiles, part: str, transposed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (n, 1, H, W) and label values uint8 (n,)."""
    labels = read_idx(files[f"{part}-labels"], dimensions=1)  # first: small, and states the count
    images = read_idx(files[f"{part}-images"], dimensions=3, count=len(labels))
    if transposed:
        images = np.ascontiguousarray(images.transpose(0, 2, 1))
    return images[:, None], labels
