"""Units that a mask leaves without a weight, and how to keep them alive.

OURS: PruneFL (arXiv 1909.12326) says nothing of dead units, but "stop when the size is reached"
can cut a tensor by its whole prunable fraction and with it every weight of some neurons.  A unit is
an output row (axis 0) or an input column (axis 1) of a weight (O, I, ...), a channel of a
convolution; of a grouped convolution axis 1 counts within the group.
"""

from __future__ import annotations

import numpy as np

from fedlean.core import Masks, Params
from fedlean.pruning.coordinates import check_importance


def dead_units(masks: Masks) -> dict[str, tuple[int, int]]:
    """Rows and columns of each tensor that keep no weight.

    >>> dead_units({"fc.weight": np.array([[True, False, True], [False, False, False]])})
    {'fc.weight': (1, 1)}
    """
    counts = {}
    for name, mask in masks.items():
        _check_axes(name, mask)
        others = tuple(range(2, mask.ndim))
        rows, columns = mask.any(axis=(1, *others)), mask.any(axis=(0, *others))
        counts[name] = (int(np.sum(~rows)), int(np.sum(~columns)))
    return counts


def protect_units(importance: Params, old_masks: Masks, removable: Masks) -> Masks:
    """P without the most important kept weight of each row and column that is alive.

    importance: g² by tensor (O, I, ...), floating, finite, >= 0
    old_masks: True = kept; a tensor without a mask is dense
    removable: P, True = may go, in the tensors' shapes; new arrays come back, a subset of it

    Of equal importance the first in flat order is protected.  A unit that is dead already gets
    nothing.  At most rows + columns coordinates leave P, so P̄ stays small beside a size limit.
    Raises ValueError naming the tensor for what does not fit.

    >>> g2 = {"fc.weight": np.array([[1.0, 3.0], [2.0, 4.0]], np.float32)}
    >>> p = {"fc.weight": np.ones((2, 2), dtype=bool)}
    >>> protect_units(g2, {}, p)["fc.weight"]
    array([[ True, False],
           [False, False]])
    """
    check_importance(importance, removable)
    shrunk = {}
    for name, may_go in removable.items():
        _check_axes(name, may_go)
        kept = old_masks.get(name, np.ones(may_go.shape, dtype=bool))
        if kept.shape != may_go.shape or kept.dtype != np.bool_:
            raise ValueError(
                f"mask of {name!r} must be bool {may_go.shape}, got {kept.dtype} {kept.shape}"
            )
        shrunk[name] = may_go.copy()
        # -1 is below every g² and marks the pruned.
        scores = np.where(kept, importance[name], importance[name].dtype.type(-1))
        _protect_rows(shrunk[name], scores)
        _protect_rows(shrunk[name].swapaxes(0, 1), scores.swapaxes(0, 1))
    return shrunk


def _protect_rows(may_go: np.ndarray, scores: np.ndarray) -> None:
    """Clear `may_go` (O, I, ...) in place at the best kept score of each row along axis 0."""
    if not scores.size:
        return
    best = scores.reshape(scores.shape[0], -1).argmax(axis=1)  # the first of equal scores
    at = (np.arange(scores.shape[0]), *np.unravel_index(best, scores.shape[1:]))
    # A dead row's best score is -1; there P keeps what it had.
    may_go[at] &= scores[at] < 0


def _check_axes(name: str, mask: np.ndarray) -> None:
    if mask.ndim < 2:
        raise ValueError(f"tensor {name!r} needs rows and columns, got shape {mask.shape}")
