"""The learning rate over the rounds of a run.

A schedule is text, so that it travels in a configuration and on a command line: "constant",
"cosine:ROUNDS" or "step:ROUNDS:FACTOR".  It names its own number of rounds, so that a run which is
extended later keeps the rates that it had.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, isfinite, pi

from fedlean.train.hyperparameters import at_least, in_range

LEAST_SHARE = 1e-9  # of η: a rate of 0 trains nothing, which nobody asked for
FORMS = "constant, cosine:ROUNDS or step:ROUNDS:FACTOR"


@dataclass(frozen=True)
class Schedule:
    """lr: η before anything is done to it.

    half_life_rounds: η halves in so many rounds; 0: it does not.
    shape: "constant"; "cosine:T": η·(1 + cos(π·t/T))/2 after t < T rounds (Loshchilov and Hutter,
    arXiv 1608.03983, eq. 5, without restarts), then what the last of them had; "step:T:f":
    η·f^⌊t/T⌋.
    warmup_rounds: in the first so many, round t (from 0) has the share (t + 1)/(warmup_rounds + 1).
    """

    lr: float
    half_life_rounds: float = 0.0
    shape: str = "constant"
    warmup_rounds: int = 0

    def check(self) -> None:
        """Raises ValueError naming the setting that is out of range."""
        in_range("lr", self.lr, 0.0, 100.0, open_low=True)
        in_range("lr_half_life_rounds", self.half_life_rounds, 0.0, 1e12)
        at_least("lr_warmup_rounds", self.warmup_rounds, 0)
        _share(self.shape, 0)

    def rate(self, rounds_done: int) -> float:
        """η in the round after so many.

        >>> Schedule(0.1, half_life_rounds=10000).rate(10000)
        0.05
        >>> [Schedule(0.8, shape="step:2:0.5").rate(done) for done in range(5)]
        [0.8, 0.8, 0.4, 0.4, 0.2]
        """
        rate = self.lr
        if self.half_life_rounds:
            rate *= 0.5 ** (rounds_done / self.half_life_rounds)
        if self.shape != "constant":
            rate *= max(LEAST_SHARE, _share(self.shape, rounds_done))
        if rounds_done < self.warmup_rounds:
            rate *= (rounds_done + 1) / (self.warmup_rounds + 1)
        return rate


def _share(shape: str, done: int) -> float:
    """Of η, after so many rounds.  Raises ValueError for a shape that is none."""
    name, *numbers = shape.split(":")
    if name == "constant" and not numbers:
        return 1.0
    if name == "cosine" and len(numbers) == 1:
        rounds = _rounds(numbers[0], shape)
        return (1 + cos(pi * min(done, rounds - 1) / rounds)) / 2
    if name == "step" and len(numbers) == 2:
        return _factor(numbers[1], shape) ** (done // _rounds(numbers[0], shape))
    raise ValueError(f"lr_schedule must be {FORMS}, got {shape!r:.60}")


def _rounds(text: str, shape: str) -> int:
    if text.isascii() and text.isdigit() and 1 <= len(text) <= 9 and int(text) >= 1:
        return int(text)
    raise ValueError(
        f"lr_schedule must have a whole number of rounds of 1 or more, got {shape!r:.60}"
    )


def _factor(text: str, shape: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if 0 < value <= 1 and isfinite(value):
        return value
    raise ValueError(f"lr_schedule must have a factor in (0, 1], got {shape!r:.60}")
