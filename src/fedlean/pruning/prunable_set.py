"""The set P of coordinates that a reconfiguration may leave out.

Jiang et al. (PruneFL), arXiv 1909.12326: the fraction and its decay are those of the authors' code.
Which of equal magnitudes belongs to P is ours: the first in flat order.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import floor

import numpy as np

from fedlean.core import Masks, Params
from fedlean.patterns.largest import smallest_magnitudes


def removable(params: Params, masks: Masks, fraction: float, names: Iterable[str]) -> Masks:
    """P by tensor, True = may be absent: every pruned weight and the smallest of those in use.

    params: tensors by name, any shape; only `names` are looked at
    masks: True = in use, in the tensor's shape; a tensor without one is in use as a whole
    fraction: φ in [0, 1]; exactly floor(φ · in use) weights of each tensor, by smallest |w|

    Raises ValueError naming the tensor for an unknown name, a mask that does not fit or a NaN.

    >>> w = {"fc.weight": np.array([3.0, -1.0, 2.0, 0.0], np.float32)}
    >>> masks = {"fc.weight": np.array([True, True, True, False])}
    >>> removable(w, masks, 0.5, ["fc.weight"])["fc.weight"]
    array([False,  True, False,  True])
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be in [0, 1], got {fraction}")
    result = {}
    for name in names:
        if name not in params:
            raise ValueError(f"params lack tensor {name!r}, got {sorted(params)}")
        weights = params[name]
        mask = masks.get(name, np.ones(weights.shape, dtype=bool))
        if mask.shape != weights.shape or mask.dtype != np.bool_:
            raise ValueError(
                f"mask of {name!r} must be bool {weights.shape}, got {mask.dtype} {mask.shape}"
            )
        if weights.size and np.isnan(weights.min()):
            raise ValueError(f"params[{name!r}] holds NaN: the training diverged")
        count = floor(fraction * np.count_nonzero(mask))
        result[name] = smallest_magnitudes(weights, count, mask) | ~mask
    return result


def fraction_at(round: int, *, initial: float = 0.3, half_life_rounds: float = 10_000) -> float:
    """φ at a round: `initial` · 0.5^(round / half_life_rounds).  Constant in initial pruning.

    >>> fraction_at(0), fraction_at(10_000)
    (0.3, 0.15)
    """
    if half_life_rounds <= 0:
        raise ValueError(f"half_life_rounds must be positive, got {half_life_rounds}")
    return initial * 0.5 ** (round / half_life_rounds)
