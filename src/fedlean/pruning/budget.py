"""The size limit of a run, as a schedule.

Jiang et al. (PruneFL), arXiv 1909.12326, Sec. VI-E.  It holds in initial pruning (round 0) too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import floor, prod


def density_limit(round: int, rounds: int, limit: float, target: float) -> float:
    """Largest density allowed at `round`: D(r) = D_lim + (D_tgt − D_lim) · r / R.

    limit: D_lim at round 0; target: D_tgt at round R = `rounds`, both in [0, 1]
    Raises ValueError when `round` is not in [0, rounds] or a density not in [0, 1].

    >>> density_limit(0, 100, 0.5, 0.25), density_limit(50, 100, 0.5, 0.25)
    (0.5, 0.375)
    """
    if rounds < 1 or not 0 <= round <= rounds:
        raise ValueError(f"round must be in [0, rounds] and rounds >= 1, got {round} of {rounds}")
    for name, density in (("limit", limit), ("target", target)):
        if not 0 <= density <= 1:
            raise ValueError(f"{name} must be a density in [0, 1], got {density}")
    return limit + (target - limit) * round / rounds


def max_kept(density: float, shapes: Mapping[str, tuple[int, ...]], names: Iterable[str]) -> int:
    """floor(density · coordinates of the tensors `names`), e.g. of a spec's `prunable`.

    >>> max_kept(0.5, {"fc.weight": (3, 3), "fc.bias": (3,)}, ["fc.weight"])
    4
    """
    if not 0 <= density <= 1:
        raise ValueError(f"density must be in [0, 1], got {density}")
    return floor(density * sum(prod(shapes[name]) for name in names))
