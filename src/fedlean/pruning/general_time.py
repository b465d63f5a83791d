"""Which coordinates repay their time when time is not linear: PruneFL's Algorithm 3, reconstructed.

Jiang et al., arXiv 1909.12326 (see `empirical_risk`): maximise eq. (7) for a monotone T.  Theorem 3
promises a local optimum with respect to one-element moves; the paper's pseudo-code is not known to
us.  All of the search here is OURS: T depends on how many coordinates each tensor keeps, so of any
n in a tensor the n largest g² are best, and the search is over one count per tensor, with moves of
±2^k.  It ends only where no move of one element helps, which is what Theorem 3 promises, and where
T is linear such a point is the global optimum of Algorithm 2.  It promises no global one otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite

import numpy as np

from fedlean.core import Masks, Params
from fedlean.patterns.largest import largest
from fedlean.pruning.coordinates import check_importance, check_limits, masked_sum
from fedlean.pruning.empirical_risk import gamma
from fedlean.tree import read_only

Seconds = Callable[[Mapping[str, int]], float]  # kept coordinates by tensor -> seconds of a round
ROUNDING = 1e-12  # relative fall of T that passes for rounding, not for a falling T


@dataclass(frozen=True)
class _Problem:
    """Γ as a function of how many coordinates of P each tensor keeps beside P̄."""

    fixed_delta: float  # Δ(P̄) and of what is never pruned
    fixed: Mapping[str, int]  # |P̄| by tensor
    prefix: Mapping[str, np.ndarray]  # prefix[l][n] = Σ of the n largest g² of P in l, float64
    seconds: Seconds

    def time(self, counts: Mapping[str, int]) -> float:
        kept = {name: self.fixed[name] + count for name, count in counts.items()}
        value = float(self.seconds(kept))
        if not (isfinite(value) and value >= 0):
            raise ValueError(f"seconds({kept}) must be finite and >= 0, got {value}")
        return value

    def gamma(self, counts: Mapping[str, int], seconds: float) -> float:
        delta = sum(float(self.prefix[name][count]) for name, count in counts.items())
        return gamma(self.fixed_delta + delta, seconds)  # Eq. (7)


def maximise_general(
    importance: Params,
    removable: Masks,
    seconds: Seconds,
    *,
    fixed_delta: float = 0.0,
    max_kept: int | None = None,
) -> Masks:
    """Masks A ∪ P̄, A ⊆ P, of which no change by one element raises Γ = Δ/T; as `maximise_linear`.

    importance: g² by tensor, any shape, floating, >= 0
    removable: P, True = may go; the False coordinates of its tensors are P̄ and stay
    seconds: T in seconds by kept coordinates per tensor; must not fall when a count rises
    fixed_delta: Σ g² of what is never pruned (biases, norms)
    max_kept: size limit on |A ∪ P̄|; at the limit, swapping two elements raises Γ no more either

    A never holds a coordinate of g² = 0.  Of equal g² in a tensor the first in flat order stays.
    Raises ValueError for inputs that do not fit, and when T is seen to fall as a count rises.

    >>> g2 = {"fc.weight": np.array([9.0, 2.0, 1.0], np.float32)}
    >>> p = {"fc.weight": np.array([True, True, True])}
    >>> maximise_general(g2, p, lambda kept: 3.0 + kept["fc.weight"] ** 2)["fc.weight"]
    array([ True, False, False])
    """
    check_importance(importance, removable)
    check_limits(fixed_delta, max_kept)
    delta, fixed, prefix = fixed_delta, {}, {}
    for name, mask in removable.items():
        delta += masked_sum(importance[name], ~mask)
        fixed[name] = mask.size - int(np.count_nonzero(mask))
        prefix[name] = _prefix_sums(importance[name].ravel()[np.flatnonzero(mask)])
    room = None if max_kept is None else max(0, max_kept - sum(fixed.values()))
    counts = _climb(_Problem(delta, fixed, prefix, seconds), room)
    masks = {}
    for name, mask in removable.items():
        places = np.flatnonzero(mask)
        kept = ~mask
        kept.flat[places[largest(importance[name].ravel()[places], counts[name])]] = True
        masks[name] = kept
    return read_only(masks)


def _prefix_sums(squares: np.ndarray) -> np.ndarray:
    """(n,) -> (m + 1,) sums of the 0, 1, .. m largest; zeros never repay time, so m stops there."""
    ordered = np.sort(squares[squares > 0])[::-1]
    sums = np.zeros(ordered.size + 1)
    np.cumsum(ordered, dtype=np.float64, out=sums[1:])
    return sums


def _climb(problem: _Problem, room: int | None) -> dict[str, int]:
    """Counts in P at which no move helps, from A = ∅; `room`: most coordinates in all."""
    counts = dict.fromkeys(problem.prefix, 0)
    seconds = problem.time(counts)
    best = problem.gamma(counts, seconds)
    longest = max((len(sums) - 1 for sums in problem.prefix.values()), default=0)
    moved = True
    while moved:  # ends: every accepted move raises Γ strictly, and there are finitely many counts
        moved = False
        for k in reversed(
            range(longest.bit_length() + 1)
        ):  # the first move reaches all of a tensor
            for name in counts:
                for step in (1 << k, -(1 << k)):
                    for trial in _moves(problem, counts, name, step, room):
                        trial_seconds = problem.time(trial)
                        _check_monotone(counts, seconds, trial, trial_seconds)
                        value = problem.gamma(trial, trial_seconds)
                        if value > best:
                            counts, seconds, best, moved = trial, trial_seconds, value, True
                            break
    return counts


def _moves(
    problem: _Problem, counts: dict[str, int], name: str, step: int, room: int | None
) -> list[dict[str, int]]:
    """`counts` with tensor `name` moved by up to `step`; at the limit, swaps with other tensors."""
    target = min(max(counts[name] + step, 0), len(problem.prefix[name]) - 1)
    if target == counts[name]:
        return []
    moved = counts | {name: target}
    excess = 0 if room is None else sum(moved.values()) - room
    if excess <= 0:
        return [moved]
    swaps = [
        moved | {other: counts[other] - excess}
        for other in counts
        if other != name and counts[other] >= excess
    ]
    shortened = target - excess  # as far as the limit allows, without a swap
    return ([counts | {name: shortened}] if shortened > counts[name] else []) + swaps


def _check_monotone(
    counts: Mapping[str, int], seconds: float, trial: Mapping[str, int], trial_seconds: float
) -> None:
    """Raise ValueError if T falls although counts only rise, or the reverse; swaps say nothing."""
    changes = [trial[name] - counts[name] for name in counts]
    slack = ROUNDING * max(seconds, trial_seconds)
    if (min(changes) >= 0 and trial_seconds < seconds - slack) or (
        max(changes) <= 0 and trial_seconds > seconds + slack
    ):
        raise ValueError(
            f"seconds must not fall when a count rises, got {seconds} and {trial_seconds} for "
            f"{dict(counts)} and {dict(trial)} coordinates of P"
        )
