"""Pruning in steps over the first half of a run.

Iterative pruning as a baseline of Jiang et al. (PruneFL), arXiv 1909.12326: equal steps over the
first half of the rounds.
"""

from __future__ import annotations

from typing import Literal

from fedlean.pruning.budget import density_limit

Spacing = Literal["linear", "geometric"]


def steps_in_first_half(rounds: int, every: int) -> int:
    """How many steps, one after each `every` rounds, the first half of `rounds` has room for.

    >>> steps_in_first_half(100, 20), steps_in_first_half(100, 51)
    (2, 0)
    """
    if every < 1:
        raise ValueError(f"every must be at least 1 round, got {every}")
    return rounds // 2 // every


def density_after(step: int, steps: int, final: float, spacing: Spacing) -> float:
    """Density after `step` of `steps`: 1 at step 0, `final` at the last.

    linear: every step drops the same share of all weights, d(s) = 1 - (1 - d) · s / S
    geometric: every step drops the same share of those left, d(s) = d^(s / S)

    >>> density_after(1, 2, 0.25, "linear"), density_after(1, 2, 0.25, "geometric")
    (0.625, 0.5)
    """
    if steps < 1 or not 0 <= step <= steps:
        raise ValueError(f"step must be in [0, steps] and steps >= 1, got {step} of {steps}")
    if spacing == "linear":
        return density_limit(step, steps, 1.0, final)
    return final ** (step / steps)
