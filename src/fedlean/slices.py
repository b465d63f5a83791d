"""Where the coordinates of a slice lie in the tensor that it was cut from, for the merge.

A slice keeps some ids of every axis.  Its coordinates are named as runs of neighbours in memory
(`fedlean.sums`); an index array of the tensor's size is the last resort, for it costs several times
as much as the addition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np

from fedlean.sums import Runs, add_scaled

Axis = slice | np.ndarray  # of one axis: a slice, or the kept ids (K,)
Index = tuple[Axis, ...]  # one entry per axis


@dataclass(frozen=True)
class Place:
    """The coordinates `ids[0] x ids[1] x ...` of a tensor of shape `whole`; see `place`.

    One that `is_whole` moves nothing anywhere: use the tensor itself.
    """

    ids: tuple[np.ndarray, ...]  # int64, distinct, in the order in which the slice has them
    whole: tuple[int, ...]

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return tuple(ids.size for ids in self.ids)

    @cached_property
    def is_whole(self) -> bool:
        """Whether it is the tensor as it is."""
        return self.shape == self.whole and self._num_runs == 1

    @cached_property
    def where(self) -> tuple[np.ndarray, ...] | tuple[slice, ...]:
        """What NumPy is indexed with: tensor[where] has the slice's shape."""
        if self._num_runs == 1 and all(self.shape):
            return tuple(slice(int(ids[0]), int(ids[0]) + ids.size) for ids in self.ids)
        return np.ix_(*self.ids)

    @cached_property
    def key(self) -> tuple[bytes, ...]:
        """The same for the same coordinates."""
        return tuple(np.packbits(held).tobytes() for held in self.members)

    @cached_property
    def members(self) -> tuple[np.ndarray, ...]:
        """Per axis, bool (side,): which ids are in the slice."""
        return tuple(map(_marked, self.ids, self.whole))

    @cached_property
    def _runs(self) -> tuple[np.ndarray, ...]:
        """Per axis, where in `ids` a stretch of consecutive ones begins, and their number."""
        return tuple(map(_runs, self.ids))

    @property
    def _num_runs(self) -> int:
        return prod(runs.size - 1 for runs in self._runs)

    def add(self, total: np.ndarray, values: np.ndarray, weight: float) -> None:
        """total[where] += weight * values.  total: float64, C-contiguous, of shape `whole`."""
        if values.size:
            add_scaled(total, values, weight, self._in_memory)

    @cached_property
    def _in_memory(self) -> Runs:
        """The runs of the last axis that is cut, with all of the axes after it."""
        last, inner = self._last_cut, prod(self.whole[self._last_cut + 1 :])
        rows = np.zeros((), np.int64)
        for ids, side in zip(self.ids[:last], self.whole[:last], strict=True):
            rows = rows[..., None] * side + ids
        runs = self._runs[last]
        return Runs(
            rows=rows.reshape(-1),
            row_size=self.whole[last] * inner,
            firsts=self.ids[last][runs[:-1]] * inner,
            sizes=(runs[1:] - runs[:-1]) * inner,
        )

    @cached_property
    def _last_cut(self) -> int:
        """The last axis that is not kept as it is; 0 if all are."""
        kept = [
            runs.size == 2 and ids.size == side
            for runs, ids, side in zip(self._runs, self.ids, self.whole, strict=True)
        ]
        return max((axis for axis, same in enumerate(kept) if not same), default=0)


def place(index: Sequence[Axis], whole: tuple[int, ...]) -> Place:
    """Raises ValueError unless it has for each axis a slice or distinct ids of that axis.

    >>> place((slice(0, 2), np.array([3, 0])), (4, 5)).shape
    (2, 2)
    """
    if len(index) != len(whole):
        raise ValueError(f"the index has {len(index)} axes, expected {len(whole)}")
    return Place(tuple(map(_ids, index, whole)), whole)


class Weights:
    """The weight of several slices of one tensor per coordinate, from those of their axes."""

    def __init__(self) -> None:
        self._held: dict[tuple[bytes, ...], tuple[Place, float]] = {}

    def add(self, place: Place, weight: float) -> None:
        _, before = self._held.get(place.key, (place, 0.0))
        self._held[place.key] = (place, before + weight)

    def summed(self) -> np.ndarray:
        """float64, as (n, 1): of each of n chunks of the tensor, in which all coordinates agree.

        Weights are whole numbers, of which float64 has the exact sum in any order.
        """
        places = [place for place, _ in self._held.values()]
        whole, last = places[0].whole, max(place._last_cut for place in places)
        weights = np.array([weight for _, weight in self._held.values()])
        lead = weights[:, None]
        for axis in range(last):
            members = np.stack([place.members[axis] for place in places])
            lead = (lead[:, :, None] * members[:, None, :]).reshape(len(places), -1)
        members = np.stack([place.members[last] for place in places])
        changes = np.flatnonzero((members[:, 1:] != members[:, :-1]).any(axis=0)) + 1
        held = int(np.gcd.reduce(changes, initial=whole[last]))
        return np.einsum("dp,dq->pq", lead, members[:, ::held]).reshape(-1, 1)


def _ids(axis: Axis, side: int) -> np.ndarray:
    if isinstance(axis, slice):
        return np.arange(*axis.indices(side))
    ids = np.asarray(axis)
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError(f"the ids of an axis are {ids.dtype} of shape {ids.shape}, expected (K,)")
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < side:
        raise ValueError(f"ids from {ids.min()} to {ids.max()} leave their axis of length {side}")
    ids = ids.astype(np.int64)
    if np.count_nonzero(_marked(ids, side)) != ids.size:
        raise ValueError(f"{ids.size} ids of an axis of length {side} name one twice")
    return ids


def _marked(ids: np.ndarray, side: int) -> np.ndarray:
    marks = np.zeros(side, bool)
    marks[ids] = True
    return marks


def _runs(ids: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.flatnonzero(ids[1:] - ids[:-1] != 1) + 1, [ids.size]])
