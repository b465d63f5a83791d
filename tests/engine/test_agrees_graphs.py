"""Networks that are not chains agree with masked-dense float64 to 1e-5."""

from __future__ import annotations

import pytest
from engine.agreement import SIZES, check_gradients, check_training
from engine.cases import BLOCK, masks_of

from fedlean.layers import (
    Add,
    AvgPool2d,
    BatchNorm,
    Concat,
    Conv1d,
    Conv2d,
    Dropout,
    Flatten,
    GlobalAvgPool,
    GroupNorm,
    Hardsigmoid,
    Hardswish,
    Linear,
    MaxPool2d,
    ReLU,
    Scale,
    Scaler,
    Sigmoid,
)
from fedlean.spec import INPUT, ModelSpec, Node

IMAGE = (3, 6, 5)


def graph(*nodes, shape=IMAGE) -> ModelSpec:
    """(name, layer, *inputs): without inputs it reads the node before; an image gets a head."""
    built: list[Node] = []
    for name, layer, *inputs in nodes:
        before = built[-1].name if built else INPUT
        built.append(Node(name, layer, tuple(inputs) or (before,)))
    spec = ModelSpec(shape, tuple(built))
    if len(spec.output_shape) == 1:
        return spec
    return graph(*nodes, ("flat", Flatten()), ("head", Linear(3)), shape=shape)


