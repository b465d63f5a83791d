"""From stored rows, which a loader knows how to read, to a `Source`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedlean.data.columns import Columns
from fedlean.data.source import Room, Source

Fill = Callable[[np.ndarray, np.ndarray], None]  # (rows of the file, out): out[i] = row rows[i]


@dataclass(frozen=True, eq=False)
class Rows:
    """The examples of a file, not read yet, and how they will be kept.

    shape: (C, ...) of one; scale: the stored value that counts as 1.0; reading_bytes: what `fill`
    takes beside its result.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    scale: float
    reading_bytes: int
    fill: Fill


def rows_source(
    name: str, columns: Columns, train: Rows | None, test: Rows | None, room: Room
) -> Source:
    """The set whose training examples are in one file and its test examples in another or the same.

    One of the two may be missing.  Raises ValueError when they do not go together.
    """
    some = train or test
    if some is None:
        raise ValueError("got neither training nor test examples, expected some of either")
    both = [each for each in (train, test) if each is not None]
    for field in ("shape", "dtype"):
        found = [getattr(each, field) for each in both]
        if found[0] != found[-1]:
            raise ValueError(
                f"test examples have {field} {found[-1]}, expected {found[0]} as in training;"
                " store both alike"
            )

    def read(wanted: np.ndarray, tested: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = columns.train[wanted], columns.test[tested]
        x = np.empty((len(rows[0]) + len(rows[1]), *some.shape), some.dtype)
        if train is test:  # in one pass
            some.fill(np.concatenate(rows), x)
        else:
            parts = np.split(x, [len(rows[0])])
            for each, of_part, out in zip((train, test), rows, parts, strict=True):
                if each is not None and len(of_part):
                    each.fill(of_part, out)
        return x[: len(rows[0])], x[len(rows[0]) :]

    return Source(
        name=name,
        y_train=columns.y_train,
        y_test=columns.y_test,
        class_names=columns.class_names,
        clients=columns.clients,
        input_shape=some.shape,
        dtype=some.dtype,
        scale=some.scale,
        read=read,
        reading_bytes=max(each.reading_bytes for each in both),
        room=room,
        notes=columns.notes,
    )
