"""The group lasso over channels: Σ_g ‖w_g‖ over the rows and the columns of weights.

PruneTrain (Lym et al., SC 2019, arXiv 1901.09290): groups are the weights that make one output
channel (a row, axis 0) and those that read one input channel (a column, axis 1).  One coefficient
for all groups, and no groups for the model's inputs and outputs and for grouped convolutions, as in
the authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedlean.core import Params
from fedlean.pruning.channels import Channels
from fedlean.spec import ModelSpec

Axes = Mapping[str, tuple[int, ...]]  # weight -> axes along which its groups lie: 0 rows, 1 columns


def group_axes(spec: ModelSpec, found: Channels) -> Axes:
    """Groups of the prunable weights of `spec`, whose channels are `found`."""
    axes = {}
    for name in spec.prunable:
        made, read = found.rows[name], found.columns[name]
        free = [not found.fixed[channel].any() for channel in (made, read)]
        axes[name] = tuple(axis for axis in (0, 1) if free[axis] and len(read) == 1)
    return axes


def penalty(params: Params, axes: Axes) -> float:
    """Σ_g ‖w_g‖.

    >>> w = {"fc.weight": np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)}
    >>> penalty(w, {"fc.weight": (0,)}), penalty(w, {"fc.weight": (0, 1)})  # 5, and 3 + 4
    (5.0, 12.0)
    """
    return sum(
        float(_norms(params[name], axis).sum(dtype=np.float64))
        for name, own in axes.items()
        for axis in own
    )


def coefficient(ratio: float, loss: float, penalty: float) -> float:
    """λ such that λ·penalty / (loss + λ·penalty) = ratio; 0 where nothing is left to penalise.

    ratio: in [0, 1)

    >>> round(coefficient(0.2, 2.0, 10.0), 9)  # 0.5 / 2.5 = 0.2
    0.05
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio must lie in [0, 1), got {ratio}")
    return ratio * loss / ((1 - ratio) * penalty) if penalty else 0.0


def shrunk(params: Params, axes: Axes, amount: float) -> dict[str, np.ndarray]:
    """The weights with every group `amount` shorter, or 0 where it is not longer than that.

    w_g <- w_g · max(0, 1 - amount / ‖w_g‖), the proximal operator of amount·Σ‖w_g‖, first of the
    rows, then of the columns.  Gives the tensors of `axes` only, as new arrays.

    >>> w = {"fc.weight": np.array([[3.0, 4.0], [0.6, 0.8]], np.float32)}
    >>> shrunk(w, {"fc.weight": (0,)}, 1.0)["fc.weight"].round(4).tolist()
    [[2.4000000953674316, 3.200000047683716], [0.0, 0.0]]
    """
    if not amount:
        return {name: params[name].copy() for name in axes}
    result = {}
    for name, own in axes.items():
        weights = params[name].copy()
        for axis in own:
            norms = _norms(weights, axis)
            factors = 1 - amount / np.maximum(norms, amount)
            weights *= np.expand_dims(factors, tuple(i for i in range(weights.ndim) if i != axis))
        result[name] = weights
    return result


def _norms(weights: np.ndarray, axis: int) -> np.ndarray:
    """‖w_g‖ of the rows or columns of (O, I, ...), without a temporary of their size."""
    flat = weights.reshape(*weights.shape[:2], -1)
    return np.sqrt(np.einsum(flat, [0, 1, 2], flat, [0, 1, 2], [axis]))
