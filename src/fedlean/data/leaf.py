"""LEAF's JSON layout: square grey images, as FEMNIST is published, or tables; a client per user.

`train/*.json` and `test/*.json` (or under `data/`), each `{"users": [...], "num_samples": [...],
"user_data": {user: {"x": [[pixel, ...], ...], "y": [label, ...]}}}`, pixels in 0..1, row by row.
With the layout "nf" the rows of x are those of a table, as in LEAF's synthetic set.  Files are read
one at a time, and twice: for the labels, and for the examples that are wanted.  LEAF's sets of text
are not covered.
"""

# n examples, H = W pixels

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt
from pathlib import Path
from reprlib import repr as brief  # of nested lists, too
from typing import Any, NamedTuple

import numpy as np

from fedlean.data.declared import NOTHING, Declared
from fedlean.data.labels import classes_of
from fedlean.data.source import READING_BYTES, Room, Source, labels_bytes, unlimited
from fedlean.jsonfile import parse_json, read_bytes

BYTE_TOLERANCE = 1e-3  # in grey levels; LEAF writes byte / 255 with all its digits
ROWS_AT_ONCE = 64  # of a user's examples, as arrays
# Per byte of a file while it is parsed.  Measured with Python 3.11: 11.3 where every number takes
# the 5 bytes of "1.0, ", of which a list keeps 32; 3.2 with all digits.
JSON_BYTES = 12
PARTS = ("train", "test")


def find_leaf(folder: Path) -> dict[str, Path]:
    """{"leaf": folder that holds train/ or test/} when it is in LEAF's layout, else {}."""
    for base in (folder, folder / "data"):
        if any(any(base.glob(f"{part}/*.json")) for part in PARTS):
            return {"leaf": base}
    return {}


def leaf_source(
    name: str, base: Path, room: Room = unlimited, declared: Declared = NOTHING
) -> Source:
    """The data set under `base`: users in sorted order, client ids 0.. over those who train.

    Pixels become bytes when all of them are whole 255ths, else float32.  Raises ValueError naming
    the file and user, or what `room` raises, which is asked before each file.
    """
    parts = [part for part in PARTS if any((base / part).glob("*.json"))]
    if declared.layout not in ("", "nf"):
        raise ValueError(
            f"{base}: --layout {declared.layout} cannot be read from LEAF's JSON, expected nf (a"
            " table) or none (square grey images)"
        )
    split = {part: _Split(base / part, room, bool(declared.layout)) for part in parts}
    some, other = split[parts[0]], split[parts[-1]]
    if some.shape != other.shape:
        raise ValueError(
            f"{base}: got examples of shape {other.shape} for testing, expected {some.shape} as for"
            " training"
        )
    exact = some.exact and other.exact
    labels = [label for each in split.values() for label in each.labels]
    room(
        labels_bytes(len(labels)),
        f"the labels of {len(labels)} examples in {base}",
        "divide the files among the devices",
    )
    class_names, y = _classes(base, labels)
    dtype = np.dtype(np.uint8 if exact else np.float32)
    count = split["train"].count if "train" in split else 0

    def read(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        none = np.empty((0, *some.shape), dtype)
        rows = {"train": train, "test": test}
        x = {part: each.read(rows[part], dtype) for part, each in split.items()}
        return x.get("train", none), x.get("test", none)

    return Source(
        name=name,
        y_train=y[:count],
        y_test=y[count:],
        class_names=class_names,
        clients=split["train"].clients() if "train" in split else None,
        input_shape=some.shape,
        dtype=dtype,
        scale=255.0 if exact else 1.0,
        read=read,
        reading_bytes=READING_BYTES + JSON_BYTES * max(some.largest_bytes, other.largest_bytes),
        room=room,
    )


class _Piece(NamedTuple):
    """The examples of one user in one file, the rows start..start+size-1 of the split."""

    start: int
    size: int
    exact: bool  # all pixels are whole 255ths


class _Split:
    """The training or the test examples, of which the labels were read."""

    def __init__(self, folder: Path, room: Room, table: bool) -> None:
        paths = sorted(folder.glob("*.json"))
        sizes_bytes = [path.stat().st_size for path in paths]
        found: dict[str, list[tuple[Path, list[Any], bool]]] = {}  # user -> by file: labels, exact
        shapes: set[tuple[int, ...]] = set()
        self._values = _rows if table else _pixels
        for path, size_bytes in zip(paths, sizes_bytes, strict=True):
            what = f"reading {path}, {size_bytes / 1e6:.1f} MB,"
            room(JSON_BYTES * size_bytes, what, "spread its users over several files")
            for user, where, x, y in _users(path):
                of_user = [self._examine(where, rows) for _, rows in _batches(x)]
                shapes.update(shape for shape, _ in of_user)
                piece = (path, y, all(exact for _, exact in of_user))
                found.setdefault(user, []).append(piece)
        if not found:
            raise ValueError(
                f"{folder}: got {len(paths)} .json files and no examples, expected at least 1;"
                " run LEAF's preprocess.sh with '-t sample', which writes train and test"
            )
        if len(shapes) > 1:
            raise ValueError(
                f"{folder}: got examples of the shapes {sorted(shapes)}, expected one size"
            )
        self.shape = shapes.pop()
        self.largest_bytes = max(sizes_bytes)
        self.labels: list[Any] = []
        self._counts: list[int] = []  # of each user, users sorted
        self._pieces: dict[Path, dict[str, _Piece]] = {path: {} for path in paths}
        for user in sorted(found):
            before = len(self.labels)
            for path, y, exact in found[user]:
                self._pieces[path][user] = _Piece(len(self.labels), len(y), exact)
                self.labels += y
            self._counts.append(len(self.labels) - before)
        self.count = len(self.labels)
        self.exact = all(each.exact for of in self._pieces.values() for each in of.values())

    def clients(self) -> np.ndarray:
        """int32 (n,): the number of each example's user."""
        return np.repeat(np.arange(len(self._counts), dtype=np.int32), self._counts)

    def read(self, rows: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """The examples `rows`, (len(rows), C, ...); files without any of them are not read."""
        out = np.empty((len(rows), *self.shape), dtype)
        order = np.argsort(rows, kind="stable")
        ascending = rows[order]
        for path, pieces in self._pieces.items():
            places = {
                user: np.searchsorted(ascending, (piece.start, piece.start + piece.size))
                for user, piece in pieces.items()
            }
            if all(low == high for low, high in places.values()):
                continue
            for user, where, x, _ in _users(path):
                piece = pieces.get(user)
                if piece is None or len(x) != piece.size:
                    raise ValueError(f"{where}: the file has changed while it was read")
                low, high = places[user]
                wanted = [x[i] for i in ascending[low:high] - piece.start]
                for start, some in _batches(wanted):
                    values = _stored(self._values(where, some), piece.exact, dtype)
                    out[order[low + start : low + start + len(some)]] = values
        return out

    def _examine(self, where: str, rows: list[Any]) -> tuple[tuple[int, ...], bool]:
        """The shape of the examples, and whether they are images of whole 255ths throughout."""
        x = self._values(where, rows)
        off = np.abs(x * 255 - np.rint(x * 255)).max() if self._values is _pixels else 1.0
        return x.shape[1:], bool(off < BYTE_TOLERANCE)


def _batches(rows: list[Any]) -> Iterator[tuple[int, list[Any]]]:
    """(position, a few rows) so that a user's images are not floats all at once."""
    return (
        (start, rows[start : start + ROWS_AT_ONCE]) for start in range(0, len(rows), ROWS_AT_ONCE)
    )


def _users(path: Path) -> Iterator[tuple[str, str, list[Any], list[Any]]]:
    """(user, name for messages, x, y) of one file, users without examples left out."""
    try:
        # its size is asked for before; its depth does not matter, since what is wrong there is said
        content = parse_json(read_bytes(path, None), finite=False, max_depth=None)
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); fetch it again") from error
    users, counts, data = _parts(path, content)
    for user, count in zip(users, counts, strict=True):
        where = f"{path}: user {user!r:.60}"
        record = data.get(user)
        if not isinstance(record, dict) or not {"x", "y"} <= record.keys():
            raise ValueError(f"{where}: expected an entry in user_data with x and y")
        x, y = record["x"], record["y"]
        if not isinstance(x, list) or not isinstance(y, list) or not len(x) == len(y) == count:
            got = [len(each) if isinstance(each, list) else type(each).__name__ for each in (x, y)]
            raise ValueError(f"{where}: got {got} entries of x and y, expected lists of {count}")
        if y:
            _check_labels(where, y)
            yield user, where, x, y


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


def _numbers(where: str, rows: list[Any]) -> np.ndarray:
    """float64, of whatever shape the lists have."""
    try:
        return np.asarray(rows, dtype=np.float64)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{where}: x is not rows of numbers of one length ({error}); FedLean reads LEAF's"
            " image sets given as pixels, as FEMNIST, and tables; text must be stored as numbers"
        ) from error


