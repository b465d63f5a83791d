"""How much a set of masks keeps.  Counts only the tensors that have a mask."""

from __future__ import annotations

import numpy as np

from fedlean.core import Masks
from fedlean.spec import ModelSpec
from fedlean.tree import num_kept, read_only


def full_masks(spec: ModelSpec) -> Masks:
    """A mask that keeps everything for each prunable weight of `spec`."""
    return read_only({name: np.ones(spec.param_shapes[name], bool) for name in spec.prunable})


def density(masks: Masks) -> float:
    """Kept fraction over all masked tensors, in [0, 1]; 1 without masks, which means dense.

    >>> density({"a": np.array([True, False]), "b": np.array([True, True])})
    0.75
    """
    total = sum(mask.size for mask in masks.values())
    return num_kept(masks) / total if total else 1.0


def layer_density(masks: Masks) -> dict[str, float]:
    """Kept fraction of each tensor; 1 for a tensor without coordinates."""
    return {name: density({name: mask}) for name, mask in masks.items()}
