"""Frozen blocks and frozen beginnings by hand, and against a walk of every path."""

from __future__ import annotations

import pytest
from engine.cases import BLOCK
from engine.test_agrees_random import networks
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlean.freezing.beginning import (
    Split,
    frozen_beginning,
    frozen_blocks,
    split,
    split_alone,
)
from fedlean.layers import BatchNorm, Conv2d, Flatten, Linear, ReLU
from fedlean.models.resnet import resnet18
from fedlean.spans import after, crossing, upto
from fedlean.spec import INPUT, ModelSpec, sequential

RUNS = settings(max_examples=150, deadline=None, derandomize=True, database=None)
SPEC = sequential(
    (2, 4, 4),
    [
        ("conv", Conv2d(3, 3), "one"),
        ("norm", BatchNorm(), "one"),
        ("relu", ReLU(), "two"),
        ("flat", Flatten(), "two"),
        ("fc1", Linear(4), "two"),
        ("fc2", Linear(3), "three"),
    ],
)
ONE = {f"norm.{name}" for name in ("weight", "bias", "running_mean", "running_var")}
ONE |= {"conv.weight", "conv.bias"}
RESNET = resnet18((3, 32, 32), 10, blocks="unit")


def test_frozen_blocks_are_their_parameters_and_buffers():
    assert frozen_blocks(SPEC, ["one"]) == ONE
    assert frozen_blocks(SPEC, ["three", "one"]) == ONE | {"fc2.weight", "fc2.bias"}
    assert frozen_blocks(SPEC, []) == frozenset()
    with pytest.raises(ValueError, match="no block 'four'; it has one, two, three"):
        frozen_blocks(SPEC, ["one", "four"])


def test_a_beginning_reaches_to_what_trains():
    """Layers without tensors belong to it; a norm whose statistics move does not."""
    assert frozen_beginning(SPEC, ONE) == ("conv", "norm", "relu", "flat")
    assert frozen_beginning(SPEC, ONE - {"norm.running_var"}) == ("conv",)
    assert frozen_beginning(SPEC, ONE - {"conv.bias"}) == ()
    assert split(SPEC, ONE) == Split(upto(SPEC, "flat"), after(SPEC, "flat"), "flat")
    assert split(SPEC, ONE, at="norm").name == "norm"


def test_the_units_of_resnet18():
    blocks = list(RESNET.blocks)
    for count in range(1, 9):
        first, rest, name = split(RESNET, frozen_blocks(RESNET, blocks[:count]))
        assert name == RESNET.blocks[blocks[count - 1]][-1].name
        assert list(first.blocks) == blocks[:count] and list(rest.blocks) == blocks[count:]


def test_more_than_one_tensor_across_names_them_and_where_to_cut():
    """NeuLite also trains the tail of the block before: the shortcut goes around what is left."""
    tail = {"stage2_1_conv2.weight", "stage2_1_norm2.weight", "stage2_1_norm2.bias"}
    frozen = frozen_blocks(RESNET, list(RESNET.blocks)[:4]) - tail
    with pytest.raises(
        ValueError,
        match="leaves the frozen beginning: 'stage2_1_relu1', 'stage2_1_down_norm'; cut at "
        "'stage1_2_relu2', so that one tensor does",
    ):
        split(RESNET, frozen)
    first, rest, name = split(RESNET, frozen, at="stage1_2_relu2")
    assert name == "stage1_2_relu2"
    assert list(first.blocks) == ["stem", "stage1_1", "stage1_2"]
    assert rest.tensor_shapes.keys() > tail and "stage2_1_conv1.weight" in rest.tensor_shapes
    assert split_alone(RESNET, frozen) == (first, rest, name)


def test_where_one_tensor_leaves_it_the_cut_is_that_of_the_largest_beginning():
    blocks = list(RESNET.blocks)
    for count in range(1, 9):
        frozen = frozen_blocks(RESNET, blocks[:count])
        assert split_alone(RESNET, frozen) == split(RESNET, frozen)


@pytest.mark.parametrize(
    ("frozen", "at", "message"),
    [
        ((), "", "no beginning is frozen: layer 'conv'"),
        (("fc2.weight", "fc2.bias"), "", "no beginning is frozen"),
        (tuple(SPEC.tensor_shapes), "", "there is nothing to train"),
        (tuple(ONE), "fc1", "'fc1' is not in the frozen beginning, which reaches to 'flat'"),
        (tuple(ONE), "nowhere", "'nowhere' is not in the frozen beginning"),
    ],
)
def test_what_is_refused(frozen, at, message):
    with pytest.raises(ValueError, match=message):
        split(SPEC, frozen, at=at)


def test_a_model_without_any_place_to_cut():
    """The gate reads what the stem's way around reads: two tensors leave, and no layer alone."""
    first = frozenset(n for n in BLOCK.tensor_shapes if n.startswith(("expand", "bn1")))
    with pytest.raises(ValueError, match="no beginning is frozen"):
        split(BLOCK, first)  # the stem trains


def naive(spec: ModelSpec, frozen: frozenset[str]) -> set[str]:
    def trains(name: str) -> bool:
        if name == INPUT:
            return False
        own = any(t.rsplit(".", 1)[0] == name for t in spec.tensor_shapes.keys() - frozen)
        return own or any(trains(source) for source in spec.by_name[name].inputs)

    return {name for name in spec.by_name if not trains(name)}


@RUNS
@given(networks(), st.data())
def test_any_split_trains_nothing_before_the_cut(spec, data):
    spec = upto(spec, spec.nodes[-1].name)  # without dead ends
    frozen = data.draw(st.frozensets(st.sampled_from(sorted(spec.tensor_shapes))))
    first = data.draw(st.integers(0, len(spec.nodes)))
    early = {node.name for node in spec.nodes[:first]}
    frozen |= {name for name in spec.tensor_shapes if name.rsplit(".", 1)[0] in early}
    layers = naive(spec, frozen)
    assert set(frozen_beginning(spec, frozen)) == layers
    try:
        beginning, rest, name = split(spec, frozen)
    except ValueError:
        across = crossing(spec, layers)
        assert len(across) != 1 or across == (INPUT,) or spec.nodes[-1].name in layers
        return
    assert beginning.tensor_shapes.keys() <= frozen and name in layers
    assert beginning.tensor_shapes.keys() | rest.tensor_shapes.keys() == spec.tensor_shapes.keys()
    assert crossing(spec, layers) == (name,)
