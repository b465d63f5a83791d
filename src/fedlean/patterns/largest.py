"""A deterministic top-k: the same choice on every machine, ties included."""

from __future__ import annotations

from math import isqrt

import numpy as np

LONG, SAMPLE = 1 << 18, 1 << 14  # a sample pays from LONG values on; measured on AVX-512


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """True at the `count` largest of `values` (n,), shape (n,); of equal values the first win.

    A selection, not a sort: O(n).  `values` must hold no NaN.

    >>> largest(np.array([2.0, 5.0, 2.0, 1.0]), 2)
    array([ True,  True, False, False])
    """
    if count <= 0:
        return np.zeros(len(values), dtype=bool)
    if count >= len(values):
        return np.ones(len(values), dtype=bool)
    at = len(values) - count
    cut = _at(values, at)
    chosen = values > cut
    # np.argpartition would leave the choice among ties to the sorting network of the CPU.
    missing = count - np.count_nonzero(chosen)
    chosen[np.flatnonzero(values == cut)[:missing]] = True
    return chosen


def _at(values: np.ndarray, at: int) -> np.floating:
    """np.partition(values, at)[at], of long vectors from the few between two values of a sample."""
    n = len(values)
    if n >= LONG:
        sample = np.sort(values[:: n // SAMPLE])
        centre, margin = at * len(sample) // n, 4 * isqrt(len(sample))
        low = sample[max(centre - margin, 0)]
        high = sample[min(centre + margin, len(sample) - 1)]
        between = values[np.flatnonzero((values >= low) & (values <= high))]
        behind = at - np.count_nonzero(values < low)
        if 0 <= behind < len(between):  # else the sample misled: all of it, then
            return np.partition(between, behind)[behind]
    return np.partition(values, at)[at]
