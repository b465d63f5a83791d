"""Losses of more than one output, and their gradients there: for `Session.descend`.

Each is a function of arrays by name and of the labels, `(taps, y, ...) -> (value, gradients)`, with
the gradients of the named outputs, (B, *shape) like them.  What else a loss needs it is given by
`functools.partial`.  Values are float64 sums; gradients are rounded to float32 at the end.
"""

# B examples, C classes, E exits

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fedlean.train.loss_gradient import loss_and_gradient

Taps = Mapping[str, np.ndarray]
TapsLoss = Callable[[Taps, np.ndarray], tuple[float, dict[str, np.ndarray]]]


def exits_cross_entropy(
    taps: Taps, y: np.ndarray, *, exits: Sequence[str], weights: Sequence[float] | None = None
) -> tuple[float, dict[str, np.ndarray]]:
    """Σ_i w_i CE_i over the exits' logits float32 (B, C), with labels y int64 (B,); w_i = 1.

    Raises ValueError naming an exit that is not tapped, and for other weights than one each.
    """
    _check_exits(taps, exits)
    factors = [1.0] * len(exits) if weights is None else list(weights)
    if len(factors) != len(exits):
        raise ValueError(f"there are {len(factors)} weights for {len(exits)} exits")
    value, gradients = 0.0, {}
    for name, factor in zip(exits, factors, strict=True):
        loss, gradient = loss_and_gradient(taps[name], y, "ce")
        value += factor * loss
        gradients[name] = np.float32(factor) * gradient
    return value, gradients


def mutual_distillation(
    taps: Taps,
    y: np.ndarray,
    *,
    exits: Sequence[str],
    weight: float = 1.0,
    temperature: float = 1.0,
) -> tuple[float, dict[str, np.ndarray]]:
    """DepthFL's loss over the exits' logits float32 (B, C), with labels y int64 (B,).

        Σ_i CE_i + weight/(E-1) Σ_i Σ_{j≠i} T² KL(p_j || p_i),   p = softmax(z / T)

    p_j is a target through which no gradient flows.  The paper has T = 1 and weight 1; its code
    raises the weight to that over the first rounds.  (Kim et al., DepthFL, ICLR 2023.)  A lone exit
    has cross-entropy alone.  Raises ValueError naming an exit that is not tapped.
    """
    value, gradients = exits_cross_entropy(taps, y, exits=exits)
    share = weight / (len(exits) - 1) if len(exits) > 1 else 0.0
    for own in exits:
        for other in exits:
            if other != own and share:
                loss, gradient = _kl(taps[own], taps[other], temperature)
                value += share * loss
                gradients[own] += np.float32(share) * gradient
    return value, gradients


def logits_mse(
    taps: Taps, y: np.ndarray, *, student: str, teacher: str
) -> tuple[float, dict[str, np.ndarray]]:
    """Mean over all B·C of (student - teacher)²; the gradient is the student's.

    ProFL maps a block into its surrogate so (2404.13349).  Any two tapped arrays of one shape; y is
    not looked at.  Raises ValueError naming one that is not tapped, or both where shapes differ.
    """
    _check_pair(taps, student, teacher)
    with np.errstate(invalid="ignore", over="ignore"):
        off = taps[student].astype(np.float64) - taps[teacher]
        return float(np.mean(off * off)), {student: (2 * off / off.size).astype(np.float32)}


def distillation(
    taps: Taps, y: np.ndarray, *, student: str, teacher: str, temperature: float = 1.0
) -> tuple[float, dict[str, np.ndarray]]:
    """T² KL(softmax(teacher/T) || softmax(student/T)), mean over B; the gradient is the student's.

    Hinton et al. 2015 (arXiv 1503.02531), without the labels' term: y is not looked at.  Raises
    ValueError naming one that is not tapped, or both where shapes differ.
    """
    _check_pair(taps, student, teacher)
    value, gradient = _kl(taps[student], taps[teacher], temperature)
    return value, {student: gradient}


def divergence(
    taps: Taps, y: np.ndarray, *, student: str, teacher: str
) -> tuple[float, dict[str, np.ndarray]]:
    """KL(softmax(student) || softmax(teacher)), mean over B; the gradient is the student's.

    The other way round than `distillation`: the student loses where it is sure and the teacher is
    not.  y is not looked at.  Raises ValueError as `distillation`.
    """
    _check_pair(taps, student, teacher)
    with np.errstate(invalid="ignore", over="ignore"):  # a diverged model has no finite loss
        ours, theirs = (_log_softmax(taps[name], 1.0) for name in (student, teacher))
        each = np.exp(ours) * (ours - theirs)
        lost = each.sum(1, keepdims=True)
        gradient = (each - np.exp(ours) * lost) / len(lost)
    return float(np.mean(lost)), {student: gradient.astype(np.float32)}


def _kl(student: np.ndarray, teacher: np.ndarray, temperature: float) -> tuple[float, np.ndarray]:
    """Of logits (B, C), and the gradient at the student's."""
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature!r}")
    with np.errstate(invalid="ignore", over="ignore"):  # a diverged model has no finite loss
        ours, theirs = (_log_softmax(logits, temperature) for logits in (student, teacher))
        target = np.exp(theirs)
        value = temperature**2 * float(np.mean((target * (theirs - ours)).sum(1)))
        gradient = temperature * (np.exp(ours) - target) / len(student)
    return value, gradient.astype(np.float32)


def _log_softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    z = logits.astype(np.float64) / temperature
    z -= z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def _check_exits(taps: Taps, exits: Sequence[str]) -> None:
    if not exits or len(set(exits)) != len(exits):
        raise ValueError(f"exits must be one name or more, each once, got {list(exits)!r:.80}")
    for name in exits:
        _check_tapped(taps, name)


def _check_pair(taps: Taps, student: str, teacher: str) -> None:
    for name in (student, teacher):
        _check_tapped(taps, name)
    if taps[student].shape != taps[teacher].shape:
        raise ValueError(
            f"{student!r} has shape {taps[student].shape} and {teacher!r} {taps[teacher].shape}: "
            "they must be alike"
        )


def _check_tapped(taps: Taps, name: str) -> None:
    if name not in taps:
        raise ValueError(f"{name!r} is not tapped, only {', '.join(map(repr, taps)) or 'nothing'}")
