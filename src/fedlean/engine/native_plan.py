"""Where the native engine's arrays lie: a model of `native/src/plan.cpp`."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

LINE_FLOATS = 16  # arrays start at cache lines


@dataclass
class _Array:
    floats: int
    first: int  # time
    last: int
    offset: int = 0


class Plan:
    """Arrays with the first and last time at which they are needed; `floats` once placed."""

    def __init__(self) -> None:
        self._arrays: list[_Array] = []
        self.floats = 0

    def add(self, floats: int, first: int, last: int) -> int:
        self._arrays.append(_Array(lines(floats), first, last))
        return len(self._arrays) - 1

    def extend(self, array: int, first: int, last: int) -> None:
        entry = self._arrays[array]
        entry.first, entry.last = min(entry.first, first), max(entry.last, last)

    def place(self) -> None:
        """The largest first, each at the lowest offset that is free during its whole life."""
        placed: list[_Array] = []  # by offset
        for array in sorted(self._arrays, key=lambda array: -array.floats):
            if not array.floats:
                break
            at = 0
            for other in placed:
                if other.last < array.first or array.last < other.first:
                    continue
                if at + array.floats <= other.offset:
                    break
                at = max(at, other.offset + other.floats)
            array.offset = at
            self.floats = max(self.floats, at + array.floats)
            placed.insert(bisect_right(placed, at, key=lambda other: other.offset), array)


def lines(floats: int) -> int:
    """Rounded up to whole cache lines."""
    return -(-floats // LINE_FLOATS) * LINE_FLOATS
