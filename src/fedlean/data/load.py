"""From what a user types after `--dataset` to a `Dataset`: a built-in name or a folder.

A folder's format is found from its content, or from that of the folders below where it holds no
set itself.  `FOLDER:NAME` chooses where there are several: NAME is the prefix of IDX files (nothing
for files without one), an .npz file's name, `npy`, or `leaf`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fedlean.data.arrow import arrow_source, find_arrow
from fedlean.data.dataset import Dataset
from fedlean.data.declared import NOTHING, Declared
from fedlean.data.described import described_source, find_description
from fedlean.data.digits import digits_source
from fedlean.data.holdout import hold_out
from fedlean.data.idx import find_idx, idx_source
from fedlean.data.leaf import find_leaf, leaf_source
from fedlean.data.npz import EXPECTED, find_npy, find_npz, npy_source, npz_source
from fedlean.data.npzfile import member_names
from fedlean.data.pictures import find_pictures, pictures_source
from fedlean.data.recordings import find_recordings, recordings_source
from fedlean.data.source import Room, Source, unlimited
from fedlean.data.table import csv_source, find_csv, passed_over

BUILT_IN = {"digits": digits_source}
DEEPER = 2  # levels of folders below the one given, as in MNIST/raw/*-ubyte


@dataclass(frozen=True)
class _Found:
    """A data set in a folder, not read yet.  name: what follows the colon in FOLDER:NAME."""

    folder: Path
    name: str
    open: Callable[[Room, Declared], Source]
    takes: frozenset[str] = frozenset()  # what of `Declared` means something for it


def available() -> list[tuple[str, str]]:
    """(what to give as data set, one line about it), for `fedlean datasets`."""
    return [
        ("digits", "scikit-learn's 8 x 8 handwritten digits: 10 classes, 1,438 + 359 examples"),
        ("FOLDER", "IDX files as published by MNIST, Fashion-MNIST and EMNIST, plain or .gz"),
        ("FOLDER", "LEAF JSON (FEMNIST): train/*.json and test/*.json, one client per writer"),
        ("FOLDER", "one .npz, or .npy files: x, y [, split, client, classes, layout]"),
        ("FOLDER", "the same with x_train, y_train, x_test, y_test, or with jpeg, offset, y"),
        ("FOLDER", ".csv, a row for each example: numbers, label [, client, split]"),
        (
            "FOLDER",
            "Parquet, or what Hugging Face's save_to_disk wrote: the same, or lists (pyarrow)",
        ),
        ("FOLDER", "pictures or WAV files by class: CLASS/*, or train/CLASS/* and test/CLASS/*"),
        ("FOLDER", "dataset.json: shape, classes and range, for a server without examples"),
        ("FOLDER:NAME", "one of several sets in a folder: IDX prefix, .npz or .csv file name"),
    ]


def load_dataset(name_or_folder: str, declared: Declared = NOTHING) -> Dataset:
    """The data set of a built-in name, a folder, or FOLDER:NAME, all in memory.

    Raises ValueError as `load_source`, or when an example is damaged.
    """
    return load_source(name_or_folder, declared=declared).dataset()


def load_source(
    name_or_folder: str, room: Room = unlimited, declared: Declared = NOTHING
) -> Source:
    """The same with its labels read and its examples not.

    room: asked before what takes much memory.  Raises ValueError when nothing of that name exists,
    nothing in the folder or up to DEEPER levels below is recognised, several sets are, or the one
    found is damaged, or is of a kind to which what is declared does not apply; and what `room`
    raises.
    """
    found = _chosen(name_or_folder, declared.label)
    declared.check(found.takes, name_or_folder)
    source = found.open(room, declared)
    return hold_out(source, declared.test_share) if declared.test_share else source


def _chosen(name_or_folder: str, label: str) -> _Found:
    if name_or_folder in BUILT_IN:
        read = BUILT_IN[name_or_folder]
        return _Found(Path(), name_or_folder, lambda room, declared: read(room))
    folder, wanted = _split(absolute(name_or_folder))
    found = _find_at_or_below(folder, partial(_find, label=label))
    found = found or _find_at_or_below(folder, _find_further)
    if not found:
        raise ValueError(_nothing_found(folder))
    fitting = [each for each in found if wanted in (None, each.name)]
    if len(fitting) == 1:
        return fitting[0]
    choices = ", ".join(sorted(f"{each.folder}:{each.name}" for each in found))
    if wanted is None or fitting:
        raise ValueError(f"{folder} holds {len(found)} data sets; choose one of {choices}")
    raise ValueError(f"{folder} holds no data set named {wanted!r}; expected one of {choices}")


def absolute(name: str) -> str:
    """`name` with its folder as an absolute path, `~` expanded.

    `name` is a folder, FOLDER:NAME, or a built-in data set, which stays as it is; so does what does
    not exist, for the loader to refuse by the name that was given.

    >>> absolute("digits")
    'digits'
    """
    whole = Path(os.path.expanduser(name))  # noqa: PTH111 - Path's raises for an unknown user
    if name in BUILT_IN or (name and whole.exists()):
        return name if name in BUILT_IN else str(whole.resolve())
    before, colon, wanted = name.rpartition(":")
    folder = Path(os.path.expanduser(before))  # noqa: PTH111
    return f"{folder.resolve()}:{wanted}" if colon and before and folder.exists() else name


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
        f" ({', '.join(sorted(BUILT_IN))}){hint}; give the path of the folder that holds its files"
        f" (seen from {Path.cwd()}), in a layout that 'fedlean datasets' lists"
    )


def _find(folder: Path, title: str, label: str) -> list[_Found]:
    """What the folder itself holds.

    title: what a set without a name of its own is called; label: a table's column that is declared.
    """
    npz, layout = find_npz(folder), frozenset({"layout"})
    found = [
        _Found(folder, prefix, _plainly(partial(idx_source, prefix or title, files, prefix)))
        for prefix, files in find_idx(folder).items()
    ]
    for each, path in npz.items():
        name = title if len(npz) == 1 else path.stem
        found.append(_Found(folder, each, partial(npz_source, name, path), layout))
    for each, base in find_npy(folder).items():
        found.append(_Found(folder, each, partial(npy_source, title, base), layout))
    tables = find_csv(folder, label)
    for each, files in tables.items():
        name = title if len(tables) == 1 else each.removesuffix(".csv")
        found.append(_Found(folder, each, partial(csv_source, name, files), frozenset({"label"})))
    for each, parts in find_arrow(folder).items():
        read = partial(arrow_source, title, parts)
        found.append(_Found(folder, each, read, frozenset({"label", "layout"})))
    for each, base in find_leaf(folder).items():
        found.append(_Found(folder, each, partial(leaf_source, title, base), layout))
    return found


def _find_further(folder: Path, title: str) -> list[_Found]:
    """Pictures, recordings and a mere description: looked for where there is nothing else.

    A folder of plots beside a data set is none.
    """
    found = []
    for each, files in find_pictures(folder).items():
        found.append(_Found(folder, each, _plainly(partial(pictures_source, title, files))))
    for each, files in find_recordings(folder).items():
        read = partial(recordings_source, title, files)
        found.append(_Found(folder, each, read, frozenset({"length"})))
    for each, path in find_description(folder).items():
        found.append(_Found(folder, each, _plainly(partial(described_source, title, path))))
    return found


def _plainly(read: Callable[..., Source]) -> Callable[[Room, Declared], Source]:
    """Of a format that says everything itself."""
    return lambda room, declared: read(room=room)


def _find_at_or_below(folder: Path, find: Callable[[Path, str], list[_Found]]) -> list[_Found]:
    """What the folder holds, or else those below; one that holds a data set is not searched on."""
    title, level = folder.resolve().name, [folder]
    found = find(folder, title)
    if found:
        return found
    for _ in range(DEEPER):
        level = [each for above in level for each in _folders(above)]
        sets = {each: find(each, title) for each in level}
        found += [each for of_folder in sets.values() for each in of_folder]
        level = [each for each, of_folder in sets.items() if not of_folder]
    return found


def _folders(folder: Path) -> list[Path]:
    """Those in it that can be read, but not hidden ones (as .git)."""
    return sorted(
        each
        for each in folder.iterdir()
        if not each.name.startswith(".") and each.is_dir() and os.access(each, os.R_OK | os.X_OK)
    )


def _nothing_found(folder: Path) -> str:
    other = [f"{p.name} with {sorted(member_names(p))}" for p in sorted(folder.glob("*.npz"))]
    other += passed_over(folder)
    seen = f" (passed over: {'; '.join(other)})" if other else ""
    return (
        f"{folder} holds no data set that FedLean recognises{seen}; looked there and {DEEPER}"
        " levels down for IDX files ([PREFIX-]train-images-idx3-ubyte[.gz] and its three"
        f" companions), an .npz or .npy files with {EXPECTED}, .csv files with a"
        " column label, y, class or target (--label names another), .parquet or .arrow"
        " files with such columns, pictures or .wav files"
        " in a folder for each class, and LEAF's train/*.json and test/*.json"
    )
