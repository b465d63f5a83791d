"""Sums of weighted values in float64, and their means: by the native module, or NumPy without it.

Both round every operation by itself, coordinate by coordinate, and give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

try:
    from fedlean import _native
except ImportError:
    _native = None

PIECE = 1 << 15  # coordinates that are gone through at once: what they take stays in the cache


@dataclass(frozen=True)
class Runs:
    """Coordinates of a tensor: of each of some rows the same stretches of neighbours.

    The tensor falls into rows of `row_size` coordinates, whatever its axes are.  They are gone
    through row by row, and in a row run by run; no coordinate is in it twice.
    """

    rows: np.ndarray  # int64 (R,), numbers of the rows
    row_size: int
    firsts: np.ndarray  # int64 (K,), where in its row a run begins
    sizes: np.ndarray  # int64 (K,)

    @cached_property
    def chunks(self) -> tuple[np.ndarray, int]:
        """The same in chunks of one length: their numbers in the tensor (n,), and that length."""
        length = int(np.gcd.reduce([*self.firsts, *self.sizes], initial=self.row_size))
        of_row = [np.arange(size // length) for size in self.sizes]
        in_row = np.concatenate(of_row) + np.repeat(self.firsts // length, self.sizes // length)
        return (self.rows[:, None] * (self.row_size // length) + in_row).reshape(-1), length


def add_scaled(
    total: np.ndarray, values: np.ndarray, weight: float, runs: Runs | None = None
) -> None:
    """total[runs] += weight * values; without `runs`, of two whole tensors of one shape.

    total: float64, C-contiguous.  values: their coordinates in the order of the runs.
    """
    if not values.size:
        return
    if _native is not None and _suits(values):
        at = runs or Runs(np.array([0]), total.size, np.array([0]), np.array([total.size]))
        _native.add_scaled(total, values, weight, at.rows, at.row_size, at.firsts, at.sizes)
    elif runs is None:
        _add_whole(total.reshape(-1), values.reshape(-1), weight)
    else:
        _add_chunks(total, values, weight, *runs.chunks)


def mean_onto(base: np.ndarray, total: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """total / weights in the type of `base`, and `base` bit for bit where the weight is 0.

    total: float64, C-contiguous, of the shape of `base`.  weights: float64 (n,), those of the n
    chunks of one length into which all coordinates fall.
    """
    merged = np.empty(base.shape, base.dtype)
    if _native is not None and _suits(base):
        _native.mean(total, base, weights, merged)
    else:
        _divide(*(array.reshape(weights.size, -1) for array in (total, base, weights, merged)))
    return merged


def _divide(total: np.ndarray, base: np.ndarray, weights: np.ndarray, merged: np.ndarray) -> None:
    step = max(1, PIECE // total.shape[1])
    for start in range(0, len(weights), step):
        sums, old, weight, new = (
            array[start : start + step] for array in (total, base, weights, merged)
        )
        np.divide(sums, np.where(weight > 0, weight, 1.0), out=new, casting="unsafe")
        untrained = np.flatnonzero(weight <= 0)
        new[untrained] = old[untrained]


def _suits(values: np.ndarray) -> bool:
    """The native module converts and copies nothing."""
    return values.dtype == np.float32 and values.flags.c_contiguous and values.flags.aligned


def _add_whole(total: np.ndarray, values: np.ndarray, weight: float) -> None:
    scaled = np.empty(min(PIECE, total.size))
    for start in range(0, total.size, PIECE):
        sums = total[start : start + PIECE]
        term = scaled[: sums.size]
        np.multiply(values[start : start + PIECE], weight, out=term, dtype=np.float64)
        sums += term


def _add_chunks(
    total: np.ndarray, values: np.ndarray, weight: float, chunks: np.ndarray, length: int
) -> None:
    total, values = total.reshape(-1, length), values.reshape(-1, length)
    if length > PIECE:
        for chunk, value in zip(chunks, values, strict=True):
            _add_whole(total[chunk], value, weight)
        return
    step = max(1, PIECE // length)
    scaled, sums = np.empty((step, length)), np.empty((step, length))
    if length == 1:  # NumPy moves numbers faster than rows of one
        total, values = total.reshape(-1), values.reshape(-1)
        scaled, sums = scaled.reshape(-1), sums.reshape(-1)
    for first in range(0, chunks.size, step):
        at = chunks[first : first + step]
        term, now = scaled[: at.size], sums[: at.size]
        np.multiply(values[first : first + step], weight, out=term, dtype=np.float64)
        # ids are in their axes, and "clip" is the mode in which NumPy writes to `out` at once
        np.take(total, at, axis=0, out=now, mode="clip")
        now += term
        total[at] = now
