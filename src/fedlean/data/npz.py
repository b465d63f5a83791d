"""A folder with one .npz data set, or with its arrays as .npy files.

Arrays: `x` of all examples, in one of `layout.LAYOUTS`, and `y` (n,) labels; optional `split` (0 or
"train", 1 or "test"), `client` (whose an example is), `classes` (names that integers in `y` count)
and `layout` (a word).  Or training and test examples apart, as `x_train`, `y_train`, `x_test` and
`y_test`, of which one half may be missing.  Or, in place of `x`, JPEG files end to end: `jpeg`
uint8 (bytes,) and `offset` int (n + 1,), image i being jpeg[offset[i]:offset[i + 1]].
`fedlean.data.npzfile` reads the arrays, `fedlean.data.jpeg` decodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np

from fedlean.data.columns import Columns, flat, one_table, two_tables
from fedlean.data.declared import NOTHING, Declared
from fedlean.data.jpeg import DECODER_BYTES, open_jpegs
from fedlean.data.labels import as_text
from fedlean.data.layout import arranged, kept_as, layout_of
from fedlean.data.npzfile import (
    Member,
    describe_members,
    describe_npy,
    member_blocks,
    member_names,
    read_member,
)
from fedlean.data.rows import Rows, rows_source
from fedlean.data.source import READING_BYTES, Room, Source, labels_bytes, take, unlimited

# What an array is for -> the names that it may have.
SPELLINGS = {
    "x": ("x", "X"),
    "y": ("y", "Y"),
    "jpeg": ("jpeg",),
    "offset": ("offset",),
    "split": ("split",),
    "client": ("client", "clients"),
    "classes": ("classes",),
    "layout": ("layout",),
    "x_train": ("x_train", "X_train", "train_x", "train_images"),
    "y_train": ("y_train", "Y_train", "train_y", "train_labels"),
    "x_test": ("x_test", "X_test", "test_x", "test_images"),
    "y_test": ("y_test", "Y_test", "test_y", "test_labels"),
    "client_train": ("client_train", "clients_train", "train_client", "train_clients"),
    "y_val": ("y_val", "Y_val", "val_y", "val_labels"),
}
LARGE = frozenset({"x", "jpeg", "x_train", "x_test", "y_val"})  # not read whole
PARTS = ("train", "test")
FORMS = ({"jpeg", "offset", "y"}, {"x", "y"}, {"x_train", "y_train"}, {"x_test", "y_test"})
EXPECTED = "x and y, or x_train, y_train, x_test and y_test, or jpeg, offset and y"


def find_npz(folder: Path) -> dict[str, Path]:
    """The .npz data sets of a folder by file name; other .npz files are passed over.

    Raises ValueError naming a file that is not a readable .npz.
    """
    return {path.name: path for path in sorted(folder.glob("*.npz")) if _is_set(member_names(path))}


def find_npy(folder: Path) -> dict[str, Path]:
    """{"npy": folder} when its .npy files are the arrays of a data set, else {}."""
    return {"npy": folder} if _is_set(path.stem for path in folder.glob("*.npy")) else {}


def npz_source(
    name: str, path: Path, room: Room = unlimited, declared: Declared = NOTHING
) -> Source:
    """The data set in the file.  JPEG images need Pillow, and "(JPEG)" is added to the name.

    Raises ValueError naming the file and the array for anything missing, damaged or contradictory,
    or what `room` raises.
    """
    roles = _roles(path, member_names(path))
    members = describe_members(path, roles.values())
    return _source(
        name, path, {role: members[each] for role, each in roles.items()}, room, declared
    )


def npy_source(
    name: str, folder: Path, room: Room = unlimited, declared: Declared = NOTHING
) -> Source:
    """The data set in a folder's .npy files.  Raises ValueError as `npz_source`."""
    roles = _roles(folder, (path.stem for path in folder.glob("*.npy")))
    members = {role: describe_npy(folder / f"{each}.npy") for role, each in roles.items()}
    return _source(name, folder, members, room, declared)


def _is_set(names: Iterable[str]) -> bool:
    known = set(names)
    found = {role for role, spelt in SPELLINGS.items() if known.intersection(spelt)}
    return any(found >= form for form in FORMS)


def _roles(where: Path, names: Iterable[str]) -> dict[str, str]:
    """What an array is for -> its name, of those that the set is made of."""
    known, found = sorted(names), dict[str, str]()
    for role, spelt in SPELLINGS.items():
        fitting = [name for name in spelt if name in known]
        if len(fitting) > 1:
            raise ValueError(f"{where}: got {' and '.join(fitting)}, expected one of them")
        if fitting:
            found[role] = fitting[0]
    whole = next((form for form in FORMS[:2] if found.keys() >= form), None)
    if whole is not None:  # `jpeg` may lie beside a decoded `x`: cheaper
        wanted = whole | {"split", "client", "classes", "layout"}
    elif any(found.keys() >= form for form in FORMS[2:]):
        wanted = {f"{each}_{part}" for each in "xy" for part in PARTS}
        wanted |= {"client_train", "client", "classes", "layout", "y_val"}
        for part in PARTS:
            if (f"x_{part}" in found) != (f"y_{part}" in found):
                raise ValueError(f"{where}: got arrays {known}, expected y_{part} beside x_{part}")
    else:
        raise ValueError(f"{where}: got arrays {known}, expected {EXPECTED}")
    return {role: name for role, name in found.items() if role in wanted}


