"""Sub-models from the largest to the smallest, and the largest of them that a device can hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from fedlean.algorithm import Device
from fedlean.core import Work
from fedlean.cost.way import peak_memory_bytes
from fedlean.submodels.cut import Cut


@dataclass(frozen=True)
class Levels:
    """`names` say which one a task is of; what each needs is to the byte what the native engine
    plans for it."""

    names: tuple[str, ...]
    cuts: tuple[Cut, ...]
    needs_bytes: tuple[int, ...]

    def fitting(self, device: Device) -> int:
        """The first that the device can hold; the last where none is small enough.

        A device whose memory is not known takes the first.  One that cannot hold the last is found
        out before the task is sent (`runtime.step`), with what it lacks.
        """
        if device.memory_bytes is None:
            return 0
        fits = (at for at, need in enumerate(self.needs_bytes) if need <= device.memory_bytes)
        return next(fits, len(self.names) - 1)

    def common(self, devices: Sequence[Device]) -> int:
        """The first that all of `devices` can hold; the last where none is."""
        return max((self.fitting(device) for device in devices), default=0)

    def cut(self, name: str) -> Cut:
        return self.cuts[self.names.index(name)]


def levels(cuts: Sequence[tuple[str, Cut, Work]]) -> Levels:
    """Of named cuts, largest first, each with the work that a client does on it.

    Raises ValueError where a later one needs more memory than one before it.
    """
    names, kept = tuple(name for name, _, _ in cuts), tuple(cut for _, cut, _ in cuts)
    needs = tuple(peak_memory_bytes(cut.spec, [work]) for _, cut, work in cuts)
    for (before, name), (more, less) in zip(pairwise(names), pairwise(needs), strict=True):
        if less > more:
            raise ValueError(
                f"sub-models go from the largest to the smallest, but {name} needs {less} bytes "
                f"and {before} before it {more}"
            )
    return Levels(names, kept, needs)


def rates_from(text: str) -> tuple[float, ...]:
    """Width rates as the setting `widths` has them: "1 0.5 0.25", descending, each in (0, 1].

    Raises ValueError naming what is none of these.

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
            f"widths must be numbers in (0, 1] from the largest to the smallest, as '1 0.5 0.25', "
            f"got {text!r:.60}"
        )
    return rates
