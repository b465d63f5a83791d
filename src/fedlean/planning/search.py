"""The largest setting of a method with which it fits a device: memory grows with what is kept."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

DECADES = 3  # from 0.001 on: of smaller models there is little left


def value_at(place: int) -> float:
    """The numbers of three significant digits from 0.001 to 1, by place: short ones to type.

    >>> [value_at(place) for place in (0, 1, 900, 2699, 2700)]
    [0.001, 0.00101, 0.01, 0.999, 1.0]
    """
    decade, digits = divmod(place, 900)
    return (100 + digits) / 10 ** (DECADES + 2 - decade)


def largest(fits: Callable[[float], bool]) -> float | None:
    """The largest of them that fits, or None; below what fits, everything does.

    >>> largest(lambda x: 100 * x <= 12.3456)
    0.123
    >>> largest(lambda x: True), largest(lambda x: False)
    (1.0, None)
    """
    if fits(1.0):
        return 1.0
    places = range(900 * DECADES + 1)
    found = bisect_left(places, True, key=lambda place: not fits(value_at(place)))
    return value_at(found - 1) if found else None