def _rows(where: str, rows: list[Any]) -> np.ndarray:
    """float64 (len(rows), columns), finite."""
    x = _numbers(where, rows)
    if x.ndim != 2 or not x.size or not np.isfinite(x).all():
        raise ValueError(f"{where}: x has shape {x.shape}, expected rows of finite numbers")
    return x


def _pixels(where: str, rows: list[Any]) -> np.ndarray:
    """float64 (len(rows), 1, H, W) in 0..1."""
    x = _numbers(where, rows)
    side = isqrt(x.shape[1]) if x.ndim == 2 else 0
    if side == 0 or side * side != x.shape[1]:
        raise ValueError(
            f"{where}: x has shape {x.shape}, expected (examples, side²): square grey images; rows"
            " of a table are read with --layout nf"
        )
    if not (np.isfinite(x).all() and x.min() >= 0 and x.max() <= 1):
        raise ValueError(
            f"{where}: x is in {x.min()}..{x.max()}, expected pixels in 0..1; rows of a table are"
            " read with --layout nf"
        )
    return x.reshape(-1, 1, side, side)


def _stored(x: np.ndarray, exact: bool, dtype: np.dtype) -> np.ndarray:
    """Pixels as the data set keeps them.  exact: all that this user has are whole 255ths."""
    if not exact:
        return x.astype(np.float32)
    levels = np.rint(x * 255).astype(np.uint8)
    return levels if dtype == np.uint8 else levels / np.float32(255)


def _check_labels(where: str, values: list[Any]) -> None:
    for value in values:
        if not isinstance(value, int | float | str):
            raise ValueError(f"{where}: y has {brief(value)}, expected whole numbers or text")


def _classes(base: Path, labels: list[Any]) -> tuple[tuple[str, ...], np.ndarray]:
    """As `classes_of`, which NumPy would give text for a mixture of numbers and text."""
    text = sum(isinstance(label, str) for label in labels)
    if text not in (0, len(labels)):
        raise ValueError(
            f"{base}: y has {text} labels that are text and {len(labels) - text} numbers, expected"
            " one kind"
        )
    try:
        return classes_of(np.array(labels))
    except ValueError as error:
        raise ValueError(f"{base}: y: {error}") from error
