"""Exact sums of values and of their squares per channel, from which mean and deviation follow.

Sums of floats depend on their order; these do not, so that clients that add up their own examples
and a server that adds up the clients come to the same bits as one machine that has all of them.
"""

# n examples, C channels

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod, sqrt

import numpy as np

# Every float32 is a whole multiple of 2**-149: |x| < 2**24 units of its last digit, at most.
UNIT_BITS = 149
ELEMENTS_AT_ONCE = 1 << 15  # so that temporary arrays stay below 2 MB
CHANNELS_AT_ONCE = 16
DIGITS, HALF = 24, 12  # of a float32's significand, which is split so that its square is exact
EXPONENTS = 280  # of float32, -148..128, moved to 1..277


@dataclass(frozen=True)
class Moments:
    """Of `count` values in each of C channels.

    totals: Σ x, in units of 2**-149.  squares: Σ x², in units of 2**-298.  One entry per channel.
    """

    count: int
    totals: tuple[int, ...]
    squares: tuple[int, ...]

    def __add__(self, other: Moments) -> Moments:
        """Of both together.  Raises ValueError when they have not the same number of channels."""
        return Moments(
            self.count + other.count,
            tuple(a + b for a, b in zip(self.totals, other.totals, strict=True)),
            tuple(a + b for a, b in zip(self.squares, other.squares, strict=True)),
        )

    def may_lie_in(self, largest: float) -> bool:
        """Whether `count` values of magnitude ≤ largest can have these sums."""
        top = int(largest * 2.0**DIGITS + 1) << UNIT_BITS - DIGITS
        return all(
            total * total <= self.count * square and square <= self.count * top * top
            for total, square in zip(self.totals, self.squares, strict=True)
        )

    def statistics(self, scale: float) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation, float32 (C,) each, of the values divided by `scale`.

        A constant channel gets deviation 1, so that it normalises to 0 and not to NaN.
        """
        mean = [total / (self.count << UNIT_BITS) / scale for total in self.totals]
        std = []
        for total, square in zip(self.totals, self.squares, strict=True):
            spread = self.count * square - total * total
            std.append(sqrt(spread / (self.count**2 << 2 * UNIT_BITS)) / scale if spread else 1.0)
        return np.array(mean, np.float64).astype(np.float32), np.array(std).astype(np.float32)


def moments(x: np.ndarray) -> Moments:
    """Of x (n, C, ...), integers of at most 16 bits or finite float32.

    >>> moments(np.array([[1, 5], [3, 5]], np.uint8)).statistics(1.0)
    (array([2., 5.], dtype=float32), array([1., 1.], dtype=float32))
    """
    totals, squares = [], []
    for channels in _groups(x):
        found = _of_floats(channels) if x.dtype == np.float32 else _of_integers(channels)
        totals += found[0]
        squares += found[1]
    return Moments(x.size // x.shape[1], tuple(totals), tuple(squares))


def _groups(x: np.ndarray) -> Iterator[np.ndarray]:
    return (x[:, c : c + CHANNELS_AT_ONCE] for c in range(0, x.shape[1], CHANNELS_AT_ONCE))


def _chunks(x: np.ndarray) -> Iterator[np.ndarray]:
    """(C, values) of a few examples at a time."""
    at_once = max(1, ELEMENTS_AT_ONCE // prod(x.shape[1:]))
    for start in range(0, len(x), at_once):
        yield np.moveaxis(x[start : start + at_once], 1, 0).reshape(x.shape[1], -1)


def _of_integers(x: np.ndarray) -> tuple[list[int], list[int]]:
    total = square = np.zeros(x.shape[1], np.int64)
    for chunk in _chunks(x):
        wide = chunk.astype(np.int64)
        total, square = total + wide.sum(1), square + (wide * wide).sum(1)
    return (
        [int(value) << UNIT_BITS for value in total],
        [int(value) << 2 * UNIT_BITS for value in square],
    )


def _of_floats(x: np.ndarray) -> tuple[list[int], list[int]]:
    """x = m · 2**(e - 24) with a whole m = a · 2**12 + b; m, a², ab and b² are added up by e.

    All of them stay below 2**25, and `bincount` adds in float64: exactly, up to 2**28 at a time.
    """
    channels = x.shape[1]
    sums = np.zeros((4, channels * EXPONENTS), np.int64)
    offset = (np.arange(channels) * EXPONENTS + UNIT_BITS)[:, None]
    for chunk in _chunks(x):
        fraction, exponent = np.frexp(chunk)
        m = np.ldexp(fraction, DIGITS).astype(np.int64)
        where = (exponent + offset).ravel()
        a, b = m >> HALF, m & ((1 << HALF) - 1)
        for each, values in zip(sums, (m, a * a, a * b, b * b), strict=True):
            each += np.bincount(where, values.ravel(), len(each)).astype(np.int64)
    totals, squares = [0] * channels, [0] * channels
    for place in np.flatnonzero(sums.any(0)).tolist():
        channel, e = divmod(place, EXPONENTS)
        m, aa, ab, bb = (int(value) for value in sums[:, place])
        # e - 149 is the exponent: 2**(e - 149 - 24) in units of 2**-149 is 2**(e - 24)
        totals[channel] += _shifted(m, e - DIGITS)
        whole = (aa << 2 * HALF) + (ab << HALF + 1) + bb
        squares[channel] += _shifted(whole, 2 * (e - DIGITS))
    return totals, squares


def _shifted(value: int, bits: int) -> int:
    """value · 2**bits, which is whole: of a subnormal number the last digits are 0."""
    return value << bits if bits >= 0 else value >> -bits
