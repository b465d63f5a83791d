"""Where the native engine's arrays lie: a model of `native/src/plan.cpp`."""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence

LINE_FLOATS = 16  # arrays start at cache lines

Array = tuple[int, int, int]  # floats in whole cache lines, first and last time that it is needed


class Arrays:
    """Arrays whose lives may still grow."""

    def __init__(self) -> None:
        self._arrays: list[Array] = []

    def add(self, floats: int, first: int, last: int) -> int:
        self._arrays.append((lines(floats), first, last))
        return len(self._arrays) - 1

    def extend(self, array: int, first: int, last: int) -> None:
        floats, begins, ends = self._arrays[array]
        self._arrays[array] = (floats, min(begins, first), max(ends, last))

    def all(self) -> tuple[Array, ...]:
        """In the order in which they were added."""
        return tuple(self._arrays)


def placed_floats(arrays: Sequence[Array]) -> int:
    """What they take together where arrays whose lives do not meet share memory.

    The largest first, of equals the first, each at the lowest offset that is free during its whole
    life.

    >>> placed_floats([(16, 0, 1), (32, 1, 2), (16, 2, 3)])
    48
    """
    most, placed = 0, list[tuple[int, int, int, int]]()  # by offset, with the end behind it
    for floats, first, last in sorted(arrays, key=lambda array: -array[0]):
        if not floats:
            break
        at = 0
        for offset, end, begins, ends in placed:
            if ends < first or last < begins:
                continue
            if at + floats <= offset:
                break
            if end > at:
                at = end
        most = max(most, at + floats)
        insort(placed, (at, at + floats, first, last))
    return most


def lines(floats: int) -> int:
    """Rounded up to whole cache lines."""
    return -(-floats // LINE_FLOATS) * LINE_FLOATS