def conv(channels=4, kernel=3, stride=1, groups=1) -> Conv2d:
    return Conv2d(channels, kernel, stride, kernel // 2, groups, bias=False)


CASES = {
    "add of two": graph(("a", conv()), ("b", conv(), INPUT), ("sum", Add(), "a", "b")),
    "add of three": graph(
        ("a", conv()),
        ("b", conv(4, 1), INPUT),
        ("c", ReLU(), "a"),
        ("sum", Add(), "a", "b", "c"),
    ),
    "add of four with repeats": graph(("a", conv()), ("sum", Add(), "a", "a", "a", "a")),
    "add of one twice and another": graph(
        ("a", conv()), ("b", Hardswish()), ("sum", Add(), "a", "b", "a")
    ),
    "add of the input": graph(("a", conv(3)), ("sum", Add(), "a", INPUT)),
    "add of the input alone": graph(("sum", Add(), INPUT, INPUT), ("a", conv())),
    "add of vectors": graph(
        ("a", Linear(5)),
        ("b", Linear(5), INPUT),
        ("sum", Add(), "a", "b"),
        ("relu", ReLU()),
        ("head", Linear(3)),
        shape=(7,),
    ),
    "add at the end": graph(
        ("a", Linear(4)), ("b", Linear(4), INPUT), ("sum", Add(), "a", "b", "a"), shape=(7,)
    ),
    "concat of two": graph(("a", conv()), ("b", conv(5), INPUT), ("cat", Concat(), "a", "b")),
    "concat with the input, repeats": graph(
        ("a", conv()), ("cat", Concat(), "a", INPUT, "a"), ("b", conv()), ("c", ReLU())
    ),
    "concat of branches": graph(
        ("stem", conv()),
        ("relu", ReLU()),
        ("wide", conv(3, 5), "relu"),
        ("pool", MaxPool2d(3, 1, 1), "relu"),
        ("cat", Concat(), "wide", "relu", "pool"),
        ("bn", BatchNorm()),
        ("drop", Dropout(0.3)),
        ("mix", conv(4, 1)),
        ("sum", Add(), "mix", "stem"),
    ),
    "concat of vectors": graph(
        ("a", Linear(5)),
        ("b", Linear(3), INPUT),
        ("cat", Concat(), "b", "a"),
        ("relu", ReLU()),
        ("again", Concat(), "relu", "a"),
        ("head", Linear(3)),
        shape=(7,),
    ),
    "concat of signals": graph(
        ("a", Conv1d(4, 5, padding=2)),
        ("b", Conv1d(3, 3, padding=2, dilation=2), INPUT),
        ("cat", Concat(), "a", "b"),
        ("c", Conv1d(4, 3, 2, 1)),
        ("gate", GlobalAvgPool()),
        ("sigmoid", Sigmoid()),
        ("scale", Scale(), "c", "sigmoid"),
        shape=(3, 21),
    ),
    "dropout read twice": graph(
        ("a", conv()), ("drop", Dropout(0.5)), ("b", conv(), "drop"), ("sum", Add(), "b", "drop")
    ),
    "residual block": graph(
        ("stem", conv()),
        ("bn1", BatchNorm()),
        ("relu1", ReLU()),
        ("conv", conv()),
        ("bn2", BatchNorm()),
        ("sum", Add(), "bn2", "relu1"),
        ("relu2", ReLU()),
        ("pool", GlobalAvgPool()),
        ("head", Linear(3)),
    ),
    "residual block with stride": graph(
        ("stem", conv()),
        ("relu", ReLU()),
        ("conv1", conv(6, 3, 2)),
        ("gn", GroupNorm(groups=3)),
        ("relu1", ReLU()),
        ("conv2", conv(6)),
        ("skip", conv(6, 1, 2), "relu"),
        ("sum", Add(), "conv2", "skip"),
        ("again", Add(), "sum", "relu1"),
    ),
    "diamond": graph(
        ("a", conv()),
        ("left", ReLU(), "a"),
        ("right", Hardswish(), "a"),
        ("sum", Add(), "left", "right"),
        ("conv", conv()),
    ),
    "diamond of diamonds": graph(
        ("a", conv()),
        ("b", ReLU()),
        ("c", Hardswish(), "a"),
        ("d", Add(), "b", "c"),
        ("e", conv()),
        ("f", conv(4, 1), "d"),
        ("g", Add(), "e", "f", "a"),
        ("h", Add(), "g", "d"),
    ),
    "readers of several kinds": graph(
        ("a", conv()),
        ("max", MaxPool2d(3, 1, 1), "a"),
        ("avg", AvgPool2d(3, 1, 1), "a"),
        ("wide", conv(4, 5), "a"),
        ("norm", GroupNorm(groups=2), "a"),
        ("sum", Add(), "max", "avg", "wide", "norm", "a"),
    ),
    "the input read by several": graph(
        ("a", conv(4, 3, 2)),
        ("b", conv(4, 5, 2), INPUT),
        ("pool", MaxPool2d(2, 2), INPUT),
        ("c", conv(4, 2), "pool"),
        ("d", MaxPool2d(2, 1), "c"),
        ("sum", Add(), "a", "b", "a"),
        ("flat", Flatten(), INPUT),
        ("left", Linear(3), "flat"),
        ("right0", Flatten(), "sum"),
        ("right", Linear(3)),
        ("logits", Add(), "left", "right"),
    ),
    "layers right on the input": graph(
        ("relu", ReLU()), ("gn", GroupNorm(groups=3)), ("max", MaxPool2d(2, 1)), ("a", conv())
    ),
    "batch norm right on the input": graph(("bn", BatchNorm()), ("a", conv())),
    "squeeze and excite": graph(
        ("a", conv()),
        ("squeeze", GlobalAvgPool()),
        ("fc1", Linear(2)),
        ("relu", ReLU()),
        ("fc2", Linear(4)),
        ("gate", Hardsigmoid()),
        ("scale", Scale(), "a", "gate"),
        ("swish", Hardswish()),
    ),
    "scale of the input": graph(("pool", GlobalAvgPool()), ("scale", Scale(), INPUT, "pool")),
    "scale by a gate that others read": graph(
        ("a", conv()),
        ("pool", GlobalAvgPool()),
        ("scale", Scale(), "a", "pool"),
        ("pool2", GlobalAvgPool(), "scale"),
        ("sum", Add(), "pool", "pool2"),
        ("head", Linear(3)),
    ),
    "scaled slice": graph(
        ("a", conv()),
        ("scaler1", Scaler(2.0)),
        ("bn", BatchNorm()),
        ("relu", ReLU()),
        ("pool", MaxPool2d(2)),
        ("b", conv(6)),
        ("scaler2", Scaler(1.6)),
        ("relu2", ReLU()),
    ),
    "scalers one on the other": graph(
        ("a", conv()), ("relu", ReLU()), ("by3", Scaler(3.0)), ("by_half", Scaler(0.5))
    ),
    "scalers of what others read": graph(
        ("a", conv()),
        ("twice", Scaler(2.0), "a"),
        ("triple", Scaler(3.0), "a"),
        ("b", conv(4, 5), "twice"),
        ("sum", Add(), "b", "triple", "twice", "a"),
    ),
    "scaler of the input": graph(("scaler", Scaler(4.0)), ("a", conv()), ("b", Scaler(0.25))),
    "scaler and flatten": graph(
        ("a", conv()), ("relu", ReLU()), ("flat", Flatten()), ("scaler", Scaler(2.0))
    ),
    "scaler at the end": graph(("a", Linear(5)), ("scaler", Scaler(1.5)), shape=(7,)),
    "inverted residual": BLOCK,
    "flatten of flatten": graph(
        ("a", conv()), ("flat1", Flatten()), ("flat2", Flatten()), ("head", Linear(3))
    ),
    "flatten read by two": graph(
        ("a", conv()),
        ("flat", Flatten()),
        ("b", Linear(6)),
        ("c", Linear(6), "flat"),
        ("sum", Add(), "b", "c"),
        ("pool", GlobalAvgPool(), "a"),
        ("d", Linear(6), "pool"),
        ("logits", Add(), "sum", "d"),
    ),
    "flatten of the input": graph(("flat", Flatten()), ("head", Linear(3))),
    "an image of one pixel": graph(
        ("a", conv(4)), ("b", conv(6, 1)), ("relu", ReLU()), shape=(5, 1, 1)
    ),
    "pool at the end": graph(("a", conv()), ("relu", ReLU()), ("pool", GlobalAvgPool())),
    "relu at the end": graph(("a", Linear(5)), ("relu", ReLU()), shape=(7,)),
    "norm at the end": graph(("a", Linear(6)), ("gn", GroupNorm(groups=2)), shape=(7,)),
    "flatten at the end": graph(("a", conv()), ("pool", MaxPool2d(5)), ("flat", Flatten())),
    "a branch that nothing reads": graph(
        ("a", conv()),
        ("exit1", GlobalAvgPool()),
        ("exit2", Linear(3)),
        ("b", ReLU(), "a"),
        ("c", conv()),
    ),
}


def cases(*densities):
    """Every graph at each density; sizes in turn, from 3 since BatchNorm needs some examples."""
    out = []
    for i, (case, spec) in enumerate(CASES.items()):
        for j, density in enumerate(densities):
            size = SIZES[1 + (i + 3 * j) % (len(SIZES) - 1)]
            out.append(pytest.param(spec, density, size, id=f"{case}-{density}"))
    return out


@pytest.mark.parametrize(("spec", "density", "size"), cases(0.0, 0.3, 1.0))
def test_gradients(engine, spec, density, size):
    check_gradients(engine, spec, size=size, masks=masks_of(spec, density))


@pytest.mark.parametrize(("spec", "density", "size"), cases(0.2, 0.7))
def test_training(engine, spec, density, size):
    loss = "ce" if size % 2 else "bce"
    check_training(engine, spec, size=size, masks=masks_of(spec, density), loss=loss)
