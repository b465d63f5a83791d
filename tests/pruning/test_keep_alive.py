"""Top-k over the whole model in which no unit loses its last weight."""

from __future__ import annotations

import numpy as np
import pytest

from fedlean.layers import Conv2d, Flatten, Linear, MaxPool2d, ReLU
from fedlean.pruning.density import full_masks
from fedlean.pruning.global_top import keep_largest
from fedlean.pruning.keep_alive import keep_largest_alive
from fedlean.spec import sequential
from fedlean.tree import num_kept

TWO = sequential((2,), [("fc1", Linear(2)), ("relu", ReLU()), ("fc2", Linear(2))])
CNN = sequential(
    (2, 8, 8),
    [
        ("conv1", Conv2d(4, 3)),
        ("relu1", ReLU()),
        ("conv2", Conv2d(6, 3, groups=2)),
        ("pool", MaxPool2d(2)),
        ("flat", Flatten()),
        ("fc1", Linear(5)),
        ("relu2", ReLU()),
        ("fc2", Linear(3)),
    ],
)


def dead_in_cnn(masks) -> list[str]:
    """Units without a weight into them or, hidden ones, out of them; written out per layer."""
    into = {
        "conv1": masks["conv1.weight"].any((1, 2, 3)),
        "conv2": masks["conv2.weight"].any((1, 2, 3)),
        "fc1": masks["fc1.weight"].any(1),
        "fc2": masks["fc2.weight"].any(1),
    }
    first, second = masks["conv2.weight"][:3], masks["conv2.weight"][3:]
    out_of = {
        "conv1": np.concatenate([first.any((0, 2, 3)), second.any((0, 2, 3))]),
        "conv2": masks["fc1.weight"].reshape(5, 6, 4).any((0, 2)),
        "fc1": masks["fc2.weight"].any(0),
    }
    return [
        f"{way} {layer}[{unit}]"
        for way, alive in (("into", into), ("out of", out_of))
        for layer, units in alive.items()
        for unit in np.flatnonzero(~units)
    ]


def scores_of(spec, seed: int):
    """Very unequal between units, so that a plain top-k kills some."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.random(spec.param_shapes[name])
        * np.exp(
            6 * rng.random((spec.param_shapes[name][0], *[1] * len(spec.param_shapes[name][1:])))
        )
        for name in spec.prunable
    }


def test_by_hand() -> None:
    """Best into fc1: 9 and 2; into fc2: 6 and 5, both from fc1[0], so 1 out of fc1[1] comes too.

    That is five; the sixth is the largest of the others, 8.  A plain top-6 has 7 instead of 1.
    """
    scores = {
        "fc1.weight": np.array([[9.0, 8.0], [2.0, 0.0]]),
        "fc2.weight": np.array([[6.0, 0.5], [5.0, 1.0]]),
    }
    masks = keep_largest_alive(TWO, scores, 6, full_masks(TWO))
    assert masks["fc1.weight"].tolist() == [[True, True], [True, False]]
    assert masks["fc2.weight"].tolist() == [[True, False], [True, True]]
    five = keep_largest_alive(TWO, scores, 5, full_masks(TWO))
    assert five["fc1.weight"].tolist() == [[True, False], [True, False]]
    three = keep_largest_alive(TWO, scores, 3, full_masks(TWO))  # not enough: the largest of those
    assert three["fc1.weight"].tolist() == [[True, False], [False, False]]
    assert three["fc2.weight"].tolist() == [[True, False], [True, False]]


@pytest.mark.parametrize("seed", range(3))
def test_no_unit_dies_where_a_plain_top_kills_some(seed) -> None:
    scores, count = scores_of(CNN, seed), 60
    plain = keep_largest(scores, count, full_masks(CNN))
    assert dead_in_cnn(plain)
    masks = keep_largest_alive(CNN, scores, count, full_masks(CNN))
    assert dead_in_cnn(masks) == [] and num_kept(masks) == count


def test_what_is_pruned_never_comes_back_and_dead_units_stay_dead() -> None:
    scores = scores_of(CNN, 0)
    rng = np.random.default_rng(1)
    among = {name: rng.random(mask.shape) < 0.5 for name, mask in full_masks(CNN).items()}
    among["fc1.weight"][2] = False
    masks = keep_largest_alive(CNN, scores, 50, among)
    assert num_kept(masks) == 50
    assert not any((masks[name] & ~among[name]).any() for name in masks)
    assert dead_in_cnn(masks) == dead_in_cnn(among)
    assert "into fc1[2]" in dead_in_cnn(masks)
    everything = keep_largest_alive(CNN, scores, 10_000, among)
    assert all(np.array_equal(everything[name], among[name]) for name in among)


def test_with_room_for_all_it_is_a_plain_top() -> None:
    scores = scores_of(CNN, 2)
    count = num_kept(full_masks(CNN)) - 5
    plain = keep_largest(scores, count, full_masks(CNN))
    assert dead_in_cnn(plain) == []
    masks = keep_largest_alive(CNN, scores, count, full_masks(CNN))
    assert all(np.array_equal(masks[name], plain[name]) for name in plain)
