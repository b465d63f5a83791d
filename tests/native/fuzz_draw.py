"""What the fuzz of the engine draws from, and what calls may do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")
EDGES = [-(2**31), -1, 0, 1, 2, 3, 4, 5, 7, 16, 17, 255, 1023, 1024, 1025, 4097, 65535, 65536]
EDGES += [2**20, 2**27 - 1, 2**27, 2**28, 2**29, 2**30, 2**31 - 2, 2**31 - 1, 2**31, 2**32 + 1]
FLOATS = [0.0, -0.0, 1e-45, 1e-30, 1e-5, 0.5, 1.0, 2.0, 1e30, 1e300, -1.0, float("nan"), -1e-320]
REFUSALS = (ValueError, TypeError, MemoryError)
MOST_BYTES = 1 << 24  # of a session that is really built
SEEN: Counter[str] = Counter()  # outcomes, to show that cases get to where faults would be


def attempt(what: str, call: Callable[[], Any]) -> Any:
    """What the call returns; None where it refuses."""
    try:
        result = call()
    except REFUSALS:
        SEEN[f"{what}: refused"] += 1
        return None
    SEEN[f"{what}: done"] += 1
    return result


class Draw:
    """Numbers of one case."""

    def __init__(self, case: int):
        self.arrays = np.random.default_rng(case)

    def chance(self, of_one: float) -> bool:
        return bool(self.arrays.random() < of_one)

    def between(self, low: int, high: int) -> int:
        """Both included."""
        return int(self.arrays.integers(low, high + 1))

    def one(self, items: Sequence[T]) -> T:
        return items[self.between(0, len(items) - 1)]

    def some(self, items: Sequence[T], count: int) -> list[T]:
        return [items[i] for i in self.arrays.permutation(len(items))[:count]]

    def wild(self, usual: int, of_one: float = 0.1) -> int:
        """`usual`, or now and then an extreme."""
        return self.one(EDGES) if self.chance(of_one) else usual

    def side(self, most: int) -> int:
        return self.wild(self.between(1, most), 0.04)