def _source(
    name: str, where: Path, members: Mapping[str, Member], room: Room, declared: Declared
) -> Source:
    small = {role: each for role, each in members.items() if role not in LARGE}
    _make_room(small, where, room)
    arrays = {role: read_member(each) for role, each in small.items()}
    if "jpeg" in members:
        name = f"{name} (JPEG)"  # lossy copies must not pass for the originals in a result
        room(DECODER_BYTES, f"the JPEG decoder for {where}", "store the images as an array x")
    try:
        columns = _columns(arrays)
        if "y_val" in members:
            left_out = (f"{prod(members['y_val'].shape)} examples for validation are left out",)
        else:
            left_out = ()
        layout = _layout(arrays, declared)
        train, test = _both(members, arrays, layout)
        source = rows_source(name, columns, train, test, room)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return replace(source, notes=(*source.notes, *left_out))


def _make_room(small: Mapping[str, Member], where: Path, room: Room) -> None:
    """For the arrays that are read whole, and what is made of them."""
    stored_bytes = sum(each.data_bytes for each in small.values())
    labels = [each for role, each in small.items() if role in ("y", "y_train", "y_test")]
    count = sum(each.shape[0] for each in labels if each.shape)
    room(
        labels_bytes(count, stored_bytes),
        f"reading the labels of {count} examples in {where}",
        "divide the file among the devices",
    )


def _columns(arrays: Mapping[str, np.ndarray]) -> Columns:
    names = _names(arrays["classes"]) if "classes" in arrays else None
    if "y" in arrays:
        split, clients = arrays.get("split"), arrays.get("client")
        return one_table(arrays["y"], names=names, split=split, clients=clients)
    none = np.empty(0, np.int64)
    train, test = (arrays.get(f"y_{part}", none) for part in PARTS)
    clients = arrays.get("client_train", arrays.get("client"))
    return two_tables(train, test, names=names, clients=clients)


def _names(classes: np.ndarray) -> list[str]:
    if classes.ndim != 1 or classes.dtype.kind not in "US":
        raise ValueError(
            f"classes is {classes.dtype} {classes.shape}, expected names (classes,) stored as text"
        )
    return [str(each) for each in as_text(classes)]


def _layout(arrays: Mapping[str, np.ndarray], declared: Declared) -> str:
    """The declared one, "" where nobody declares any."""
    if "layout" not in arrays:
        return declared.layout
    word = arrays["layout"]
    if word.size != 1 or word.dtype.kind not in "US":
        raise ValueError(f"layout is {word.dtype} {word.shape}, expected one word, as 'ncl'")
    stored = str(as_text(word.reshape(1))[0])
    if declared.layout not in ("", stored):
        raise ValueError(f"layout is {stored!r}, but --layout says {declared.layout!r}")
    return stored


def _both(
    members: Mapping[str, Member], arrays: Mapping[str, np.ndarray], layout: str
) -> tuple[Rows | None, Rows | None]:
    """Of the training and the test examples, which may be in the same array."""
    if "jpeg" in members:
        images = _jpegs(members["jpeg"], arrays["offset"], len(flat("y", arrays["y"])))
        return images, images
    if "x" in members:
        rows = _arrays("x", members["x"], len(flat("y", arrays["y"])), layout)
        return rows, rows
    train, test = (
        _arrays(f"x_{part}", members[f"x_{part}"], len(arrays[f"y_{part}"]), layout)
        if f"x_{part}" in members and f"y_{part}" in members
        else None
        for part in PARTS
    )
    return train, test


def _jpegs(member: Member, offset: np.ndarray, count: int) -> Rows:
    jpegs = open_jpegs(member, offset, count)
    shape = (3, *jpegs.size)
    return Rows(shape, np.dtype(np.uint8), 255.0, jpegs.reading_bytes, jpegs.decode)


def _arrays(what: str, member: Member, count: int, declared: str) -> Rows:
    shape, dtype = member.shape, member.dtype
    if not shape or shape[0] != count or 0 in shape:
        raise ValueError(f"{what} has shape {shape}, expected ({count}, ...): one row per label")
    try:
        kept, scale = kept_as(dtype)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    layout = layout_of(what, shape, dtype, declared)
    if member.fortran and len(shape) > 1:
        raise ValueError(
            f"{what} is stored in Fortran order, in which no example lies in one piece; save"
            f" numpy.ascontiguousarray({what})"
        )

    def fill(rows: np.ndarray, out: np.ndarray) -> None:
        take((arranged(block, layout) for block in member_blocks(member)), rows, out)

    example = arranged(np.empty((0, *shape[1:])), layout).shape[1:]
    row_bytes = member.data_bytes // count
    return Rows(example, kept, scale, READING_BYTES + 4 * row_bytes, fill)
