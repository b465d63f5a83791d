"""Counting what is kept."""

from __future__ import annotations

import numpy as np

from fedlean.layers import Conv2d, Flatten, Linear
from fedlean.pruning.density import density, full_masks, layer_density
from fedlean.spec import sequential
from fedlean.tree import kept_counts


def test_full_masks_cover_the_prunable_weights_and_nothing_else() -> None:
    spec = sequential((1, 4, 4), [("conv", Conv2d(2, 3)), ("flat", Flatten()), ("fc", Linear(5))])
    masks = full_masks(spec)
    assert {name: mask.shape for name, mask in masks.items()} == {
        "conv.weight": (2, 1, 3, 3),
        "fc.weight": (5, 8),
    }
    assert kept_counts(masks) == {"conv.weight": 18, "fc.weight": 40}
    assert density(masks) == 1.0


def test_density_by_hand() -> None:
    """1 of 4 and 2 of 2: 3/6 in all, not the mean of 0.25 and 1."""
    masks = {"a": np.array([[True, False], [False, False]]), "b": np.ones(2, dtype=bool)}
    assert density(masks) == 0.5
    assert layer_density(masks) == {"a": 0.25, "b": 1.0}
    assert density({}) == 1.0
    assert layer_density({"a": np.zeros((0, 2), dtype=bool)}) == {"a": 1.0}
