"""`Source`: a data set whose labels are known and whose examples are still in their files.

So a device learns which examples are its own before it reads one, and then keeps only these: what
is read and not wanted passes by in blocks.  Loaders (`idx`, `npz`, `leaf` and others) make sources.
"""

# n training and m test examples, C channels or columns, k rows of a block

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod

import numpy as np

from fedlean.data.dataset import Dataset

# Of training and test examples, int64 positions each: their values (., C, ...), in that order.
Read = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
# Is told what will be in memory at once: how many bytes, for what, and what to do where they do not
# fit; raises ValueError in that case.
Room = Callable[[int, str, str], None]

BLOCK_BYTES = 1 << 18  # read at a time
READING_BYTES = 2_000_000  # blocks, inflated and not, and what NumPy copies of them
LABEL_BYTES = 64  # per example: classes and client ids, and dealing the examples out
SMALLER_SHARE = "give this device a smaller share (--client I/N with a larger N)"


def unlimited(needed_bytes: int, what: str, remedy: str) -> None:
    """The `Room` of a process without a memory limit."""


@dataclass(frozen=True, eq=False)
class Source:
    """What is known of a data set before its examples are read.

    y_train, y_test: int64 (n,), (m,), numbers of class_names.  clients: int32 (n,), or None.
    input_shape: (C,), (C, L) or (C, H, W); dtype: as the examples will be kept; scale: the value
    that counts as 1.0.  reading_bytes: what `read` takes beside its result.  notes: lines for the
    user.
    """

    name: str
    y_train: np.ndarray
    y_test: np.ndarray
    class_names: tuple[str, ...]
    clients: np.ndarray | None
    input_shape: tuple[int, ...]
    dtype: np.dtype
    scale: float
    read: Read
    reading_bytes: int = READING_BYTES
    room: Room = unlimited
    notes: tuple[str, ...] = ()
    value_range: tuple[float, float] | None = None  # declared, of a source without examples

    def dataset(self) -> Dataset:
        """All of it.  Raises ValueError naming what is damaged or does not fit."""
        x_train, x_test = self.read(np.arange(len(self.y_train)), np.arange(len(self.y_test)))
        return Dataset.from_images(
            self.name,
            (x_train, self.y_train),
            (x_test, self.y_test),
            classes=len(self.class_names),
            scale=self.scale,
            class_names=self.class_names,
            clients=self.clients,
            notes=self.notes,
            declared_range=self.value_range,
        )

    def share(self, indices: np.ndarray) -> Dataset:
        """The training examples `indices`, ascending, and no test examples, as a device holds them.

        Mean 0 and deviation 1: a device normalises with its federation's.  Raises ValueError before
        an example is read where they do not fit, and as `dataset`.
        """
        needed_bytes = len(indices) * prod(self.input_shape) * self.dtype.itemsize
        self.room(
            needed_bytes + self.reading_bytes,
            f"loading {len(indices)} of {len(self.y_train)} examples of {self.name!r}",
            SMALLER_SHARE,
        )
        x_train, x_test = self.read(indices, np.empty(0, np.int64))
        channels = self.input_shape[0]
        return Dataset(
            self.name,
            x_train,
            self.y_train[indices],
            x_test,
            np.empty(0, np.int64),
            len(self.class_names),
            np.zeros(channels, np.float32),
            np.ones(channels, np.float32),
            self.scale,
            self.class_names,
            None if self.clients is None else self.clients[indices],
        )


def in_memory(dataset: Dataset, room: Room = unlimited) -> Source:
    """A source of what was read already."""
    return Source(
        name=dataset.name,
        y_train=dataset.y_train,
        y_test=dataset.y_test,
        class_names=dataset.class_names,
        clients=dataset.clients,
        input_shape=dataset.input_shape,
        dtype=dataset.x_train.dtype,
        scale=dataset.scale,
        read=lambda train, test: (dataset.x_train[train], dataset.x_test[test]),
        room=room,
        notes=dataset.notes,
    )


def labels_bytes(count: int, stored_bytes: int = 0) -> int:
    """What reading the labels of `count` examples takes, and dealing these out to clients.

    stored_bytes: of all the label arrays as the files hold them.
    """
    return READING_BYTES + LABEL_BYTES * count + 3 * stored_bytes


def rows_at_once(row_bytes: int) -> int:
    """How many rows make a block: at least one."""
    return max(1, BLOCK_BYTES // row_bytes)


def take(blocks: Iterable[np.ndarray], rows: np.ndarray, out: np.ndarray) -> None:
    """Sets out[i] to row rows[i] of what the blocks (k, ...) hold end to end.

    rows: int64 (len(out),), in any order.  All blocks are read, so that a checksum at the end of
    their file is compared.  Floats too large for `out` become infinite, which `Dataset` refuses.
    """
    order = np.argsort(rows, kind="stable")
    ascending = rows[order]
    start = 0
    for block in blocks:
        low, high = np.searchsorted(ascending, (start, start + len(block)))
        with np.errstate(over="ignore"):
            out[order[low:high]] = block[ascending[low:high] - start]
        start += len(block)
