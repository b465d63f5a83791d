"""A number of a device: given, or drawn for each device once or anew every round."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fedlean.core import generator

ROUND, ONCE = "round", "once"  # how often a number is drawn


@dataclass(frozen=True)
class Quantity:
    """`numbers`: the one that was given, or what the distribution `drawn` is of."""

    numbers: tuple[float, ...]
    drawn: str | None = None  # a name in DISTRIBUTIONS
    redrawn: str = ROUND

    def value(self, seed: int, step: int, device: int, name: str) -> float:
        """The number of one device at one step; `name` keeps its quantities apart."""
        if self.drawn is None:
            return self.numbers[0]
        when = 0 if self.redrawn == ONCE else step
        uniform = float(generator(seed, when, device, f"fleet {name}").random())
        return DISTRIBUTIONS[self.drawn].at(self.numbers, uniform)


class Distribution(NamedTuple):
    """at: the value of a share in [0, 1) of the distribution; expected: its numbers in words."""

    at: Callable[[Sequence[float], float], float]
    expected: str


def _uniform(numbers: Sequence[float], share: float) -> float:
    low, high = numbers
    return low + (high - low) * share


def _loguniform(numbers: Sequence[float], share: float) -> float:
    low, high = numbers
    return low * (high / low) ** share


def _choice(numbers: Sequence[float], share: float) -> float:
    return numbers[int(share * len(numbers))]


DISTRIBUTIONS: Mapping[str, Distribution] = {
    "uniform": Distribution(_uniform, "[lowest, highest]"),
    "loguniform": Distribution(_loguniform, "[lowest, highest]"),
    "choice": Distribution(_choice, "a list of values, all equally likely"),
}


@dataclass(frozen=True)
class Bounds:
    """What a quantity may be."""

    unit: str
    least: float
    most: float

    def check(self, value: Any) -> float:
        """`value` as a number.  Raises ValueError saying what was expected."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not self.least <= value <= self.most:  # a NaN fails, too
            raise ValueError(f"is {value!r:.60}, expected {self}")
        return float(value)

    def __str__(self) -> str:
        return f"{self.unit} from {self.least:g} to {self.most:g}"


def quantity_from(value: Any, bounds: Bounds) -> Quantity:
    """A number, or a table with one distribution and perhaps `redrawn`.

    Raises ValueError with the rest of a sentence that begins with the quantity's name.
    """
    if not isinstance(value, Mapping):
        return Quantity((bounds.check(value),))
    given = {key: entry for key, entry in value.items() if key != "redrawn"}
    if len(given) != 1 or not given.keys() <= DISTRIBUTIONS.keys():
        raise ValueError(
            f"has the keys {', '.join(map(str, value)) or 'none'}, expected one of "
            f"{', '.join(DISTRIBUTIONS)}, and perhaps redrawn"
        )
    ((drawn, numbers),) = given.items()
    redrawn = value.get("redrawn", ROUND)
    if redrawn not in (ROUND, ONCE):
        raise ValueError(f'has redrawn = {redrawn!r:.60}, expected "{ROUND}" or "{ONCE}"')
    return Quantity(_numbers(drawn, numbers, bounds), drawn, redrawn)


def _numbers(drawn: str, numbers: Any, bounds: Bounds) -> tuple[float, ...]:
    expected = f"{DISTRIBUTIONS[drawn].expected}, each {bounds}"
    if not isinstance(numbers, list) or not numbers:
        raise ValueError(f"has {drawn} = {numbers!r:.60}, expected {expected}")
    try:
        checked = tuple(map(bounds.check, numbers))
    except ValueError:
        raise ValueError(f"has {drawn} = {numbers!r:.60}, expected {expected}") from None
    if drawn == "choice":
        return checked
    ordered = len(checked) == 2 and checked[0] <= checked[1]
    if not ordered or (drawn == "loguniform" and not checked[0] > 0):
        more = ", the lowest above 0" if drawn == "loguniform" else ""
        raise ValueError(f"has {drawn} = {numbers!r:.60}, expected {expected}{more}")
    return checked


def from_text(text: str, bounds: Bounds) -> Quantity:
    """A number as a CSV file has it.  Raises ValueError as `quantity_from`."""
    try:
        return Quantity((bounds.check(float(text)),))
    except (ValueError, OverflowError):
        raise ValueError(f"is {text!r:.60}, expected {bounds}") from None
