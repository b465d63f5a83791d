"""From what a user types after `--dataset` to a `Dataset`: a built-in name or a folder.

A folder's format is found from its content.  `FOLDER:NAME` chooses where it holds several sets:
NAME is the prefix of IDX files (nothing for files without one), an .npz file's name, or `leaf`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fedlean.data.dataset import Dataset
from fedlean.data.digits import load_digits
from fedlean.data.idx import find_idx, load_idx
from fedlean.data.leaf import find_leaf, load_leaf
from fedlean.data.npz import find_npz, load_npz
from fedlean.data.npzfile import member_names

BUILT_IN = {"digits": load_digits}


def available() -> list[tuple[str, str]]:
    """(what to give as data set, one line about it), for `fedlean datasets`."""
    return [
        ("digits", "scikit-learn's 8 x 8 handwritten digits: 10 classes, 1,438 + 359 examples"),
        ("FOLDER", "IDX files as published by MNIST, Fashion-MNIST and EMNIST, plain or .gz"),
        ("FOLDER", "LEAF JSON (FEMNIST): train/*.json and test/*.json, one client per writer"),
        ("FOLDER", "one .npz with x (or jpeg and offset), y, split (0 train, 1 test) [, client]"),
        ("FOLDER:NAME", "one of several sets in a folder: IDX prefix or .npz file name"),
    ]


def load_dataset(name_or_folder: str) -> Dataset:
    """The data set of a built-in name, a folder, or FOLDER:NAME.

    Raises ValueError when nothing of that name exists, nothing in the folder is recognised,
    several sets are, or the one found is damaged.
    """
    if name_or_folder in BUILT_IN:
        return BUILT_IN[name_or_folder]()
    folder, wanted = _split(name_or_folder)
    loaders = _find(folder)
    if wanted is None and len(loaders) == 1:
        wanted = next(iter(loaders))
    if wanted in loaders:
        return loaders[wanted]()
    if not loaders:
        raise ValueError(_nothing_found(folder))
    choices = ", ".join(f"{folder}:{each}" for each in sorted(loaders))
    if wanted is None:
        raise ValueError(f"{folder} holds {len(loaders)} data sets; choose one of {choices}")
    raise ValueError(f"{folder} holds no data set named {wanted!r}; expected one of {choices}")


def _split(text: str) -> tuple[Path, str | None]:
    """The folder, and what stands after its last colon; an existing path wins, colons and all."""
    if text and Path(text).is_dir():
        return Path(text), None
    before, colon, wanted = text.rpartition(":")
    if colon and before and Path(before).is_dir():
        return Path(before), wanted
    if text and Path(text).exists():
        raise ValueError(f"data set {text!r} is a file, expected the folder that it lies in")
    near = difflib.get_close_matches(text, BUILT_IN, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"data set {text!r}: no such folder, expected a folder or a built-in data set"
        f" ({', '.join(sorted(BUILT_IN))}){hint}"
    )


def _find(folder: Path) -> dict[str, Callable[[], Dataset]]:
    """What the folder holds by NAME, not read yet."""
    title = folder.resolve().name
    loaders: dict[str, Callable[[], Dataset]] = {}
    for prefix, files in find_idx(folder).items():
        loaders[prefix] = partial(load_idx, prefix or title, files, prefix)
    sets = find_npz(folder)
    for each, path in sets.items():
        loaders[each] = partial(load_npz, title if len(sets) == 1 else path.stem, path)
    for each, base in find_leaf(folder).items():
        loaders[each] = partial(load_leaf, title, base)
    return loaders


def _nothing_found(folder: Path) -> str:
    other = [f"{p.name} with {sorted(member_names(p))}" for p in sorted(folder.glob("*.npz"))]
    seen = f" (passed over: {'; '.join(other)})" if other else ""
    return (
        f"{folder} holds no data set that FedLean recognises{seen}; looked for IDX files"
        " ([PREFIX-]train-images-idx3-ubyte[.gz] and its three companions), an .npz with x, y,"
        " split or jpeg, offset, y, split, and LEAF's train/*.json and test/*.json"
    )
