"""A folder with one .npz data set: arrays of images, or images as JPEG files end to end.

Arrays: `x` uint8 or float (n, H, W), (n, H, W, C) or (n, C, H, W) with C 1 or 3.
JPEG: `jpeg` uint8 (bytes,) and `offset` int (n + 1,): image i is jpeg[offset[i]:offset[i + 1]].
Both: `y` int (n,), `split` (n,) 0 train or 1 test; optional `client` int (n,), `classes` (names).
`fedlean.data.npzfile` reads the arrays, `fedlean.data.jpeg` decodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedlean.data.dataset import MAX_CLASSES, Dataset
from fedlean.data.jpeg import decode_jpegs
from fedlean.data.npzfile import member_names, read_members

ARRAYS = frozenset({"x", "y", "split"})
JPEG = frozenset({"jpeg", "offset", "y", "split"})
OPTIONAL = frozenset({"client", "classes"})
CHANNELS = (1, 3)


@dataclass(frozen=True)
class _Columns:
    """What every example has beside its image.  y: int64 (n,); train: bool (n,)."""

    y: np.ndarray
    train: np.ndarray
    clients: np.ndarray | None  # int32, of the training examples
    classes: int
    class_names: tuple[str, ...]


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


def load_npz(name: str, path: Path) -> Dataset:
    """The data set in the file.  JPEG images need Pillow, and "(JPEG)" is added to the name.

    Raises ValueError naming the file and the array for anything missing, damaged or contradictory.
    """
    names = member_names(path)
    form = ARRAYS if names >= ARRAYS else JPEG  # `jpeg` may lie beside a decoded `x`: cheaper
    if not names >= form:
        raise ValueError(
            f"{path}: got arrays {sorted(names)}, expected {sorted(ARRAYS)} or {sorted(JPEG)}"
        )
    arrays = read_members(path, form | (OPTIONAL & names))
    try:
        columns = _columns(arrays)
        if form is JPEG:
            name = f"{name} (JPEG)"  # lossy copies must not pass for the originals in a result
            x, scale = decode_jpegs(arrays["jpeg"], arrays["offset"], len(columns.y)), 255.0
        else:
            x, scale = _images(arrays["x"], len(columns.y))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    train = columns.train
    return Dataset.from_images(
        name,
        (np.ascontiguousarray(x[train]), columns.y[train]),
        (np.ascontiguousarray(x[~train]), columns.y[~train]),
        classes=columns.classes,
        scale=scale,
        class_names=columns.class_names,
        clients=columns.clients,
    )


def _columns(arrays: dict[str, np.ndarray]) -> _Columns:
    y = _integers("y", arrays["y"], MAX_CLASSES)
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
    names = arrays.get("classes", np.empty(0, str))
    if names.ndim != 1 or names.dtype.kind != "U":
        raise ValueError(
            f"classes is {names.dtype} {names.shape}, expected names (classes,) stored as text"
        )
    class_names = tuple(str(each) for each in names)
    classes = len(class_names) or int(y[train].max()) + 1
    if y.max() >= classes:
        raise ValueError(
            f"y has label {y.max()}, expected 0..{classes - 1}, the"
            f" {'named classes' if class_names else 'labels of the training examples'}"
        )
    return _Columns(y, train, clients, classes, class_names)


def _integers(name: str, array: np.ndarray, below: int, count: int | None = None) -> np.ndarray:
    """`array` as int64 (count,), checked to be integers in 0..below-1."""
    if array.dtype.kind not in "iu" or array.ndim != 1 or not array.size:
        raise ValueError(f"{name} is {array.dtype} {array.shape}, expected integers (examples,)")
    if count is not None and len(array) != count:
        raise ValueError(f"{name} has {len(array)} entries, expected {count} as in y")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= below:
        raise ValueError(f"{name} has values {low}..{high}, expected 0..{below - 1}")
    return array.astype(np.int64)


def _images(x: np.ndarray, count: int) -> tuple[np.ndarray, float]:
    """`x` as uint8 or float32 (n, C, H, W), and its scale: 255 for bytes, 1 for floats."""
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise ValueError(f"x is {x.dtype}, expected uint8 (0..255) or float pixels")
    if x.ndim not in (3, 4) or len(x) != count:
        raise ValueError(
            f"x has shape {x.shape}, expected ({count}, height, width), with channels last or"
            " first where there are any: one image per label"
        )
    if x.ndim == 3:
        x = x[:, None]
    else:
        last, first = x.shape[3] in CHANNELS, x.shape[1] in CHANNELS
        if last == first:
            raise ValueError(
                f"x has shape {x.shape}, which shows no single axis of 1 or 3 channels; expected"
                " (n, height, width, channels) or (n, channels, height, width)"
            )
        x = np.moveaxis(x, 3, 1) if last else x
    if x.dtype == np.uint8:
        return x, 255.0
    with np.errstate(over="ignore"):  # what overflows is infinite, which Dataset refuses by name
        return x.astype(np.float32), 1.0
