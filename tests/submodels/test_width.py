"""Slices by width: shapes and indices by hand, the same function, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from engine.cases import BLOCK, batch, opened, start
from engine.test_agrees_random import networks
from hypothesis import given, settings
from hypothesis import strategies as st
from submodels.embedded import embedded, output

from fedlean.layers import (
    BatchNorm,
    Conv2d,
    Flatten,
    GlobalAvgPool,
    GroupNorm,
    Hardsigmoid,
    Linear,
    ReLU,
    Scale,
)
from fedlean.models.conv2 import conv2
from fedlean.models.lenet5 import lenet5
from fedlean.models.lenet300 import lenet300
from fedlean.models.mlp import mlp
from fedlean.models.mobilenetv3 import mobilenetv3_small
from fedlean.models.resnet import resnet8, resnet18, resnet20
from fedlean.models.vgg import vgg11
from fedlean.narrowed import kept_channels, narrowed
from fedlean.spec import INPUT, ModelSpec, Node, sequential
from fedlean.submodels.choose import prefix, random, rolling
from fedlean.submodels.width import width

MODELS = {
    "resnet8": resnet8((3, 8, 8), 10, norm="batch"),
    "resnet18": resnet18((3, 8, 8), 10, norm="batch"),
    "resnet20": resnet20((3, 8, 8), 10, norm="batch"),
    "mobilenetv3_small": mobilenetv3_small((3, 16, 16), 10),
    "conv2": conv2((1, 8, 8), 10),
    "vgg11": vgg11((3, 32, 32), 10),
    "lenet300": lenet300((1, 8, 8), 10),
    "mlp": mlp((1, 8, 8), 10),
}
WITH_GROUP_NORM = {
    "resnet8": resnet8((3, 8, 8), 10),
    "resnet18": resnet18((3, 8, 8), 10),
    "resnet20": resnet20((3, 8, 8), 10),
    "mobilenetv3_small": mobilenetv3_small((3, 16, 16), 10, norm="group"),
    "lenet5": lenet5((1, 28, 28), 10),
}
CHOICES = {"prefix": prefix, "rolling": rolling(7), "random": random(3)}
LARGE = ("resnet18", "vgg11")  # these once per choice
CASES = [
    (name, choice, rate)
    for name in MODELS
    for number, choice in enumerate(CHOICES)
    for rate in ((0.5, 0.25, 0.75)[number : number + 1] if name in LARGE else (0.25, 0.5, 0.75))
]
SE = ModelSpec(
    (2, 4, 4),
    (
        Node("conv", Conv2d(6, 1), (INPUT,)),
        Node("bn", BatchNorm(), ("conv",)),
        Node("deep", Conv2d(6, 3, padding=1, groups=6), ("bn",)),
        Node("squeeze", GlobalAvgPool(), ("deep",)),
        Node("fc1", Linear(3), ("squeeze",)),
        Node("relu", ReLU(), ("fc1",)),
        Node("fc2", Linear(6), ("relu",)),
        Node("gate", Hardsigmoid(), ("fc2",)),
        Node("scale", Scale(), ("deep", "gate")),
        Node("flat", Flatten(), ("scale",)),
        Node("out", Linear(3), ("flat",)),
    ),
)


def ids(axes) -> list[list[int]]:
    return [np.r_[axis].tolist() for axis in axes]


def same_function(cut, seed: int = 0) -> None:
    """The cut gives what the full model gives with all else zero."""
    params = start(cut.full, seed)
    x, _ = batch(cut.full, 2)
    taken = cut.take(params)
    want = output(cut.full, embedded(cut, taken), x)
    np.testing.assert_allclose(output(cut.spec, taken, x), want, rtol=1e-9, atol=1e-9)


def test_conv2_by_hand():
    cut = width(conv2((1, 28, 28), 62), 0.5)
    assert {name: node.layer for name, node in cut.spec.by_name.items() if "c" in name} == {
        "conv1": Conv2d(16, 5, padding=2),
        "conv2": Conv2d(32, 5, padding=2),
        "fc1": Linear(1024),
        "fc2": Linear(62),
    }
    whole5 = slice(0, 5)
    assert dict(cut.index) == {
        "conv1.weight": (slice(0, 16), slice(0, 1), whole5, whole5),
        "conv1.bias": (slice(0, 16),),
        "conv2.weight": (slice(0, 32), slice(0, 16), whole5, whole5),
        "conv2.bias": (slice(0, 32),),
        "fc1.weight": (slice(0, 1024), slice(0, 32 * 7 * 7)),
        "fc1.bias": (slice(0, 1024),),
        "fc2.weight": (slice(0, 62), slice(0, 1024)),
        "fc2.bias": (slice(0, 62),),
    }


def test_a_squeeze_and_excite_block_by_hand():
    """4 of 6 channels from the fifth on, 2 of the 3 hidden units from the second (4 mod 3) on."""
    cut = width(SE, 0.6, rolling(4))
    assert cut.spec.by_name["deep"].layer == Conv2d(4, 3, padding=1, groups=4)
    kept = [0, 1, 4, 5]
    for name in ("conv.bias", "bn.weight", "bn.running_mean", "bn.running_var", "deep.bias"):
        assert ids(cut.index[name]) == [kept]
    assert ids(cut.index["conv.weight"]) == [kept, [0, 1], [0], [0]]
    assert ids(cut.index["deep.weight"]) == [kept, [0], [0, 1, 2], [0, 1, 2]]
    assert ids(cut.index["fc1.weight"]) == [[1, 2], kept]
    assert ids(cut.index["fc2.weight"]) == [kept, [1, 2]]
    pixels = [channel * 16 + pixel for channel in kept for pixel in range(16)]
    assert ids(cut.index["out.weight"]) == [[0, 1, 2], pixels]
    same_function(cut)


@pytest.mark.parametrize(("name", "choice", "rate"), CASES)
def test_a_slice_is_the_full_model_without_the_rest(name: str, choice: str, rate: float):
    cut = width(MODELS[name], rate, CHOICES[choice])
    assert cut.spec.num_params < rate * 1.1 * MODELS[name].num_params
    assert (cut.spec.input_shape, cut.spec.output_shape) == (MODELS[name].input_shape, (10,))
    assert ModelSpec.from_json(cut.spec.to_json()) == cut.spec
    same_function(cut)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["resnet8", "mobilenetv3_small", "conv2", "lenet300", "mlp"])
def test_rates_by_block(name: str, seed: int):
    rng = np.random.default_rng(seed)
    rates = {block: float(rng.uniform(0.05, 1)) for block in MODELS[name].blocks}
    same_function(width(MODELS[name], rates, random(seed)), seed)


@pytest.mark.parametrize("rate", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("name", WITH_GROUP_NORM)
def test_slices_with_group_norm(name: str, rate: float):
    spec = WITH_GROUP_NORM[name]
    cut = width(spec, rate, random(1), multiple=4)
    for node in cut.spec.nodes:
        if isinstance(node.layer, GroupNorm):
            assert node.layer == spec.by_name[node.name].layer
    assert cut.spec.num_params < spec.num_params


@pytest.mark.parametrize("name", MODELS)
def test_the_whole_width_is_the_model_itself(name: str):
    spec = MODELS[name]
    for cut in (width(spec, 1.0, random(0)), width(spec, {}), width(spec, 0.01, multiple=9999)):
        assert cut.spec.hash == spec.hash
        assert all(
            axes == tuple(slice(0, side) for side in spec.tensor_shapes[tensor])
            for tensor, axes in cut.index.items()
        )


def test_a_block_has_its_own_rate_and_the_others_stay():
    spec = resnet18((3, 8, 8), 10, norm="batch")
    shapes = width(spec, {"stage2": 0.5, "stage3": 0.75}).spec.shapes
    assert shapes["stem"][0] == shapes["stage1_1_conv1"][0] == shapes["stage1_2_relu2"][0] == 64
    assert shapes["stage2_1_conv1"][0] == shapes["stage2_1_down"][0] == 64  # of 128
    assert shapes["stage3_2_relu2"][0] == 192 and shapes["stage4_1_conv1"][0] == 512
    shapes = width(spec, {"stage1": 0.5}).spec.shapes  # its residual sum begins in the stem
    assert shapes["stage1_1_conv1"][0] == 32 and shapes["stage1_1_conv2"][0] == 64


def test_a_slice_of_a_slice_of_a_prefix_is_a_smaller_slice():
    outer = width(MODELS["conv2"], 0.5)
    inner = width(outer.spec, 0.5)
    once = width(MODELS["conv2"], 0.25)
    both = outer.compose(inner)
    assert both.spec == once.spec and both.index == once.index


@pytest.mark.parametrize("outer_choice", [random(0), rolling(2)], ids=["random", "rolling"])
@pytest.mark.parametrize("inner_choice", [random(1), rolling(1)], ids=["random", "rolling"])
def test_slices_compose(outer_choice, inner_choice):
    outer = width(MODELS["mobilenetv3_small"], 0.6, outer_choice)
    inner = width(outer.spec, 0.7, inner_choice)
    params = start(outer.full)
    taken = inner.take(outer.take(params))
    both = outer.compose(inner).take(params)
    assert all(np.array_equal(value, taken[name]) for name, value in both.items())
    same_function(outer.compose(inner))


@pytest.mark.parametrize(
    ("count", "rate", "kept"), [(100, 0.07, 7), (10, 0.1, 1), (3, 0.5, 2), (1, 0.01, 1), (7, 1, 7)]
)
def test_kept_channels_are_rounded_up(count: int, rate: float, kept: int):
    assert kept_channels(count, rate) == kept


def test_multiples():
    cut = width(conv2((1, 8, 8), 10), 0.3, multiple=8)
    assert cut.spec.shapes["conv1"][0] == 16  # ceil(9.6) = 10
    assert cut.spec.shapes["conv2"][0] == 24  # ceil(19.2) = 20


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    spec=networks(),
    rate=st.floats(0.05, 1.0),
    choose=st.sampled_from([prefix, rolling(3), random(1)]),
)
def test_random_networks(spec: ModelSpec, rate: float, choose):
    try:
        cut = width(spec, rate, choose)
    except ValueError as error:
        grouped = any(
            isinstance(n.layer, Conv2d | GroupNorm) and n.layer.groups > 1 for n in spec.nodes
        )
        assert grouped and "group" in str(error)
        with pytest.raises(ValueError, match="group"):
            narrowed(spec, rate)
        return
    assert narrowed(spec, rate) == cut.spec
    assert cut.spec.output_shape == spec.output_shape
    assert cut.spec.by_name.keys() == spec.by_name.keys()
    sliced = {n for n, shape in spec.shapes.items() if cut.spec.shapes[n] != shape}
    for name in sliced:
        assert kept_channels(spec.shapes[name][0], rate) <= cut.spec.shapes[name][0]
    if not any(isinstance(spec.by_name[name].layer, GroupNorm) for name in sliced - {INPUT}):
        same_function(cut)


@pytest.mark.parametrize("rate", [0.5, 0.75])
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small", "conv2"])
def test_engines_train_slices(engine, name: str, rate: float):
    cut = width(MODELS[name], rate, rolling(5))
    masks = cut.take_masks(
        {tensor: start(cut.full)[tensor] > 0 for tensor in cut.full.prunable[:2]}
    )
    assert all(mask.shape == cut.spec.tensor_shapes[tensor] for tensor, mask in masks.items())
    params = cut.take(start(cut.full))
    session = opened(engine, cut.spec, params, masks=masks, batch_size=4)
    x, y = batch(cut.spec, 4)
    losses = [session.step(x, y) for _ in range(2)]
    after = session.params()
    assert np.isfinite(losses).all()
    assert {n: v.shape for n, v in after.items()} == dict(cut.spec.tensor_shapes)
    first = cut.full.prunable[0]
    assert not np.array_equal(after[first], params[first])


def test_groups_are_refused_by_name():
    with pytest.raises(
        ValueError,
        match=r"'grouped' \(Conv2d\): with groups=2 .* got 2 of 4 in and 3 of 6 out: give rates",
    ):
        width(BLOCK, 0.5)


def test_a_grouped_convolution_that_is_whole_is_no_obstacle():
    spec = sequential(
        (4, 3, 3),
        [
            ("grouped", Conv2d(4, 1, groups=2), "first"),
            ("conv", Conv2d(6, 1), "second"),
            ("flat", Flatten(), "head"),
            ("out", Linear(2), "head"),
        ],
    )
    with pytest.raises(ValueError, match="leave out 'first', or build it with groups=1"):
        width(spec, 0.5)
    cut = width(spec, {"second": 0.5}, random(0))
    assert cut.spec.shapes["conv"][0] == 3 and cut.spec.by_name["grouped"] == spec.nodes[0]
    same_function(cut)


def test_group_norm_is_refused_by_name():
    with pytest.raises(
        ValueError,
        match=r"'stem_norm' \(GroupNorm\): its 16 groups must divide the channels that stay, "
        r"got 8 of 64: take another rate, multiple=16, or",
    ):
        width(resnet18((3, 8, 8), 10), 0.125)


@pytest.mark.parametrize("rate", [0, 0.0, -0.5, 1.5, float("nan"), True])
def test_rates_outside_are_refused(rate):
    with pytest.raises(ValueError, match=r"the rate of a width must be in \(0, 1\], got"):
        width(MODELS["mlp"], rate)


def test_rates_by_layer_come_before_those_of_their_block():
    """A layer that only hands channels on begins none, and its rate is not looked at."""
    spec = MODELS["mlp"]
    counts = {name: spec.shapes[name][0] for name in ("fc1", "fc2")}
    cut = width(spec, {"fc1": 0.5})
    assert cut.spec.shapes["fc1"][0] == -(-counts["fc1"] // 2)
    assert cut.spec.shapes["fc2"][0] == counts["fc2"]
    one = sequential((4,), [("a", Linear(8)), ("relu", ReLU()), ("b", Linear(8)), ("c", Linear(2))])
    (block,) = one.blocks
    found = width(one, {block: 0.5, "a": 0.25, "relu": 1.0}).spec.shapes
    assert (found["a"], found["relu"], found["b"], found["c"]) == ((2,), (2,), (4,), (2,))


def test_unknown_blocks_and_multiples_are_refused():
    with pytest.raises(ValueError, match="no block or layer 'stage1' to give a rate to; "):
        width(MODELS["mlp"], {"stage1": 0.5})
    with pytest.raises(ValueError, match="multiple must be at least 1, got 0"):
        width(MODELS["mlp"], 0.5, multiple=0)


@pytest.mark.parametrize(
    "chosen", [[0, 1], [0, 0, 1, 2], [3, 2, 1, 0], [0, 1, 2, 8], [-1, 0, 1, 2], [[0, 1], [2, 3]]]
)
def test_choices_that_are_none_are_refused(chosen):
    spec = sequential((3,), [("fc1", Linear(8)), ("fc2", Linear(2))])
    with pytest.raises(ValueError, match="must give 4 ascending ids of the 8 channels of 'fc1'"):
        width(spec, 0.5, lambda *_: np.array(chosen))
