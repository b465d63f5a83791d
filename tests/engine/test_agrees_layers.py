"""Every layer, in every setting, agrees with masked-dense float64 to 1e-5."""

from __future__ import annotations

from itertools import cycle

import pytest
from engine.agreement import DENSITIES, SIZES, check_gradients, check_training
from engine.cases import masks_of

from fedlean.layers import (
    GELU,
    AvgPool1d,
    AvgPool2d,
    BatchNorm,
    Conv1d,
    Conv2d,
    Dropout,
    Flatten,
    GlobalAvgPool,
    GroupNorm,
    Hardsigmoid,
    Hardswish,
    Hardtanh,
    LeakyReLU,
    Linear,
    MaxPool1d,
    MaxPool2d,
    ReLU,
    Scaler,
    Sigmoid,
    SiLU,
    Tanh,
)
from fedlean.spec import LAYERS, sequential


def between(layer, shape=(4, 8, 7)):
    """The layer on `shape` with a trained layer below it and, where it gives no logits, above."""
    if len(shape) == 1:
        nodes = [("stem", Linear(shape[0])), ("n", layer), ("head", Linear(3))]
        return sequential((5,), nodes)
    stem = (Conv2d if len(shape) == 3 else Conv1d)(
        shape[0], 1, bias=not isinstance(layer, BatchNorm)
    )
    above = [("flat", Flatten()), ("head", Linear(3))]
    if isinstance(layer, GlobalAvgPool | Flatten):
        above = above[1:]
    return sequential((2, *shape[1:]), [("stem", stem), ("n", layer), *above])


CASES = {
    "conv": between(Conv2d(6, 3)),
    "conv no bias": between(Conv2d(6, 3, padding=1, bias=False)),
    "conv groups": between(Conv2d(6, 3, groups=2)),
    "conv groups, stride, padding": between(Conv2d(6, 5, 2, 2, groups=2, bias=False)),
    "conv 1x1": between(Conv2d(7, 1)),
    "conv 1x1 stride": between(Conv2d(7, 1, stride=2)),
    "conv 1x1 groups": between(Conv2d(8, 1, groups=4)),
    "conv 1x1 padding": between(Conv2d(3, 1, padding=1)),
    "conv of the whole image": between(Conv2d(5, 7), (4, 7, 7)),
    "conv on one pixel": between(Conv2d(5, 3, padding=1), (4, 1, 1)),
    "conv on one row": between(Conv2d(5, 3, padding=1), (3, 1, 19)),
    "conv on one column": between(Conv2d(5, 3, padding=2), (3, 19, 1)),
    "conv of one channel": between(Conv2d(1, 3), (1, 6, 6)),
    "conv of odd channels": between(Conv2d(33, 3, padding=1), (17, 5, 6)),
    "conv of many rows and columns": between(Conv2d(3, 5, padding=2), (3, 18, 35)),
    "conv of a row": between(Conv2d(6, (1, 3))),
    "conv of a column": between(Conv2d(6, (5, 1), padding=(2, 0), bias=False)),
    "conv of a rectangle": between(Conv2d(6, (3, 5), padding=(1, 2))),
    "conv of a rectangle, much padding": between(Conv2d(3, (2, 4), padding=(3, 0))),
    "conv stride of rows": between(Conv2d(6, 3, (2, 1), 1)),
    "conv stride of columns": between(Conv2d(6, (3, 4), (1, 3), (0, 2))),
    "conv stride of both": between(Conv2d(6, (5, 2), (2, 3), (1, 0), 2)),
    "conv dilation": between(Conv2d(6, 3, padding=2, dilation=2)),
    "conv dilation of rows": between(Conv2d(6, 3, 1, (3, 0), dilation=(3, 1))),
    "conv dilation, stride": between(Conv2d(6, 3, 2, 2, dilation=2), (4, 11, 10)),
    "conv dilation, other stride": between(Conv2d(6, 3, 3, 2, dilation=2), (4, 11, 10)),
    "conv dilation, stride, groups": between(
        Conv2d(4, (2, 4), (4, 2), 1, 2, dilation=(6, 3)), (4, 12, 13)
    ),
    "depthwise of a rectangle": between(Conv2d(4, (1, 5), padding=(0, 2), groups=4)),
    "signal conv": between(Conv1d(6, 5), (4, 23)),
    "signal conv padding": between(Conv1d(6, 5, padding=2, bias=False), (4, 23)),
    "signal conv of one": between(Conv1d(7, 1), (4, 23)),
    "signal conv stride": between(Conv1d(6, 5, 2, 2), (4, 23)),
    "signal conv dilation": between(Conv1d(6, 3, padding=4, dilation=4), (4, 23)),
    "signal conv groups": between(Conv1d(6, 3, 3, 1, 2), (4, 23)),
    "signal conv of long kernels": between(Conv1d(5, 40, padding=20), (3, 50)),
    "signal depthwise": between(Conv1d(4, 7, padding=3, groups=4), (4, 23)),
    "depthwise": between(Conv2d(4, 3, padding=1, groups=4)),
    "depthwise stride": between(Conv2d(4, 5, 2, 2, groups=4, bias=False)),
    "depthwise of odd channels": between(Conv2d(19, 3, padding=1, groups=19), (19, 5, 5)),
    "depthwise multiplier": between(Conv2d(12, 3, groups=4)),
    "linear": between(Linear(9), (13,)),
    "linear no bias": between(Linear(9, bias=False), (13,)),
    "linear of one": between(Linear(1), (1,)),
    "linear of odd sizes": between(Linear(67), (129,)),
    "max pool": between(MaxPool2d(2)),
    "max pool overlapping": between(MaxPool2d(3, 2)),
    "max pool padding": between(MaxPool2d(3, 2, 1)),
    "max pool wide padding": between(MaxPool2d(4, 1, 2)),
    "max pool gaps": between(MaxPool2d(2, 3)),
    "max pool of one": between(MaxPool2d(1)),
    "max pool of a row": between(MaxPool2d((1, 2))),
    "max pool of a rectangle": between(MaxPool2d((3, 2), (1, 2), (1, 0))),
    "max pool of a rectangle, gaps": between(MaxPool2d((2, 1), (3, 2))),
    "max pool of all": between(MaxPool2d((8, 7))),
    "signal max pool": between(MaxPool1d(2), (4, 23)),
    "signal max pool overlapping": between(MaxPool1d(5, 2, 2), (4, 23)),
    "avg pool of a row": between(AvgPool2d((1, 3))),
    "avg pool of a rectangle": between(AvgPool2d((3, 2), (1, 2), (1, 0))),
    "signal avg pool": between(AvgPool1d(4), (4, 23)),
    "signal avg pool overlapping": between(AvgPool1d(5, 2, 2), (4, 23)),
    "avg pool": between(AvgPool2d(2)),
    "avg pool overlapping": between(AvgPool2d(3, 1)),
    "avg pool padding": between(AvgPool2d(3, 2, 1)),
    "avg pool wide padding": between(AvgPool2d(5, 2, 2)),
    "avg pool gaps": between(AvgPool2d(2, 3)),
    "global pool": between(GlobalAvgPool()),
    "global pool of a signal": between(GlobalAvgPool(), (4, 23)),
    "group norm of a signal": between(GroupNorm(groups=2), (4, 23)),
    "batch norm of a signal": between(BatchNorm(), (4, 23)),
    "relu of a signal": between(ReLU(), (4, 23)),
    "flatten of a signal": between(Flatten(), (4, 23)),
    "group norm": between(GroupNorm(groups=2)),
    "group norm of all": between(GroupNorm(groups=1)),
    "group norm of each": between(GroupNorm(groups=4, eps=0.1)),
    "group norm of a vector": between(GroupNorm(groups=3), (12,)),
    "batch norm": between(BatchNorm()),
    "batch norm eps, momentum": between(BatchNorm(eps=0.01, momentum=0.4)),
    "batch norm of odd channels": between(BatchNorm(), (19, 3, 2)),
    "relu": between(ReLU()),
    "relu of a vector": between(ReLU(), (9,)),
    "hardswish": between(Hardswish()),
    "hardswish of a vector": between(Hardswish(), (9,)),
    "hardsigmoid": between(Hardsigmoid()),
    "hardsigmoid of a vector": between(Hardsigmoid(), (9,)),
    "leaky relu": between(LeakyReLU(0.2)),
    "leaky relu of a vector": between(LeakyReLU(), (9,)),
    "hardtanh": between(Hardtanh(-0.5, 0.75)),
    "relu6": between(Hardtanh(0.0, 6.0)),
    "sigmoid": between(Sigmoid()),
    "sigmoid of a vector": between(Sigmoid(), (9,)),
    "tanh": between(Tanh()),
    "silu": between(SiLU()),
    "silu of a signal": between(SiLU(), (4, 23)),
    "gelu": between(GELU()),
    "gelu of a vector": between(GELU(), (9,)),
    "gelu by tanh": between(GELU(tanh=True)),
    "scaler": between(Scaler(2.0)),
    "scaler of a vector": between(Scaler(0.3), (9,)),
    "dropout": between(Dropout(0.4)),
    "dropout of a vector": between(Dropout(0.5), (37,)),
    "dropout of a signal": between(Dropout(0.1), (4, 23)),
    "dropout of channels": between(Dropout(0.5, channels=True), (19, 5, 4)),
    "dropout of a signal's channels": between(Dropout(0.3, channels=True), (4, 23)),
    "flatten": between(Flatten()),
    "flatten of a vector": between(Flatten(), (9,)),
}


