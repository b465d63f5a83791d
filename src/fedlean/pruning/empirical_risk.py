"""Which coordinates repay their time: PruneFL's Algorithm 2 for linear time.

Y. Jiang, S. Wang, V. Valls, B. J. Ko, W.-H. Lee, K. K. Leung, L. Tassiulas, "Model Pruning Enables
Efficient Federated Learning on Edge Devices", IEEE TNNLS 2022, arXiv 1909.12326: equations (6) and
(7) and Algorithm 2.  Time that is not linear in the kept weights: `general_time`.

Deviations: the paper sorts P by g²/t; (7) is a linear fractional programme, so Dinkelbach's
iteration (Management Science 1967) finds the same set in a few passes without sorting.  The choice
among equal g²/t under a size limit is ours, and so is T = 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite

import numpy as np

from fedlean.core import Masks, Params
from fedlean.cost.time import LinearTime
from fedlean.patterns.largest import largest
from fedlean.pruning.coordinates import check_importance, check_limits, masked_sum
from fedlean.tree import read_only


def gamma(delta: float, seconds: float) -> float:
    """Eq. (7), Γ = Δ/T: risk reduction per second; 0 when no time passes (ours).

    >>> gamma(6.0, 4.0), gamma(6.0, 0.0)
    (1.5, 0.0)
    """
    return delta / seconds if seconds > 0 else 0.0


def maximise_linear(
    importance: Params,
    removable: Masks,
    time: LinearTime,
    *,
    fixed_delta: float = 0.0,
    max_kept: int | None = None,
) -> Masks:
    """Algorithm 2: the masks A ∪ P̄ that maximise Γ over A ⊆ P; new arrays in `removable`'s shapes.

    importance: g² summed over steps and clients, by tensor, any shape, floating, >= 0
    removable: P, True = may go; its tensors are the prunable ones, their False coordinates are P̄
    time: T; needs a time for every tensor of `removable`
    fixed_delta: Σ g² of what is never pruned (biases, norms)
    max_kept: size limit on |A ∪ P̄| over these tensors; P̄ stays even where it alone exceeds it

    A holds j only if g_j² > Γ · t_j, strictly, as the algorithm stops at the first that does not
    exceed.  Where T(P̄) = 0, Γ(P̄) counts as 0, so the first coordinate that costs time is the last.
    Under a limit the largest g²/t of A stay, of equal ones the first in tensor, then flat order.
    Raises ValueError naming the tensor for what does not fit together, is negative or not finite.

    >>> g2 = {"fc.weight": np.array([9.0, 2.0, 1.0], np.float32)}
    >>> p = {"fc.weight": np.array([True, True, True])}
    >>> maximise_linear(g2, p, LinearTime(3.0, {"fc.weight": 1.0}))["fc.weight"]
    array([ True, False, False])
    """
    check_importance(importance, removable)
    check_limits(fixed_delta, max_kept)
    times = time.seconds_per_weight
    _check_times(time, removable)

    delta = fixed_delta  # Δ(P̄), eq. (6)
    seconds = time.constant_seconds  # T(P̄)
    for name, mask in removable.items():
        delta += masked_sum(importance[name], ~mask)
        seconds += times[name] * (mask.size - np.count_nonzero(mask))

    if seconds > 0:
        added = _dinkelbach(importance, removable, times, delta, seconds)
    else:
        added = _without_base_time(importance, removable, times)
    if max_kept is not None:
        fixed = sum(mask.size - int(np.count_nonzero(mask)) for mask in removable.values())
        added = _keep_best(importance, added, times, max(0, max_kept - fixed))
    return read_only({name: added[name] | ~mask for name, mask in removable.items()})


def _check_times(time: LinearTime, removable: Masks) -> None:
    """Raise ValueError naming the tensor whose time is missing, negative or not finite."""
    times = time.seconds_per_weight
    for name in removable:
        if name not in times:
            raise ValueError(f"seconds_per_weight lacks tensor {name!r}, got {sorted(times)}")
    for name, value in {"constant_seconds": time.constant_seconds, **times}.items():
        if not (isfinite(value) and value >= 0):
            raise ValueError(f"time of {name!r} must be finite and >= 0, got {value}")


def _dinkelbach(
    importance: Params, removable: Masks, times: Mapping[str, float], delta: float, seconds: float
) -> dict[str, np.ndarray]:
    """A = {j ∈ P: g_j² > Γ t_j} at the largest Γ; `delta`, `seconds` > 0 are those of P̄.

    λ = Γ of any set bounds the optimum from below, and λ <- Γ({j: g_j² > λ t_j} ∪ P̄) climbs to it,
    from Γ(P̄) on.  As λ only rises, what falls out never returns: each pass looks at the survivors
    of the last.
    """
    cuts: dict[str, float] = {}  # A_l = {g² > cut_l}
    pools = {}
    for name, mask in removable.items():
        squares = importance[name]
        cuts[name] = max(0.0, _round_down(delta * times[name] / seconds, squares.dtype))
        pools[name] = squares.ravel()[np.flatnonzero(mask & (squares > cuts[name]))]
    while True:
        delta_all = delta + sum(float(np.sum(x, dtype=np.float64)) for x in pools.values())
        seconds_all = seconds + sum(times[name] * x.size for name, x in pools.items())
        survivors = {}
        for name, x in pools.items():
            # Δ·t/T rather than (Δ/T)·t: with one rounding less, ties of short numbers stay ties.
            cut = _round_down(delta_all * times[name] / seconds_all, x.dtype)
            cuts[name] = max(cuts[name], cut)  # rounding must not let λ fall
            above = x > cuts[name]
            survivors[name] = x if above.all() else x[np.flatnonzero(above)]
        if all(survivors[name] is x for name, x in pools.items()):
            return {
                name: mask & (importance[name] > cuts[name]) for name, mask in removable.items()
            }
        pools = survivors


def _round_down(value: float, dtype: np.dtype) -> float:
    """The largest number of `dtype` that is <= value >= 0: x > it exactly when x > value."""
    with np.errstate(over="ignore"):  # beyond float32: becomes its largest number below
        rounded = dtype.type(value)
    if float(rounded) > value or np.isinf(rounded):
        rounded = np.nextafter(rounded, dtype.type(-np.inf))
    return float(rounded)


def _without_base_time(
    importance: Params, removable: Masks, times: Mapping[str, float]
) -> dict[str, np.ndarray]:
    """Algorithm 2 to the letter from T(P̄) = 0, Γ = 0: all that is free, then one best coordinate.

    After it Γ >= its g²/t >= all others, so the algorithm stops.
    """
    added = {}
    best_name, best_at, best_ratio = None, 0, 0.0
    for name, mask in removable.items():
        squares = importance[name] * mask
        if times[name] == 0:
            added[name] = squares > 0
            continue
        added[name] = np.zeros(mask.shape, dtype=bool)
        if not squares.size:
            continue
        at = int(squares.argmax())
        ratio = float(squares.flat[at]) / times[name]
        if ratio > best_ratio:
            best_name, best_at, best_ratio = name, at, ratio
    if best_name is not None:
        added[best_name].flat[best_at] = True
    return added


def _keep_best(
    importance: Params, added: Mapping[str, np.ndarray], times: Mapping[str, float], count: int
) -> dict[str, np.ndarray]:
    """The `count` coordinates of A that Algorithm 2 adds first: largest g²/t."""
    if sum(int(np.count_nonzero(mask)) for mask in added.values()) <= count:
        return dict(added)
    kept = {name: np.zeros(mask.shape, dtype=bool) for name, mask in added.items()}
    # Free coordinates have g²/t = ∞ and come first; among them, g² decides (ours).
    for group in ([n for n in added if times[n] == 0], [n for n in added if times[n] > 0]):
        places, ratios = {}, {}
        for name in group:
            at = np.flatnonzero(added[name])
            squares = importance[name].ravel()[at]
            # t is one number within a tensor: its own top suffices for the ranking of all.
            best = largest(squares, count)
            places[name] = at[best]
            ratios[name] = squares[best] / np.float64(times[name] or 1)
        chosen = largest(np.concatenate([np.zeros(0), *ratios.values()]), count)
        for name, at in places.items():
            kept[name].flat[at[chosen[: at.size]]] = True
            chosen = chosen[at.size :]
        count -= sum(int(np.count_nonzero(kept[name])) for name in group)
    return kept
