"""Which activations share channels, by hand."""

from __future__ import annotations

from engine.cases import BLOCK, CONV

from fedlean.channels import channels
from fedlean.layers import (
    Add,
    Concat,
    Conv2d,
    Flatten,
    GlobalAvgPool,
    Hardsigmoid,
    Linear,
    ReLU,
    Scale,
)
from fedlean.models.resnet import resnet8
from fedlean.narrowed import narrowed
from fedlean.spec import INPUT, ModelSpec, Node


def described(spec: ModelSpec) -> dict[str, tuple[str, int, int]]:
    """Activation -> space, its count, spread."""
    return {n: (c.space.name, c.space.count, c.spread) for n, c in channels(spec).items()}


def fixed(spec: ModelSpec) -> set[str]:
    return {c.space.name for c in channels(spec).values() if c.space.fixed}


def test_a_mobile_block_by_hand():
    """The residual sum joins project to stem; the gate joins excite to expand; reduce is alone."""
    found = described(BLOCK)
    assert found[INPUT] == (INPUT, 3, 1)
    for name in ("stem", "project", "bn3", "sum"):
        assert found[name] == ("stem", 4, 1)
    for name in ("expand", "swish1", "depth", "swish2", "squeeze", "excite", "gate", "scale"):
        assert found[name] == ("expand", 12, 1)
    assert found["reduce"] == found["relu"] == ("reduce", 4, 1)
    assert found["grouped"] == found["avg"] == ("grouped", 6, 1)
    assert found["flat"] == ("grouped", 6, 6)
    assert fixed(BLOCK) == {INPUT, "fc"}


def test_flatten_spreads_channels_over_pixels():
    assert described(CONV)["flat"] == ("conv2", 4, 1)
    assert described(CONV)["conv2"] == ("conv2", 4, 1)


def test_a_residual_stage_is_one_space():
    found = described(resnet8((3, 8, 8), 10))
    assert found["stem"] == found["stage1_1_conv2"] == found["stage1_1_relu2"] == ("stem", 16, 1)
    assert found["stage1_1_conv1"] == ("stage1_1_conv1", 16, 1)
    assert found["stage2_1_down"] == found["stage2_1_conv2"] == ("stage2_1_conv2", 32, 1)
    assert found["pool"] == found["stage3_1_conv2"]


def test_blocks_are_those_of_the_first_layer():
    found = channels(resnet8((3, 8, 8), 10))
    assert found["stage1_1_relu2"].space.block == "stem"
    assert found["stage2_1_relu2"].space.block == "stage2"
    assert found[INPUT].space.block == ""


def test_what_is_joined_stays():
    nodes = (
        Node("a", Conv2d(4, 1), (INPUT,)),
        Node("b", Conv2d(6, 1), (INPUT,)),
        Node("cat", Concat(), ("a", "b")),
        Node("mix", Conv2d(5, 1), ("cat",)),
        Node("pool", GlobalAvgPool(), ("mix",)),
        _out("pool"),
    )
    spec = ModelSpec((3, 4, 4), nodes)
    assert described(spec)["cat"] == ("cat", 10, 1)
    assert fixed(spec) == {INPUT, "a", "b", "cat", "out"}
    assert narrowed(spec, 0.4).shapes["mix"] == (2, 4, 4)


def test_what_is_added_to_the_input_stays():
    spec = ModelSpec(
        (4,), (Node("a", Linear(4), (INPUT,)), Node("sum", Add(), ("a", INPUT)), _out("sum"))
    )
    assert described(spec)["a"] == (INPUT, 4, 1) and fixed(spec) == {INPUT, "out"}


def test_spaces_that_are_added_in_pieces_are_coarsened():
    """12 units, 4 maps of 3 pixels, and 6 maps of 2: only lcm(3, 2) entries can go together."""
    spec = ModelSpec(
        (2, 6, 1),
        (
            Node("vector", Flatten(), (INPUT,)),
            Node("units", Linear(12), ("vector",)),
            Node("high", Conv2d(4, 1, stride=2), (INPUT,)),
            Node("high_flat", Flatten(), ("high",)),
            Node("low", Conv2d(6, 1, stride=3), (INPUT,)),
            Node("low_flat", Flatten(), ("low",)),
            Node("one", Add(), ("units", "high_flat")),
            Node("two", Add(), ("one", "low_flat")),
            _out("two"),
        ),
    )
    found = described(spec)
    assert spec.shapes["high"] == (4, 3, 1) and spec.shapes["low"] == (6, 2, 1)
    assert found["units"] == found["two"] == ("units", 2, 6)
    assert found["high"] == ("units", 2, 2)  # 2 of the 4 maps go together
    assert found["low"] == ("units", 2, 3)


def test_a_depthwise_convolution_may_make_several_of_each():
    spec = ModelSpec(
        (1, 4, 4),
        (
            Node("conv", Conv2d(3, 3), (INPUT,)),
            Node("twice", Conv2d(6, 1, groups=3), ("conv",)),
            Node("single", Conv2d(5, 1, groups=1), (INPUT,)),  # one input: dense, not depthwise
            Node("flat", Flatten(), ("twice",)),
            _out("flat"),
        ),
    )
    found = described(spec)
    assert found["twice"] == ("conv", 3, 2) and found["flat"] == ("conv", 3, 8)
    assert found["single"] == ("single", 5, 1)


def test_a_gate_of_pooled_pixels():
    """A gate of one channel per pixel of another image is as coarse as that."""
    spec = ModelSpec(
        (2, 2, 2),
        (
            Node("image", Conv2d(8, 1), (INPUT,)),
            Node("small", Conv2d(2, 1), (INPUT,)),
            Node("flat", Flatten(), ("small",)),
            Node("gate", Hardsigmoid(), ("flat",)),
            Node("scale", Scale(), ("image", "gate")),
            Node("pool", GlobalAvgPool(), ("scale",)),
            Node("relu", ReLU(), ("pool",)),
            _out("relu"),
        ),
    )
    assert described(spec)["image"] == ("image", 2, 4)
    assert described(spec)["small"] == ("image", 2, 1)


def _out(source: str) -> Node:
    return Node("out", Linear(3), (source,))
