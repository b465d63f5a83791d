"""Random masks from a seed and counts: exact, the same everywhere, with no unit left out."""

from __future__ import annotations

import numpy as np
import pytest

from fedlean.layers import Conv2d, Flatten, Linear, MaxPool2d, ReLU
from fedlean.models.lenet300 import lenet300
from fedlean.patterns.shuffled import shuffled_masks
from fedlean.spec import sequential
from fedlean.tree import kept_counts, pattern_hash

MLP = lenet300((1, 8, 8), 10)
CNN = sequential(
    (2, 8, 8),
    [
        ("conv1", Conv2d(4, 3)),
        ("relu1", ReLU()),
        ("conv2", Conv2d(6, 3, groups=2)),
        ("pool", MaxPool2d(2)),
        ("flat", Flatten()),
        ("fc", Linear(5)),
    ],
)


@pytest.mark.parametrize(
    "counts",
    [
        {"fc1.weight": 500, "fc2.weight": 400, "fc3.weight": 200},
        {"fc1.weight": 0, "fc2.weight": 30_000, "fc3.weight": 1},
        {"fc2.weight": 300},
    ],
)
def test_counts_are_exact(counts) -> None:
    masks = shuffled_masks(MLP, counts, 5)
    assert kept_counts(masks) == counts
    assert all(mask.shape == MLP.param_shapes[name] for name, mask in masks.items())


def test_a_seed_is_one_pattern_on_every_machine() -> None:
    """The hash is of the definition: whoever changes it breaks patterns that travel as a seed."""
    counts = {"conv1.weight": 30, "conv2.weight": 40, "fc.weight": 50}
    masks = shuffled_masks(CNN, counts, 7)
    assert pattern_hash(masks) == "6b5303eb18ccc9a2888bcb81d6735131"
    assert (
        pattern_hash(shuffled_masks(CNN, dict(reversed(counts.items())), 7))
        == "6b5303eb18ccc9a2888bcb81d6735131"
    )
    assert pattern_hash(shuffled_masks(CNN, counts, 8)) != "6b5303eb18ccc9a2888bcb81d6735131"


@pytest.mark.parametrize("seed", range(5))
def test_no_unit_dies_with_just_enough_weights(seed) -> None:
    """max(outputs, inputs) weights reach all units of a layer; grouped ones within their groups."""
    least = {"conv1.weight": 4, "conv2.weight": 6, "fc.weight": 6}
    masks = shuffled_masks(CNN, least, seed)
    assert masks["conv1.weight"].any((1, 2, 3)).all()
    assert masks["conv2.weight"].any((1, 2, 3)).all()
    for group in (masks["conv2.weight"][:3], masks["conv2.weight"][3:]):
        assert group.any((0, 2, 3)).all()
    by_channel = masks["fc.weight"].reshape(5, 6, 4)
    assert by_channel.any((1, 2)).all() and by_channel.any((0, 2)).all()
    mlp = shuffled_masks(MLP, {"fc1.weight": 300, "fc2.weight": 300, "fc3.weight": 100}, seed)
    assert mlp["fc1.weight"].any(1).all()
    assert all(mlp[name].any(0).all() and mlp[name].any(1).all() for name in list(mlp)[1:])


def test_with_fewer_weights_as_many_units_as_weights_live() -> None:
    fc2 = shuffled_masks(MLP, {"fc2.weight": 70}, 0)["fc2.weight"]  # (100, 300)
    assert fc2.any(0).sum() == fc2.any(1).sum() == 70


def test_weights_are_spread_evenly() -> None:
    """Each coordinate of (10, 100) is kept in a fifth of 400 draws: within 5 deviations of 0.02."""
    drawn = [shuffled_masks(MLP, {"fc3.weight": 200}, seed)["fc3.weight"] for seed in range(400)]
    kept = np.mean(drawn, axis=0)
    assert abs(kept - 0.2).max() < 5 * 0.02
    assert np.std(kept) == pytest.approx(0.02, rel=0.15)


def test_refusals_name_the_tensor() -> None:
    with pytest.raises(ValueError, match=r"counts\['fc3.weight'\] must be in \[0, 1000\], got -1"):
        shuffled_masks(MLP, {"fc3.weight": -1}, 0)
    with pytest.raises(ValueError, match=r"got 1001"):
        shuffled_masks(MLP, {"fc3.weight": 1001}, 0)
    with pytest.raises(ValueError, match=r"'fc3.bias' is no prunable weight"):
        shuffled_masks(MLP, {"fc3.bias": 3}, 0)