def test_every_layer_of_one_input_has_a_case():
    """Add, Concat and Scale are among the graphs."""
    seen = {type(node.layer).__name__ for spec in CASES.values() for node in spec.nodes}
    assert seen == set(LAYERS) - {"Add", "Concat", "Scale"}


def with_densities():
    """All densities where there is a weight to prune, and sizes in turn, so that all meet."""
    sizes = cycle(SIZES)
    for case, spec in CASES.items():
        weighted = isinstance(spec.by_name["n"].layer, Conv2d | Linear)
        for density in DENSITIES if weighted else (0.3, 1.0):
            yield pytest.param(spec, density, next(sizes), id=f"{case}-{density}")


@pytest.mark.parametrize(("spec", "density", "size"), list(with_densities()))
def test_gradients(engine, spec, density, size):
    check_gradients(engine, spec, size=size, masks=masks_of(spec, density))


@pytest.mark.parametrize(("spec", "density", "size"), list(with_densities()))
def test_training(engine, spec, density, size):
    loss = "ce" if size % 2 else "bce"
    check_training(engine, spec, size=size, masks=masks_of(spec, density), loss=loss)


@pytest.mark.parametrize("kernel", range(1, 8))
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_convolution(engine, kernel, stride, padding):
    """Sparse and dense, at sides that the stride does not divide."""
    spec = between(Conv2d(5, kernel, stride, padding), (3, 10, 9))
    sizes = iter(SIZES[(kernel + stride + padding) % 4 :: 4])
    for density in (0.15, 0.7):
        check_gradients(engine, spec, size=next(sizes), masks=masks_of(spec, density))
