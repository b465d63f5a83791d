"""Sub-models from the largest to the smallest, and the largest of them that a device can hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from fedlean.algorithm import Device
from fedlean.core import Work, generator
from fedlean.cost.profile import Profile
from fedlean.submodels.cut import Cut
from fedlean.submodels.needs import Needs

Assign = Literal["memory", "fixed", "drawn"]


@dataclass(frozen=True)
class Levels:
    """`names` say which one a task is of; the memory that each needs is to the byte what the native
    engine plans for it.  `profile`: of devices that have none of their own."""

    names: tuple[str, ...]
    cuts: tuple[Cut, ...]
    needs: tuple[Needs, ...]
    profile: Profile

    def fitting(self, device: Device) -> int:
        """The first within the device's limits of the round; the last where none is.

        A limit that is not known is none.  A device that cannot hold the last is found out before
        the task is sent (`runtime.step`), with what it lacks.
        """
        return fitting(self.needs, device, self.profile)

    def given(self, assign: Assign, device: Device, *, seed: int, round: int) -> int:
        """Which one the device gets in a round (`assigned`)."""
        return assigned(assign, self.needs, device, profile=self.profile, seed=seed, round=round)

    def common(self, devices: Sequence[Device]) -> int:
        """The first that all of `devices` can hold; the last where none is."""
        return max((self.fitting(device) for device in devices), default=0)

    def cut(self, name: str) -> Cut:
        return self.cuts[self.names.index(name)]


def fitting(needs: Sequence[Needs], device: Device, profile: Profile) -> int:
    """Which of the levels, of the largest model first, is the first within the device's limits.

    Where none is, the one that needs the least memory.  That need not fall from level to level: a
    pruned layer may take more than a whole one, by its indices.  `profile`: of a device that has
    none of its own.
    """
    for at, need in enumerate(needs):
        if need.within(device, profile):
            return at
    return min(range(len(needs)), key=lambda at: (needs[at].memory_bytes, -at))


def assigned(
    assign: Assign,
    needs: Sequence[Needs],
    device: Device,
    *,
    profile: Profile,
    seed: int,
    round: int,
) -> int:
    """Which of the levels, of the largest model first, the device gets in a round.

    "memory": `fitting`.  "fixed": client i, level i modulo their number.  "drawn": any level, anew
    each round, by the run's `seed`.
    """
    if assign == "memory":
        return fitting(needs, device, profile)
    if assign == "fixed":
        return device.id % len(needs)
    return int(generator(seed, round, device.id, "level").integers(len(needs)))


def levels(cuts: Sequence[tuple[str, Cut, Sequence[Work]]], profile: Profile) -> Levels:
    """Of named cuts, largest first, each with the works that a client does on it.

    profile: of devices that have none of their own.  Raises ValueError where a later cut needs more
    memory than one before it.
    """
    names, kept = tuple(name for name, _, _ in cuts), tuple(cut for _, cut, _ in cuts)
    needs = tuple(Needs(cut.spec, tuple(works)) for _, cut, works in cuts)
    held = [need.memory_bytes for need in needs]
    for (before, name), (more, less) in zip(pairwise(names), pairwise(held), strict=True):
        if less > more:
            raise ValueError(
                f"sub-models go from the largest to the smallest, but {name} needs {less} bytes "
                f"and {before} before it {more}"
            )
    return Levels(names, kept, needs, profile)


def rates_from(text: str, setting: str = "widths") -> tuple[float, ...]:
    """Rates as the setting `widths` has them: "1 0.5 0.25", descending, each in (0, 1].

    Raises ValueError naming the `setting` that has none of these.

    >>> rates_from("1 0.5, 0.25")
    (1.0, 0.5, 0.25)
    """
    try:
        rates = tuple(float(word) for word in text.replace(",", " ").split())
    except ValueError:
        rates = ()
    descending = all(a > b for a, b in pairwise(rates))
    if not rates or not descending or not 0 < rates[-1] <= rates[0] <= 1:
        raise ValueError(
            f"{setting} must be numbers in (0, 1] from the largest to the smallest, as "
            f"'1 0.5 0.25', got {text!r:.60}"
        )
    return rates
