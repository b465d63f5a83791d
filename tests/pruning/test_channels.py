"""Which weights belong to a channel, by hand and on every kind of model."""

from __future__ import annotations

import numpy as np
import pytest
from federation import SPEC, params

from fedlean.layers import Add, Concat, Conv2d, Flatten, GlobalAvgPool, Linear, ReLU, Scale
from fedlean.models.initialise import init_params
from fedlean.models.lenet300 import lenet300
from fedlean.models.mobilenetv3 import mobilenetv3_small
from fedlean.models.resnet import resnet8
from fedlean.pruning.channels import channel_masks, channels, living
from fedlean.spec import ModelSpec, Node

MODELS = {
    "small": SPEC,
    "lenet300": lenet300((1, 8, 8), 10),
    "resnet8": resnet8((3, 8, 8), 10),
    "mobilenet": mobilenetv3_small((3, 32, 32), 10),
}


def test_a_chain_by_hand():
    """1 image -> 4 maps, each 16 pixels of fc1's input -> 12 units -> 3 classes."""
    found = channels(SPEC)
    assert found.fixed.tolist() == [True] + [False] * 16 + [True] * 3
    assert found.rows["conv.weight"].tolist() == [1, 2, 3, 4]
    assert found.columns["conv.weight"].tolist() == [[0]]
    assert found.columns["fc1.weight"][0].tolist() == np.repeat([1, 2, 3, 4], 16).tolist()
    assert found.rows["fc1.weight"].tolist() == list(range(5, 17))
    assert found.columns["fc2.weight"].tolist() == [list(range(5, 17))]
    assert found.rows["fc2.weight"].tolist() == [17, 18, 19]


def test_joined_channels_keep_their_numbers():
    nodes = (
        Node("a", Conv2d(2, 1), ("input",)),
        Node("b", Conv2d(3, 1), ("input",)),
        Node("cat", Concat(), ("b", "a", "b")),
        Node("mix", Conv2d(4, 1), ("cat",)),
    )
    found = channels(ModelSpec((1, 4, 4), nodes))
    a, b = (found.rows[f"{name}.weight"].tolist() for name in "ab")
    assert found.columns["mix.weight"].tolist() == [[*b, *a, *b]]


def test_a_channel_lives_while_a_weight_makes_or_reads_it():
    found = channels(SPEC)
    weights = {name: np.zeros_like(value) for name, value in params().items()}
    weights["conv.weight"][1, 0, 2, 2] = -0.3  # makes map 2 and reads the image
    weights["fc1.weight"][7, 40] = 0.2  # reads pixel 8 of map 3, makes unit 12
    weights["fc2.weight"][:, 3] = 1e-4  # reads unit 8, not above the threshold
    weights["fc1.bias"][:] = 9.0  # no weight of a channel
    alive = living(found, weights, 1e-4)
    assert np.flatnonzero(alive).tolist() == [0, 2, 3, 12, 17, 18, 19]
    assert living(found, weights, 9e-5)[8]
    masks = channel_masks(found, alive, SPEC)
    assert np.flatnonzero(masks["conv.weight"].any((1, 2, 3))).tolist() == [1, 2]
    assert masks["conv.weight"][1].all()
    expected = np.zeros((12, 64), bool)
    expected[7, 16:48] = True
    assert np.array_equal(masks["fc1.weight"], expected)
    assert np.array_equal(masks["fc2.weight"], np.tile(np.arange(12) == 7, (3, 1)))


def test_add_and_scale_tie_and_depthwise_keeps():
    """conv a -> relu -> depthwise b; a + b; gate of b; and the classes read the sum."""
    nodes = [
        Node("a", Conv2d(2, 1), ("input",)),
        Node("r", ReLU(), ("a",)),
        Node("b", Conv2d(2, 3, padding=1, groups=2), ("r",), prunable=False),
        Node("c", Conv2d(2, 1), ("b",)),
        Node("pool", GlobalAvgPool(), ("c",)),
        Node("gate", Linear(2), ("pool",)),
        Node("scaled", Scale(), ("c", "gate")),
        Node("sum", Add(), ("scaled", "a")),
        Node("flat", Flatten(), ("sum",)),
        Node("out", Linear(2), ("flat",)),
    ]
    found = channels(ModelSpec((1, 2, 2), tuple(nodes)))
    maps = found.rows["a.weight"].tolist()
    assert len(set(maps)) == 2
    for tied in ("b.weight", "c.weight", "gate.weight"):
        assert found.rows[tied].tolist() == maps
    assert found.columns["b.weight"].tolist() == [[maps[0]], [maps[1]]]
    assert found.columns["gate.weight"].tolist() == [maps]
    assert found.columns["out.weight"].tolist() == [np.repeat(maps, 4).tolist()]


def test_groups_of_several_channels():
    """4 channels in 2 groups: the first rows read channels 0 and 1, the others 2 and 3."""
    nodes = [
        Node("a", Conv2d(4, 1), ("input",)),
        Node("b", Conv2d(6, 1, groups=2), ("a",)),
        Node("c", Conv2d(1, 1), ("b",)),
    ]
    spec = ModelSpec((1, 2, 2), tuple(nodes))
    found = channels(spec)
    first = int(found.rows["a.weight"][0])
    assert found.columns["b.weight"].tolist() == [[first, first + 1], [first + 2, first + 3]]
    weights = {name: np.zeros(shape, np.float32) for name, shape in spec.tensor_shapes.items()}
    weights["b.weight"][3, 1] = 1.0  # the second group's second input
    alive = living(found, weights, 0.0)
    assert alive[found.rows["a.weight"]].tolist() == [False, False, False, True]
    assert alive[found.rows["b.weight"]].tolist() == [False] * 3 + [True] + [False] * 2
    masks = channel_masks(found, alive, spec)
    assert np.argwhere(masks["b.weight"]).tolist() == [[3, 1, 0, 0]]
    assert np.argwhere(masks["a.weight"]).tolist() == [[3, 0, 0, 0]]


@pytest.mark.parametrize("model", list(MODELS))
@pytest.mark.parametrize("seed", range(3))
def test_exactly_the_channels_without_weights_die(model, seed):
    """Zero every weight of some channels: those die and no other, and the masks cut zeros only."""
    spec = MODELS[model]
    found, rng = channels(spec), np.random.default_rng(seed)
    used = np.unique(
        np.concatenate([c.ravel() for c in (*found.rows.values(), *found.columns.values())])
    )
    free = used[~found.fixed[used]]
    dead = np.zeros(len(found.fixed), bool)
    dead[rng.choice(free, len(free) // 3, replace=False)] = True
    weights = init_params(spec, seed)
    for name, rows in found.rows.items():
        columns = found.columns[name]
        shape = weights[name].shape
        per_row = np.repeat(columns, shape[0] // len(columns), axis=0)
        gone = dead[rows][:, None] | dead[per_row]
        weights[name][gone] = 0.0
    alive = living(found, weights, 0.0)
    assert np.array_equal(alive[used], ~dead[used])
    masks = channel_masks(found, alive, spec)
    assert set(masks) == set(spec.prunable)
    for name, mask in masks.items():
        assert np.array_equal(mask, weights[name] != 0)
