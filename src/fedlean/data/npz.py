"""A folder with one .npz data set: arrays of images, or images as JPEG files end to end.

Arrays: `x` uint8 or float (n, H, W), (n, H, W, C) or (n, C, H, W) with C 1 or 3.
JPEG: `jpeg` uint8 (bytes,) and `offset` int (n + 1,): image i is jpeg[offset[i]:offset[i + 1]].
Both: `y` (n,) labels, `split` (n,) 0 train or 1 test; optional `client` int (n,) and `classes`,
the names that integers in `y` count.
`fedlean.data.npzfile` reads the arrays, `fedlean.data.jpeg` decodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedlean.data.jpeg import DECODER_BYTES, open_jpegs
from fedlean.data.labels import as_text, classes_of
from fedlean.data.npzfile import (
    Member,
    describe_members,
    member_blocks,
    member_names,
    read_member,
)
from fedlean.data.source import (
    READING_BYTES,
    Read,
    Room,
    Source,
    labels_bytes,
    take,
    unlimited,
)

ARRAYS = frozenset({"x", "y", "split"})
JPEG = frozenset({"jpeg", "offset", "y", "split"})
OPTIONAL = frozenset({"client", "classes"})
LARGE = frozenset({"x", "jpeg"})
CHANNELS = (1, 3)

Fill = Callable[[np.ndarray, np.ndarray], None]  # (rows of the file, out): out[i] = image rows[i]


@dataclass(frozen=True)
class _Columns:
    """What every example has beside its image.  y: int64 (n,); train: bool (n,)."""

    y: np.ndarray
    train: np.ndarray
    clients: np.ndarray | None  # int32, of the training examples
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class _Images:
    """The images, not read yet, and how they will be kept."""

    shape: tuple[int, int, int]  # (C, H, W)
    dtype: np.dtype
    scale: float  # the stored value that counts as 1.0
    reading_bytes: int  # what `fill` takes beside its result
    fill: Fill


def find_npz(folder: Path) -> dict[str, Path]:
    """The .npz data sets of a folder by file name; other .npz files are passed over.

    Raises ValueError naming a file that is not a readable .npz.
    """
    found = {}
    for path in sorted(folder.glob("*.npz")):
        names = member_names(path)
        if names >= ARRAYS or names >= JPEG:
            found[path.name] = path
    return found


def npz_source(name: str, path: Path, room: Room = unlimited) -> Source:
    """The data set in the file.  JPEG images need Pillow, and "(JPEG)" is added to the name.

    Raises ValueError naming the file and the array for anything missing, damaged or contradictory,
    or what `room` raises.
    """
    names = member_names(path)
    form = ARRAYS if names >= ARRAYS else JPEG  # `jpeg` may lie beside a decoded `x`: cheaper
    if not names >= form:
        raise ValueError(
            f"{path}: got arrays {sorted(names)}, expected {sorted(ARRAYS)} or {sorted(JPEG)}"
        )
    members = describe_members(path, form | (OPTIONAL & names))
    small = {key: each for key, each in members.items() if key not in LARGE}
    _make_room(small, path, room)
    arrays = {key: read_member(each) for key, each in small.items()}
    try:
        columns = _columns(arrays)
        if form is JPEG:
            name = f"{name} (JPEG)"  # lossy copies must not pass for the originals in a result
            room(DECODER_BYTES, f"the JPEG decoder for {path}", "store the images as an array x")
            images = _jpegs(members["jpeg"], arrays["offset"], len(columns.y))
        else:
            images = _arrays(members["x"], len(columns.y))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Source(
        name=name,
        y_train=columns.y[columns.train],
        y_test=columns.y[~columns.train],
        class_names=columns.class_names,
        clients=columns.clients,
        input_shape=images.shape,
        dtype=images.dtype,
        scale=images.scale,
        read=_reader(images, columns.train),
        reading_bytes=images.reading_bytes,
        room=room,
    )


def _make_room(small: Mapping[str, Member], path: Path, room: Room) -> None:
    """For the arrays that are read whole, and what is made of them."""
    stored_bytes = sum(each.data_bytes for each in small.values())
    count = small["y"].shape[0] if small["y"].shape else 0
    room(
        labels_bytes(count, stored_bytes),
        f"reading the labels of {count} examples in {path}",
        "divide the file among the devices",
    )


def _columns(arrays: Mapping[str, np.ndarray]) -> _Columns:
    names = _names(arrays["classes"]) if "classes" in arrays else None
    class_names, y = classes_of(arrays["y"], names)
    split = _integers("split", arrays["split"], 2, len(y))
    train = split == 0
    if train.all() or not train.any():
        raise ValueError(
            f"split has {train.sum()} training (0) and {(~train).sum()} test (1) examples,"
            " expected at least 1 of each"
        )
    clients = None
    if "client" in arrays:
        ids = _integers("client", arrays["client"], 1 << 31, len(y))
        clients = ids[train].astype(np.int32)
    return _Columns(y, train, clients, class_names)


def _names(classes: np.ndarray) -> list[str]:
    if classes.ndim != 1 or classes.dtype.kind not in "US":
        raise ValueError(
            f"classes is {classes.dtype} {classes.shape}, expected names (classes,) stored as text"
        )
    return [str(each) for each in as_text(classes)]


def _integers(name: str, array: np.ndarray, below: int, count: int) -> np.ndarray:
    """`array` as int64 (count,), checked to be integers in 0..below-1."""
    if array.dtype.kind not in "iu" or array.ndim != 1 or not array.size:
        raise ValueError(f"{name} is {array.dtype} {array.shape}, expected integers (examples,)")
    if len(array) != count:
        raise ValueError(f"{name} has {len(array)} entries, expected {count} as in y")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= below:
        raise ValueError(f"{name} has values {low}..{high}, expected 0..{below - 1}")
    return array.astype(np.int64)


def _reader(images: _Images, train: np.ndarray) -> Read:
    """train: bool (n,), which rows of the file are training examples."""
    rows = [np.flatnonzero(train), np.flatnonzero(~train)]

    def read(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        wanted = np.concatenate([rows[0][train], rows[1][test]])
        x = np.empty((len(wanted), *images.shape), images.dtype)
        images.fill(wanted, x)
        return x[: len(train)], x[len(train) :]

    return read


def _jpegs(member: Member, offset: np.ndarray, count: int) -> _Images:
    jpegs = open_jpegs(member, offset, count)
    shape = (3, *jpegs.size)
    return _Images(shape, np.dtype(np.uint8), 255.0, jpegs.reading_bytes, jpegs.decode)


def _arrays(member: Member, count: int) -> _Images:
    shape, dtype = member.shape, member.dtype
    if dtype != np.uint8 and dtype.kind != "f":
        raise ValueError(f"x is {dtype}, expected uint8 (0..255) or float pixels")
    if len(shape) not in (3, 4) or shape[0] != count or 0 in shape:
        raise ValueError(
            f"x has shape {shape}, expected ({count}, height, width), with channels last or first"
            " where there are any: one image per label"
        )
    if member.fortran:
        raise ValueError(
            "x is stored in Fortran order, in which no image lies in one piece; save"
            " numpy.ascontiguousarray(x)"
        )
    channels_last = len(shape) == 4 and shape[3] in CHANNELS
    if len(shape) == 4 and channels_last == (shape[1] in CHANNELS):
        raise ValueError(
            f"x has shape {shape}, which shows no single axis of 1 or 3 channels; expected"
            " (n, height, width, channels) or (n, channels, height, width)"
        )

    def images(block: np.ndarray) -> np.ndarray:
        """(k, C, H, W) of stored rows (k, ...)."""
        if block.ndim == 3:
            return block[:, None]
        return np.moveaxis(block, 3, 1) if channels_last else block

    def fill(rows: np.ndarray, out: np.ndarray) -> None:
        take(map(images, member_blocks(member)), rows, out)

    _, channels, height, width = images(np.empty((0, *shape[1:]))).shape
    kept, scale = (np.uint8, 255.0) if dtype == np.uint8 else (np.float32, 1.0)
    row_bytes = member.data_bytes // count
    return _Images(
        (channels, height, width), np.dtype(kept), scale, READING_BYTES + 4 * row_bytes, fill
    )
