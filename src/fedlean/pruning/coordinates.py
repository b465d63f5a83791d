"""What both maximisers check of their arguments, and a sum over a mask.

Owns what the criteria in this package share; knows no paper and no schedule.
"""

from __future__ import annotations

from math import isfinite

import numpy as np

from fedlean.core import Masks, Params


def check_importance(importance: Params, removable: Masks) -> None:
    """Raise ValueError naming the tensor unless g² and P fit together.

    Every tensor of `removable` (bool) needs an importance of its shape: floating, finite, >= 0.
    Tensors of `importance` that `removable` lacks (biases, norms) are not looked at.
    """
    for name, mask in removable.items():
        if name not in importance:
            raise ValueError(f"importance lacks tensor {name!r}, got {sorted(importance)}")
        squares = importance[name]
        if mask.dtype != np.bool_:
            raise ValueError(f"removable[{name!r}] must be bool, got {mask.dtype}")
        if squares.shape != mask.shape:
            raise ValueError(
                f"importance[{name!r}] has shape {squares.shape}, its mask {mask.shape}"
            )
        if not np.issubdtype(squares.dtype, np.floating):
            raise ValueError(f"importance[{name!r}] must be floating, got {squares.dtype}")
        # min() and max() hand a NaN on, and NaN fails both comparisons.
        if squares.size and not (squares.min() >= 0 and squares.max() < np.inf):
            raise ValueError(
                f"importance[{name!r}] must be finite and >= 0: it is a sum of squares"
            )


def check_limits(fixed_delta: float, max_kept: int | None) -> None:
    """Raise ValueError unless both are sizes."""
    if not (isfinite(fixed_delta) and fixed_delta >= 0):
        raise ValueError(f"fixed_delta must be finite and >= 0, got {fixed_delta}")
    if max_kept is not None and max_kept < 0:
        raise ValueError(f"max_kept must be >= 0 or None, got {max_kept}")


def masked_sum(values: np.ndarray, mask: np.ndarray) -> float:
    """Sum of `values` where `mask`, in float64; both of one shape.

    A product with the mask: several times faster than `where=`, which branches.
    """
    return float(np.sum(values * mask, dtype=np.float64))
