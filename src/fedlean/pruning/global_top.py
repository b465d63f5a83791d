"""The weights with the largest scores of the whole model, whatever their layer."""

from __future__ import annotations

from math import prod

import numpy as np

from fedlean.core import Masks, Params
from fedlean.patterns.largest import largest
from fedlean.pruning.budget import max_kept
from fedlean.spec import ModelSpec
from fedlean.tree import num_kept, read_only


def keep_largest(scores: Params, count: int, among: Masks) -> Masks:
    """New masks: True at the `count` largest scores of all tensors together.

    scores: by tensor, floating, >= 0 and without NaN
    among: bool, in the shapes of the scores; what is False there stays so

    Exactly `count` are kept, or all of `among` if those are fewer; of equal scores the first in the
    order of the tensors and of their coordinates.  A unit or a whole tensor may lose every weight.

    >>> scores = {"a": np.array([3.0, 1.0]), "b": np.array([2.0, 9.0])}
    >>> keep_largest(scores, 2, {"a": np.array([True, True]), "b": np.array([True, False])})
    {'a': array([ True, False]), 'b': array([ True, False])}
    """
    # -1 is below every score and marks what is pruned already
    flat = np.concatenate([np.where(among[name], scores[name], -1.0).ravel() for name in scores])
    kept = largest(flat, min(count, num_kept(among)))
    ends = np.cumsum([values.size for values in scores.values()])
    parts = np.split(kept, ends[:-1])
    masks = {  # copies: a view would keep the masks of all tensors alive
        name: part.reshape(scores[name].shape).copy()
        for name, part in zip(scores, parts, strict=True)
    }
    return read_only(masks)


def count_at(density: float, spec: ModelSpec) -> int:
    """floor(density · prunable weights).  Raises ValueError when that is none."""
    count = max_kept(density, spec.param_shapes, spec.prunable)
    if count == 0:
        total = sum(prod(spec.param_shapes[name]) for name in spec.prunable)
        remedy = f"choose at least {1 / total:.2g}" if total else "choose a model that has some"
        raise ValueError(
            f"density {density:g} keeps none of the model's {total} prunable weights: {remedy}"
        )
    return count
