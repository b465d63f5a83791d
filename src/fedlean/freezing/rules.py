"""When a part has learnt enough to be frozen: rules as pairs of pure functions.

`movement` is how far a part gets for how much it moves: 1 where every round goes the same way, 0
where each undoes the one before, 1/√H in a random walk of H rounds.  SmartFreeze calls it block
perturbation (arXiv 2408.09101), ProFL effective movement (arXiv 2404.13349).  A part that has
converged does a random walk, so its movement stops to fall.
"""

# n scalars of a part, H rounds of a window, W values of a slope

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from math import sqrt
from typing import Any, NamedTuple

import numpy as np

from fedlean.core import Masks, Params, generator
from fedlean.train.hyperparameters import at_least, in_range
from fedlean.tree import pack

SCALARS = 10_000  # of a part, over which its movement is taken, as in ProFL
RuleState = Mapping[str, Any]  # arrays, tuples and numbers, as checkpoints hold them
ANY = 1e3  # movement on the scale of a random walk: more than any window gives


class FreezingRule(NamedTuple):
    """`update(init(values), values)`, with the scalars of a part after each round, float32 (n,).

    A state has "frozen", whether the part may be frozen, and "measured", numbers for the log.
    """

    init: Callable[[np.ndarray], RuleState]
    update: Callable[[RuleState, np.ndarray], RuleState]


def scalars(
    params: Params,
    names: Iterable[str],
    *,
    seed: int,
    at_most: int = SCALARS,
    masks: Masks | None = None,
) -> np.ndarray:
    """The values of these tensors, or so many of them, the same at every call: float32 (n,).

    The seed and the shapes decide which.  Of tensors with a mask they are kept ones.
    """
    held = pack({name: params[name] for name in sorted(names)}, masks or {})
    sizes = tuple((name, value.size) for name, value in held.items())
    found = [held[name].reshape(-1)[at] for name, at in _sampled(sizes, at_most, seed) if len(at)]
    return np.concatenate(found) if found else np.zeros(0, np.float32)


@lru_cache(maxsize=64)
def _sampled(
    sizes: tuple[tuple[str, int], ...], at_most: int, seed: int
) -> tuple[tuple[str, np.ndarray], ...]:
    """Which scalars of each tensor: drawn over all of them, in their order."""
    total = sum(size for _, size in sizes)
    if total > at_most:
        drawn = generator(seed, 0, 0, "movement").choice(total, at_most, replace=False)
        at = np.sort(drawn)
    else:
        at = np.arange(total)
    ends = np.cumsum([size for _, size in sizes])
    pieces = np.split(at, np.searchsorted(at, ends[:-1]))
    return tuple(
        (name, piece - (end - size))
        for (name, size), end, piece in zip(sizes, ends, pieces, strict=True)
    )


def movement(moves: np.ndarray) -> float:
    """Σ_s |Σ_i Δ_s^i| / Σ_s Σ_i |Δ_s^i| of moves (H, n), in [0, 1]; 0 where nothing moved.

    SmartFreeze's P_b, over the last H aggregated updates of a block; ProFL's EM_r.
    """
    total = float(np.abs(moves, dtype=np.float64).sum())
    return float(np.abs(moves.sum(0, dtype=np.float64)).sum()) / total if total else 0.0


def slope(values: Iterable[float]) -> float:
    """Of the least-squares line through values one round apart.

    >>> slope([1.0, 3.0, 5.0])
    2.0
    """
    y = np.asarray(tuple(values), np.float64)
    x = np.arange(y.size) - (y.size - 1) / 2
    return float((x * y).sum() / (x * x).sum())


def slope_of_movement(
    *,
    window: int,
    smoothing: float,
    values: int,
    threshold: float,
    patience: int,
    below: float = ANY,
) -> FreezingRule:
    """A part is frozen once its movement stops to change.

    The movement over the last `window` rounds H, times √H so that a random walk has 1, is smoothed
    as s <- smoothing·s + (1 - smoothing)·v.  The part is frozen when the slope of the line through
    the last `values` W of these stays below `threshold` in size `patience` times in a row.  What
    H, W, the threshold and the patience are is not known of SmartFreeze.  ProFL's configuration
    names a window, a number of evaluations and a threshold of the slope, its code leaves the
    decision to a person.  The scale is ours, and so is `below`: the smoothed movement on that scale
    must be at most that.  A part that has just begun to learn moves straight on, and then the slope
    is small, too.

    measured: "movement" (of SmartFreeze and ProFL, not scaled), "floor" 1/√H of a random walk of
    as many rounds, "smoothed" and "slope" on the scale where that is 1; each as soon as it is
    there.  Raises ValueError naming the setting that is out of range.
    """
    at_least("window", window, 2)
    in_range("smoothing", smoothing, 0.0, 0.999)
    at_least("values", values, 2)
    in_range("threshold", threshold, 0.0, 1e3, open_low=True)
    at_least("patience", patience, 1)
    in_range("below", below, 0.0, ANY, open_low=True)

    def init(held: np.ndarray) -> RuleState:
        return {
            "last": np.array(held, np.float32),
            "moves": np.zeros((0, held.size), np.float32),
            "smoothed": (),
            "quiet": 0,
            "frozen": False,
            "measured": {},
        }

    def update(state: RuleState, held: np.ndarray) -> RuleState:
        moves = np.concatenate([state["moves"], (held - state["last"])[None]])[-window:]
        rounds, value = len(moves), movement(moves)
        measured = {"movement": value, "floor": 1 / sqrt(rounds)}
        smoothed, quiet = tuple(state["smoothed"]), int(state["quiet"])
        if rounds == window:
            scaled = value * sqrt(window)
            before = smoothed[-1] if smoothed else scaled
            smoothed = (*smoothed, smoothing * before + (1 - smoothing) * scaled)[-values:]
            measured["smoothed"] = smoothed[-1]
            if len(smoothed) == values:
                measured["slope"] = slope(smoothed)
                low = smoothed[-1] <= below
                quiet = quiet + 1 if low and abs(measured["slope"]) < threshold else 0
        return {
            "last": np.array(held, np.float32),
            "moves": moves,
            "smoothed": smoothed,
            "quiet": quiet,
            "frozen": quiet >= patience,
            "measured": measured,
        }

    return FreezingRule(init, update)


def never() -> FreezingRule:
    """No part is frozen before its share of the rounds is over."""

    def init(held: np.ndarray) -> RuleState:
        return {"frozen": False, "measured": {}}

    def update(state: RuleState, held: np.ndarray) -> RuleState:
        return state

    return FreezingRule(init, update)
