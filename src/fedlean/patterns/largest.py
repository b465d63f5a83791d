"""A deterministic top-k: the same choice on every machine, ties included."""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt

import numpy as np

LONG, SAMPLE = 1 << 18, 1 << 14  # a sample pays from LONG values on; measured on AVX-512
BLOCK = 1 << 15  # values; what is computed of them stays in the cache of a core


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


def smallest_magnitudes(values: np.ndarray, count: int, among: np.ndarray) -> np.ndarray:
    """True at the `count` smallest |values| of those `among`; of equal ones the first win.

    values: any shape, no NaN; among: bool, its shape, which is that of the result.  Block by
    block: what is computed on the way does not leave the cache.

    >>> among = np.array([True, True, True, False])
    >>> smallest_magnitudes(np.array([3.0, -1.0, 2.0, 0.0]), 2, among)
    array([False,  True,  True, False])
    """
    flat, used = values.ravel(), among.ravel()
    size = int(np.count_nonzero(used))
    if count <= 0:
        return np.zeros(values.shape, dtype=bool)
    if count >= size:
        return among.copy()
    cut, below = _magnitude_at(flat, used, count - 1, size)
    ties, chosen = count - below, np.empty(flat.shape, dtype=bool)
    for at in blocks(len(flat)):
        sizes = np.abs(flat[at])
        np.less(sizes, cut, out=chosen[at])
        equal = sizes == cut
        if ties and equal.any():
            first = np.flatnonzero(equal & used[at])[:ties]
            chosen[at][first] = True
            ties -= len(first)
        chosen[at] &= used[at]
    return chosen.reshape(values.shape)


def blocks(n: int) -> Iterator[slice]:
    """Of BLOCK positions each, the last one shorter.

    >>> list(blocks(3))
    [slice(0, 3, None)]
    """
    return (slice(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK))


def _at(values: np.ndarray, at: int) -> np.floating:
    """np.partition(values, at)[at], of long vectors from the few between two values of a sample."""
    n = len(values)
    if n >= LONG:
        low, high = _around(values[_spread(n)], at, n)
        between = values[np.flatnonzero((values >= low) & (values <= high))]
        behind = at - np.count_nonzero(values < low)
        if 0 <= behind < len(between):  # else the sample misled: all of it, then
            return np.partition(between, behind)[behind]
    return np.partition(values, at)[at]


def _magnitude_at(
    values: np.ndarray, used: np.ndarray, at: int, size: int
) -> tuple[np.floating, int]:
    """`_at` of the `size` |values| in use, and how many of them are below it."""
    places = _spread(len(values)) if size >= LONG else np.zeros(0, np.intp)
    sample = np.abs(values[places[used[places]]])
    if len(sample):
        low, high = _around(sample, at, size)
        below, pieces = 0, []
        for block in blocks(len(values)):
            sizes = np.abs(values[block])
            under = (sizes < low) & used[block]
            below += int(np.count_nonzero(under))
            inside = ((sizes <= high) & used[block]) ^ under
            pieces.append(sizes[np.flatnonzero(inside)])
        between = np.concatenate(pieces)
        if 0 <= at - below < len(between):
            cut = np.partition(between, at - below)[at - below]
            return cut, below + int(np.count_nonzero(between < cut))
    sizes = np.abs(values[np.flatnonzero(used)])
    cut = np.partition(sizes, at)[at]
    return cut, int(np.count_nonzero(sizes < cut))


def _spread(n: int) -> np.ndarray:
    """SAMPLE positions below n; a plain stride may meet the same columns of a matrix only."""
    golden = (5**0.5 - 1) / 2
    return (np.arange(SAMPLE) * golden % 1 * n).astype(np.intp)


def _around(sample: np.ndarray, at: int, n: int) -> tuple[np.floating, np.floating]:
    """Two values of a sample of n that very likely have the one in sorted position `at` between."""
    ordered = np.sort(sample)
    centre, margin = at * len(ordered) // n, 4 * isqrt(len(ordered))
    return ordered[max(centre - margin, 0)], ordered[min(centre + margin, len(ordered) - 1)]
