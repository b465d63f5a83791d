"""The size limit of a run, as a schedule.

Jiang et al. (PruneFL), arXiv 1909.12326, Sec. VI-E.  It holds in initial pruning (round 0) too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import floor, prod

import numpy as np

from fedlean.core import Masks
from fedlean.tree import num_kept


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


def fraction_to(limit: int, masks: Masks) -> float:
    """Least φ with which a reconfiguration can go down to `limit` kept weights; 0: any can.

    For then P̄, what φ of each layer leaves and one weight of every unit, is at most `limit`, if
    the units alone are not more.  OURS: Sec. VI-E does not say how the limit and φ go together.

    >>> masks = {"fc.weight": np.ones((2, 8), dtype=bool)}
    >>> fraction_to(15, masks), fraction_to(16, masks), fraction_to(3, masks)
    (0.75, 0.0, 1.0)
    """
    kept = num_kept(masks)
    if kept <= limit:
        return 0.0
    units = sum(int(np.sum(mask.shape[:2])) for mask in masks.values())
    whole = len(masks)  # φ of a layer is rounded down to whole weights
    return min(1.0, max(0.0, 1 - (limit - units - whole) / kept))


def max_kept(density: float, shapes: Mapping[str, tuple[int, ...]], names: Iterable[str]) -> int:
    """floor(density · coordinates of the tensors `names`), e.g. of a spec's `prunable`.

    >>> max_kept(0.5, {"fc.weight": (3, 3), "fc.bias": (3,)}, ["fc.weight"])
    4
    """
    if not 0 <= density <= 1:
        raise ValueError(f"density must be in [0, 1], got {density}")
    return floor(density * sum(prod(shapes[name]) for name in names))
