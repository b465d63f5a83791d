"""The schedule of Sec. VI-E by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fedlean.pruning.budget import density_limit, fraction_to, max_kept
from fedlean.pruning.prunable_set import removable
from fedlean.pruning.units import protect_units


def test_density_limit_by_hand() -> None:
    """D(r) = 0.5 + (0.1 − 0.5) · r / 1000: 0.5, at 250: 0.5 − 0.1 = 0.4, at 1000: 0.1."""
    values = [density_limit(r, 1000, 0.5, 0.1) for r in (0, 250, 1000)]
    assert values == pytest.approx([0.5, 0.4, 0.1])
    assert density_limit(3, 4, 0.1, 0.5) == pytest.approx(0.4)  # may grow too


def test_max_kept_is_rounded_down_over_the_named_tensors() -> None:
    """Conv-2: 800 + 51,200 + 6,422,528 + 126,976 = 6,601,504; · 0.08 = 528,120.32."""
    shapes = {
        "conv1.weight": (32, 1, 5, 5),
        "conv2.weight": (64, 32, 5, 5),
        "fc1.weight": (2048, 3136),
        "fc2.weight": (62, 2048),
        "fc2.bias": (62,),
    }
    names = [name for name in shapes if name.endswith("weight")]
    assert max_kept(0.08, shapes, names) == 528_120
    assert max_kept(0.0, shapes, names) == 0
    assert max_kept(1.0, shapes, names) == 6_601_504


def test_fraction_to_a_limit_leaves_room_for_one_weight_of_every_unit() -> None:
    """Whichever φ of each layer goes and whichever units are protected, P̄ <= limit."""
    rng = np.random.default_rng(0)
    weights = {"a.weight": rng.normal(size=(30, 20)), "b.weight": rng.normal(size=(7, 30))}
    masks = {name: rng.random(w.shape) < 0.6 for name, w in weights.items()}
    importance = {name: rng.random(w.shape) for name, w in weights.items()}
    for limit in (100, 150, 400):
        may_go = removable(weights, masks, fraction_to(limit, masks), weights)
        may_go = protect_units(importance, masks, may_go)
        assert sum(np.count_nonzero(~mask) for mask in may_go.values()) <= limit


def test_bad_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="5 of 4"):
        density_limit(5, 4, 0.5, 0.1)
    with pytest.raises(ValueError, match="target"):
        density_limit(1, 4, 0.5, -0.1)
    with pytest.raises(ValueError, match="density"):
        max_kept(1.5, {}, [])
