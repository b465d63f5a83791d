"""Whole networks agree with masked-dense float64: sizes, patterns, optimisers, frozen parts."""

from __future__ import annotations

import numpy as np
import pytest
from engine.agreement import DENSITIES, SIZES, check_gradients, check_training
from engine.cases import FULL_SGD, LOSSES, NET, masks_of

from fedlean.engine.protocol import SGD
from fedlean.layers import (
    Conv2d,
    Flatten,
    GlobalAvgPool,
    Linear,
    MaxPool2d,
    ReLU,
)
from fedlean.spec import sequential

WEIGHTS = ["conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("loss", LOSSES)
def test_batches_of_all_sizes(engine, size, loss):
    check_training(engine, NET, size=size, masks=masks_of(NET, 0.3), loss=loss)


@pytest.mark.parametrize("size", [1, 5, 17])
@pytest.mark.parametrize("density", DENSITIES)
def test_densities(engine, size, density):
    check_gradients(engine, NET, size=size, masks=masks_of(NET, density))


@pytest.mark.parametrize(
    "sgd",
    [
        SGD(0.3),
        SGD(0.3, momentum=0.9),
        SGD(0.3, weight_decay=0.1),
        SGD(0.3, clip_norm=0.05),
        SGD(0.3, 0.5, clip_norm=1e6),
        SGD(0.3, proximal=0.5),
        SGD(0.3, momentum=0.9, proximal=0.5, clip_norm=0.5),
        SGD(0.0, momentum=0.9),
        FULL_SGD,
    ],
    ids=str,
)
def test_optimisers(engine, sgd):
    """Alone and together, with a layer that has no mask and one that is frozen."""
    masks = masks_of(NET, 0.3)
    del masks["fc1.weight"]
    check_training(engine, NET, size=5, masks=masks, frozen={"gn.bias"}, sgd=sgd, steps=4)


# Patterns


def rows(shape, kept):
    mask = np.zeros(shape, bool)
    mask[list(kept)] = True
    return mask


def columns(shape, kept):
    return np.moveaxis(rows((shape[1], shape[0], *shape[2:]), kept), 0, 1).copy()


def taps(shape, kept):
    """For a convolution the same places of every kernel; for a Linear layer every other input."""
    return np.broadcast_to(np.resize([i in kept for i in range(5)], shape[1:]), shape).copy()


PATTERNS = {
    "empty rows": lambda shape: rows(shape, range(0, shape[0], 3)),
    "one row": lambda shape: rows(shape, [shape[0] // 2]),
    "empty columns": lambda shape: columns(shape, range(1, shape[1], 2)),
    "one column": lambda shape: columns(shape, [shape[1] - 1]),
    "one weight": lambda shape: rows(shape, [1]) & columns(shape, [1]) & taps(shape, [1, 3]),
    "corners": lambda shape: rows(shape, [0, shape[0] - 1]) | columns(shape, [0, shape[1] - 1]),
    "same taps": lambda shape: taps(shape, [0, 4]),
    "checkers": lambda shape: (np.indices(shape).sum(0) % 2).astype(bool),
    "skewed": lambda shape: rows(shape, [0]) | (np.indices(shape).sum(0) % 11 == 0),
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns(engine, pattern):
    masks = {name: PATTERNS[pattern](NET.param_shapes[name]) for name in WEIGHTS}
    assert all(0 < mask.sum() < mask.size for mask in masks.values())
    check_gradients(engine, NET, size=6, masks=masks)
    check_training(engine, NET, size=6, masks=masks)


@pytest.mark.parametrize("pruned", WEIGHTS)
def test_a_fully_pruned_layer(engine, pruned):
    """Nothing gets through but biases, to which the layers above are trained."""
    masks = masks_of(NET, 0.5) | {pruned: np.zeros(NET.param_shapes[pruned], bool)}
    check_gradients(engine, NET, size=5, masks=masks)
    check_training(engine, NET, size=5, masks=masks)


@pytest.mark.parametrize("masked", WEIGHTS)
@pytest.mark.parametrize("density", [0.05, 0.8])
def test_one_masked_layer_among_dense_ones(engine, masked, density):
    masks = {masked: masks_of(NET, density)[masked]}
    check_training(engine, NET, size=7, masks=masks)


# Frozen tensors


@pytest.mark.parametrize("size", [1, 5, 33])
@pytest.mark.parametrize("depth", range(1, 7))
def test_frozen_prefix(engine, depth, size):
    """The lowest layers with parameters, all tensors of each: only a forward pass is left."""
    owners = list(dict.fromkeys(name.split(".")[0] for name in NET.tensor_shapes))
    owners = sorted(owners, key=list(NET.by_name).index)[:depth]
    frozen = {name for name in NET.tensor_shapes if name.split(".")[0] in owners}
    check_gradients(engine, NET, size=size, masks=masks_of(NET, 0.4), frozen=frozen)
    check_training(engine, NET, size=size, masks=masks_of(NET, 0.4), frozen=frozen)


@pytest.mark.parametrize(
    "frozen",
    [
        {"fc2.weight", "fc2.bias"},
        {"conv2.weight", "fc1.bias"},
        {"bn.running_mean", "bn.running_var"},
        {"bn.weight", "bn.bias"},
        {"gn.weight", "conv1.bias"},
        set(WEIGHTS),
        {"conv1.bias", "fc1.bias", "fc2.bias", "gn.bias", "bn.bias"},
        set(NET.param_shapes) - {"conv1.weight"},
        set(NET.param_shapes) - {"fc1.weight"},
    ],
    ids=lambda frozen: " ".join(sorted(frozen)),
)
def test_frozen_parts(engine, frozen):
    check_gradients(engine, NET, size=5, masks=masks_of(NET, 0.4), frozen=frozen)
    check_training(engine, NET, size=5, masks=masks_of(NET, 0.4), frozen=frozen)


# Sizes that cut a kernel's loops


WIDE = {
    # more inputs, or outputs, than 16 bits can count
    "many inputs": (sequential((70_000,), [("fc", Linear(3))]), 0.05),
    "many outputs": (sequential((2,), [("fc", Linear(70_000)), ("fc2", Linear(3))]), 0.05),
    # one channel of this image has more pixels than 16 bits can count
    "large image": (
        sequential((2, 260, 255), [("c", Conv2d(3, 3, 2, bias=False)), ("p", GlobalAvgPool())]),
        0.5,
    ),
    "many channels": (
        sequential((67, 5, 4), [("c", Conv2d(131, 3)), ("f", Flatten()), ("fc", Linear(10))]),
        0.1,
    ),
    "many channels, 1x1": (
        sequential((130, 3, 3), [("c", Conv2d(65, 1)), ("p", GlobalAvgPool())]),
        0.02,
    ),
    "conv2 at 14 x 14": (
        sequential(
            (8, 14, 14),
            [("c", Conv2d(33, 5, padding=2)), ("m", MaxPool2d(2)), ("p", GlobalAvgPool())],
        ),
        0.1,
    ),
    "vgg at 16 x 16": (
        sequential((17, 16, 16), [("c", Conv2d(24, 3, padding=1)), ("p", GlobalAvgPool())]),
        0.25,
    ),
    "lenet300": (
        sequential((784,), [("a", Linear(300)), ("r", ReLU()), ("b", Linear(100))]),
        0.1,
    ),
}


@pytest.mark.parametrize("case", WIDE)
def test_large_layers(engine, case):
    spec, density = WIDE[case]
    check_training(engine, spec, size=5, masks=masks_of(spec, density), steps=2)


def test_large_layers_dense(engine):
    spec, _ = WIDE["many channels"]
    check_training(engine, spec, size=21, steps=2)
