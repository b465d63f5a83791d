"""`fedlean.layers` and `fedlean.spec`: shapes, messages, JSON from strangers."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlean.layers import (
    GELU,
    Add,
    AvgPool1d,
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
    Hardtanh,
    Layer,
    LeakyReLU,
    Linear,
    MaxPool1d,
    MaxPool2d,
    ReLU,
    Scale,
    Scaler,
    SiLU,
)
from fedlean.spec import INPUT, LAYERS, ModelSpec, Node, sequential

torch.set_num_threads(1)
IMAGE, VECTOR = (4, 6, 6), (8,)


def example() -> ModelSpec:
    nodes = [
        Node("conv", Conv2d(8, 3, padding=1, bias=False), (INPUT,), "stem"),
        Node("bn", BatchNorm(), ("conv",), "stem"),
        Node("pool", MaxPool2d(2), ("bn",), "stem"),
        Node("squeeze", GlobalAvgPool(), ("pool",), "excite"),
        Node("gate", Linear(8), ("squeeze",), "excite", prunable=False),
        Node("scale", Scale(), ("pool", "gate"), "excite"),
        Node("add", Add(), ("scale", "pool"), "excite"),
        Node("gn", GroupNorm(groups=4), ("add",), "head"),
        Node("flat", Flatten(), ("gn",), "head"),
        Node("fc", Linear(10), ("flat",), "head"),
    ]
    return ModelSpec((3, 8, 8), tuple(nodes))


def single(layer: Layer, shape: tuple[int, ...]) -> ModelSpec:
    return ModelSpec(shape, (Node("odd", layer, (INPUT,)),))


# --- structure ------------------------------------------------------------------------------------


def test_shapes_names_and_counts():
    spec = example()
    assert spec.shapes["pool"] == (8, 4, 4) and spec.output_shape == (10,)
    assert list(spec.param_shapes) == [
        *("conv.weight", "bn.weight", "bn.bias", "gate.weight", "gate.bias"),
        *("gn.weight", "gn.bias", "fc.weight", "fc.bias"),
    ]
    assert spec.buffer_shapes == {"bn.running_mean": (8,), "bn.running_var": (8,)}
    assert list(spec.tensor_shapes) == [*spec.param_shapes, *spec.buffer_shapes]
    assert spec.num_params == 8 * 3 * 9 + 16 + 8 * 8 + 8 + 16 + 128 * 10 + 10
    assert spec.prunable == ("conv.weight", "fc.weight")
    assert [node.name for node in spec.weighted] == ["conv", "gate", "fc"]
    assert list(spec.blocks) == ["stem", "excite", "head"]
    assert [node.name for node in spec.blocks["excite"]] == ["squeeze", "gate", "scale", "add"]
    assert spec.input_shapes(spec.by_name["scale"]) == [(8, 4, 4), (8,)]


def test_positions_are_the_uses_of_a_weight():
    assert Conv2d(8, 3, stride=2).positions([(3, 9, 7)]) == 4 * 3
    assert Linear(8).positions([(5,)]) == 1


def test_sequential_chains():
    spec = sequential((4,), [("a", Linear(3)), ("b", ReLU(), "second")])
    assert [(n.name, n.inputs, n.block) for n in spec.nodes] == [
        *(("a", (INPUT,), "main"), ("b", ("a",), "second")),
    ]


def test_same_layer_kind_is_known_by_name():
    assert {type(node.layer).__name__ for node in example().nodes} <= set(LAYERS)
    assert len(LAYERS) == 25


# --- shapes against PyTorch -----------------------------------------------------------------------

SIDES = st.integers(1, 12)


def agree(layer: Layer, module_of, shape: tuple[int, ...]) -> None:
    """Same output shape as torch, or both refuse."""
    try:
        with torch.no_grad():
            expected = tuple(module_of()(torch.zeros(1, *shape)).shape[1:])
    except (RuntimeError, ValueError):
        with pytest.raises(ValueError, match="'odd'"):
            single(layer, shape)
    else:
        assert single(layer, shape).output_shape == expected


@settings(max_examples=150, deadline=None)
@given(SIDES, SIDES, st.integers(1, 5), st.integers(1, 3), st.integers(0, 3), st.data())
def test_conv_shapes(height: int, width: int, kernel: int, stride: int, padding: int, data):
    c_in, c_out, groups = (data.draw(st.integers(1, 6)) for _ in range(3))
    layer = Conv2d(c_out, kernel, stride, padding, groups)
    agree(
        layer,
        lambda: torch.nn.Conv2d(c_in, c_out, kernel, stride, padding, groups=groups),
        (c_in, height, width),
    )
    if c_in % groups == c_out % groups == 0:
        module = torch.nn.Conv2d(c_in, c_out, kernel, groups=groups)
        shapes = layer.param_shapes([(c_in, height, width)])
        assert shapes == {name: tuple(p.shape) for name, p in module.named_parameters()}


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([(MaxPool2d, torch.nn.MaxPool2d), (AvgPool2d, torch.nn.AvgPool2d)]),
    *(SIDES, SIDES, st.integers(1, 5), st.none() | st.integers(1, 4), st.integers(0, 3)),
)
def test_pool_shapes(kinds, height: int, width: int, kernel: int, stride, padding: int):
    ours, theirs = kinds
    layer = ours(kernel, stride, padding)
    agree(layer, lambda: theirs(kernel, stride, padding), (2, height, width))


# --- validation -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (Linear(3), IMAGE, "put a Flatten before it"),
        (Linear(0), VECTOR, "out_features must be a positive integer, got 0"),
        (Linear(True), VECTOR, "out_features must be a positive integer, got True"),
        (Linear(2.0), VECTOR, "out_features must be a positive integer, got 2.0"),  # type: ignore
        (Linear(1 << 40), VECTOR, "too large"),
        (Conv2d(8, 3), VECTOR, "needs an image"),
        (Conv2d(-8, 3), IMAGE, "out_channels must be"),
        (Conv2d(8, 0), IMAGE, "kernel_size must be"),
        (Conv2d(8, 3, stride=0), IMAGE, "stride must be"),
        (Conv2d(8, 3, groups=0), IMAGE, "groups must be"),
        (Conv2d(8, 3, groups=3), IMAGE, "groups=3 must divide both channel counts, got 4 in and 8"),
        (Conv2d(6, 3, groups=4), IMAGE, "groups=4 must divide both"),
        (Conv2d(8, 7), IMAGE, "window 7 does not fit an input side of 6"),
        (MaxPool2d(7), IMAGE, "window 7 does not fit"),
        (MaxPool2d(0), IMAGE, "kernel_size must be"),
        (MaxPool2d(2, padding=2), IMAGE, "padding 2 must be at most half of kernel_size 2"),
        (AvgPool2d(2), VECTOR, "needs an image"),
        (GlobalAvgPool(), VECTOR, "needs a signal (C, L) or an image (C, H, W)"),
        (Conv1d(8, 3), IMAGE, "needs a signal (C, L)"),
        (Conv2d(8, 3), (4, 9), "needs an image (C, H, W)"),
        (Conv2d(8, (3, 7)), IMAGE, "window 7 does not fit an input side of 6"),
        (Conv2d(8, 3, dilation=3), IMAGE, "window 7 does not fit an input side of 6"),
        (MaxPool2d((2, 4), padding=(1, 3)), IMAGE, "at most half of kernel_size (2, 4)"),
        (Hardtanh(1.0, 1.0), IMAGE, "low must be below high, got 1 and 1"),
        (GroupNorm(groups=3), IMAGE, "groups=3 must divide the 4 channels"),
        (GroupNorm(groups=0), IMAGE, "groups"),
        (Add(), IMAGE, "two or more inputs of equal shape"),
        (Concat(), IMAGE, "two or more inputs that differ in channels only"),
        (Scale(), IMAGE, "needs an image (C, H, W) or signal (C, L) and a gate (C,)"),
    ],
)
def test_every_error_names_the_layer(layer: Layer, shape: tuple[int, ...], message: str):
    with pytest.raises(ValueError) as caught:
        single(layer, shape)
    assert f"layer 'odd' ({type(layer).__name__})" in str(caught.value)
    assert message in str(caught.value)


BAD_NUMBERS = [
    *((Conv2d(8, 3, padding=value), IMAGE) for value in (-1, 0.5, True, None, float("nan"))),
    *((MaxPool2d(2, padding=value), IMAGE) for value in (-1, 0.5, float("nan"))),
    *((MaxPool2d(2, stride=value), IMAGE) for value in (0, -1, 1.5, True)),
    *((AvgPool2d(6, stride=value), IMAGE) for value in (0, -1, 1.5)),
    *((GroupNorm(groups=value), IMAGE) for value in (2.0, True, None)),
    *((GroupNorm(eps=value), IMAGE) for value in (-1.0, 0.0, float("nan"), float("inf"), None)),
    *((BatchNorm(eps=value), IMAGE) for value in (-1.0, float("nan"), True, None)),
    *((BatchNorm(momentum=value), IMAGE) for value in (-0.1, 1.5, float("nan"), None)),
    *((Linear(3, bias=value), VECTOR) for value in (1, 0.5, None)),
    *((Scaler(value), VECTOR) for value in (0.0, -2.0, 2, True, None, "2")),
    *((Scaler(value), VECTOR) for value in (float("nan"), float("inf"))),
    *((Conv2d(3, 1, bias=value), IMAGE) for value in (1, None)),
    *((Conv2d(3, value), IMAGE) for value in ((1,), (1, 2, 3), (1, 0), (1, True), (1.0, 1.0), "3")),
    *((Conv2d(3, 1, dilation=value), IMAGE) for value in (0, None, (1, 0))),
    *((Conv1d(3, value), (4, 9)) for value in ((1, 2), (3,), 0)),
    *((Conv1d(3, 1, stride=value), (4, 9)) for value in ((1, 2), 0)),
    *((MaxPool1d(value), (4, 9)) for value in ((1, 2), 0, None)),
    *((LeakyReLU(value), VECTOR) for value in (-0.1, 1.1, 1, None, float("nan"))),
    *((Hardtanh(value, 2.0), VECTOR) for value in (-1001.0, 0, None, float("nan"))),
    *((GELU(value), VECTOR) for value in (1, None, "tanh")),
    *((Dropout(value), VECTOR) for value in (-0.1, 1.0, 0, None, float("nan"))),
    *((Dropout(0.5, value), VECTOR) for value in (1, None)),
]


@pytest.mark.parametrize(("layer", "shape"), BAD_NUMBERS, ids=repr)
def test_bad_settings_name_the_layer(layer: Layer, shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=rf"layer 'odd' \({type(layer).__name__}\)"):
        single(layer, shape)


HUGE = 1 << 30
TOO_LARGE = [
    (Conv2d(2, (1, 1025), padding=1), IMAGE, "kernel_size must be .* at most 1024"),
    (Conv2d(2, 3, dilation=1025), IMAGE, "dilation must be .* at most 1024"),
    (Conv1d(2, 3, padding=1025), (4, 9), "padding must be an integer from 0 to 1024, got"),
    (Conv2d(2, 3, stride=HUGE, padding=HUGE), IMAGE, "stride must be .* at most 1024"),
    (Conv2d(2, 3, padding=HUGE), IMAGE, "padding must be an integer from 0 to 1024"),
    (Conv2d(2, 3, padding=1025), IMAGE, "padding must be an integer from 0 to 1024"),
    (Conv2d(2, 1025, padding=1025), IMAGE, "kernel_size must be .* at most 1024"),
    (Conv2d(2, 3, stride=1025), IMAGE, "stride must be .* at most 1024"),
    (MaxPool2d(2, stride=HUGE), IMAGE, "stride must be .* at most 1024"),
    (AvgPool2d(HUGE, padding=HUGE // 2), IMAGE, "kernel_size must be .* at most 1024"),
    (Conv2d(2, 1024, padding=1024), (31, 64, 64), "its input is too large: 138276864 elements"),
    (Conv2d(1 << 22, 1), IMAGE, r"output of shape \(4194304, 6, 6\) is too large"),
    (Conv2d(513, 1024, padding=512), IMAGE, r"weight of shape .* is too large"),
    (Linear(1 << 27), VECTOR, "output of shape .* is too large: at most 134217727 elements"),
    (Linear((1 << 27) - 1), (17,), "weight of shape .* is too large: at most 2147483648 elements"),
    (BatchNorm(eps=1e-21), IMAGE, "eps must be a positive float from 1e-20 to 1000"),
    (GroupNorm(eps=1001.0), IMAGE, "eps must be a positive float from 1e-20 to 1000"),
    (Scaler(9.9e-4), IMAGE, "factor must be a float from 0.001 to 1000, got 0.00099"),
    (Scaler(1001.0), IMAGE, "factor must be a float from 0.001 to 1000, got 1001.0"),
]


@pytest.mark.parametrize(
    ("layer", "shape", "message"), TOO_LARGE, ids=lambda value: f"{value!s:.60}"
)
def test_settings_and_sizes_have_limits(layer: Layer, shape: tuple[int, ...], message: str):
    """A spec from a stranger must not make an engine overflow or allocate without end."""
    with pytest.raises(ValueError, match=rf"layer 'odd' \({type(layer).__name__}\): {message}"):
        single(layer, shape)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (Conv2d(2, 1, padding=2), IMAGE),
        (Conv2d(2, (1, 1024), padding=(0, 1024)), (1, 1, 8)),
        (Conv1d(2, 3, dilation=1024, padding=1024), (1, 8)),
        (Hardtanh(-1e3, 1e3), VECTOR),
        (LeakyReLU(0.0), VECTOR),
        (Conv2d(2, 3, stride=1024, padding=3), IMAGE),
        (Conv2d(2, 1024, padding=512), (1, 8, 8)),
        (AvgPool2d(1024), (3, 1024, 1024)),
        (MaxPool2d(1, stride=2), (64, 1, 1)),
        (Linear(25088), (4096,)),
        (BatchNorm(eps=1e-20, momentum=0.0), IMAGE),
        (Scaler(1e-3), IMAGE),
        (Scaler(1e3), VECTOR),
        (Flatten(), (3, 6688, 6688)),
    ],
    ids=repr,
)
def test_what_is_trained_is_within_the_limits(layer: Layer, shape: tuple[int, ...]):
    assert single(layer, shape)


def test_specs_have_limits():
    with pytest.raises(ValueError, match="at most 4096 layers, got 4097"):
        sequential(VECTOR, [(f"n{i}", ReLU()) for i in range(4097)])
    assert sequential(VECTOR, [(f"n{i}", ReLU()) for i in range(4096)])
    with pytest.raises(ValueError, match="layer 'odd' reads 257 inputs, at most 256"):
        ModelSpec(IMAGE, (Node("odd", Add(), (INPUT,) * 257),))
    for shape in ((1 << 27,), (1,) * 9, (1 << 14, 1 << 14)):
        with pytest.raises(ValueError, match=r"input_shape .* is too large: at most 8 axes"):
            single(ReLU(), shape)


def test_square_settings_have_the_json_and_the_hash_that_they_always_had():
    spec = sequential((1, 4, 4), [("a", Conv2d(2, 3, padding=1)), ("b", MaxPool2d(2))])
    text = (
        '{"input_shape":[1,4,4],"nodes":[{"bias":true,"block":"main","groups":1,"inputs":["input"],'
        '"kernel_size":3,"layer":"Conv2d","name":"a","out_channels":2,"padding":1,"prunable":true,'
        '"stride":1},{"block":"main","inputs":["a"],"kernel_size":2,"layer":"MaxPool2d","name":"b",'
        '"padding":0,"prunable":true,"stride":null}]}'
    )
    assert spec.to_json() == text and ModelSpec.from_json(text) == spec
    pairs = [("a", Conv2d(2, (3, 3), (1, 1), (1, 1), dilation=(1, 1))), ("b", MaxPool2d((2, 2)))]
    assert sequential((1, 4, 4), pairs).to_json() == text


def test_unequal_sides_are_pairs_in_json():
    layers = [("a", Conv2d(2, (1, 3), dilation=(1, 2))), ("b", AvgPool2d((2, 1), (1, 2)))]
    spec = sequential((1, 6, 6), layers)
    assert '"dilation":[1,2]' in spec.to_json() and '"kernel_size":[2,1]' in spec.to_json()
    again = ModelSpec.from_json(spec.to_json())
    assert again == spec and again.by_name["a"].layer == Conv2d(2, (1, 3), dilation=(1, 2))
    assert hash(again.nodes[0].layer) == hash(spec.nodes[0].layer)


@settings(max_examples=150, deadline=None)
@given(SIDES, SIDES, st.data())
def test_rectangles_and_signals(height: int, width: int, data):
    """Kernels, strides, padding and dilation per side; a signal has the last of each."""
    side = st.tuples(st.integers(1, 4), st.integers(1, 4))
    kernel, stride, dilation = (data.draw(side) for _ in range(3))
    padding = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    how = (kernel, stride, padding)
    agree(
        Conv2d(2, *how, dilation=dilation),
        lambda: torch.nn.Conv2d(3, 2, *how, dilation),
        (3, height, width),
    )
    agree(MaxPool2d(*how), lambda: torch.nn.MaxPool2d(*how), (3, height, width))
    last = tuple(setting[1] for setting in how)
    agree(
        Conv1d(2, *last, dilation=dilation[1]),
        lambda: torch.nn.Conv1d(3, 2, *last, dilation[1]),
        (3, width),
    )
    agree(AvgPool1d(*last), lambda: torch.nn.AvgPool1d(*last), (3, width))


@pytest.mark.parametrize(
    "layer", [ReLU(), Hardswish(), SiLU(), Hardsigmoid(), Scaler(2.0), Flatten(), BatchNorm()]
)
def test_layers_with_one_input_refuse_two(layer: Layer):
    with pytest.raises(ValueError, match=r"'odd'.*takes 1 input, got 2"):
        ModelSpec(IMAGE, (Node("odd", layer, (INPUT, INPUT)),))
    with pytest.raises(ValueError, match=r"'odd'.*takes 1 input, got 0"):
        ModelSpec(IMAGE, (Node("odd", layer, ()),))


def test_channels_are_joined():
    conv = Node("conv", Conv2d(3, 3, padding=1), (INPUT,))
    joined = Node("cat", Concat(), ("conv", INPUT, "conv"))
    assert ModelSpec(IMAGE, (conv, joined)).output_shape == (3 + 4 + 3, 6, 6)
    pool = Node("pool", MaxPool2d(2), (INPUT,))
    with pytest.raises(ValueError, match=r"'odd' \(Concat\).*differ in channels only"):
        ModelSpec(IMAGE, (pool, Node("odd", Concat(), ("pool", INPUT))))


def test_unequal_sums_and_gates():
    pool = Node("pool", MaxPool2d(2), (INPUT,))
    for layer in (Add(), Scale()):
        with pytest.raises(ValueError, match=rf"'odd' \({type(layer).__name__}\)"):
            ModelSpec(IMAGE, (pool, Node("odd", layer, (INPUT, "pool"))))


@pytest.mark.parametrize("name", ["", "a.b", INPUT, "first"])
def test_layer_names(name: str):
    nodes = (Node("first", ReLU(), (INPUT,)), Node(name, ReLU(), ("first",)))
    with pytest.raises(ValueError, match=f"layer name {name!r} must be"):
        ModelSpec(VECTOR, nodes)


@pytest.mark.parametrize("source", ["later", "odd", "nowhere", ""])
def test_inputs_must_come_before(source: str):
    nodes = (Node("odd", ReLU(), (source,)), Node("later", ReLU(), (INPUT,)))
    with pytest.raises(ValueError, match=f"layer 'odd' reads {source!r}"):
        ModelSpec(VECTOR, nodes)


def test_no_layers():
    with pytest.raises(ValueError, match="at least one layer"):
        ModelSpec(VECTOR, ())


# --- JSON -----------------------------------------------------------------------------------------


def test_json_round_trip():
    spec = example()
    again = ModelSpec.from_json(spec.to_json())
    assert again == spec and again.hash == spec.hash and again.to_json() == spec.to_json()
    assert len(spec.hash) == 32


def test_equal_specs_have_equal_hashes():
    """1 == 1.0 == True, but their JSON differs: only one type is let in."""
    for value in (1, True):
        with pytest.raises(ValueError, match=r"'odd' \(BatchNorm\): eps must be"):
            single(BatchNorm(eps=value), IMAGE)


def test_missing_settings_take_their_default():
    document = json.loads(single(MaxPool2d(2), IMAGE).to_json())
    del document["nodes"][0]["padding"], document["nodes"][0]["stride"]
    assert ModelSpec.from_json(json.dumps(document)) == single(MaxPool2d(2), IMAGE)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "null", "[]", "3", '"nodes"', "NaN", "{}", '{"nodes": []}', '{"nodes": 3}'),
        '{"input_shape": [4], "nodes": []}',
        '{"input_shape": 4, "nodes": ["a"]}',
        '{"input_shape": "444", "nodes": [{}]}',
        "[" * 100_000,
        '{"nodes":' * 100_000,
        '{"input_shape": [' + "9" * 5000 + '], "nodes": []}',
    ],
    ids=lambda text: text[:24],
)
def test_no_spec_at_all(text: str):
    with pytest.raises(ValueError):
        ModelSpec.from_json(text)


def corrupted(path: tuple, value: Any) -> str:
    document = copy.deepcopy(json.loads(example().to_json()))
    at = document
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return json.dumps(document)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("layer", value) for value in ("Conv3d", "Node", 3, None, [], {})),
        *(("out_channels", value) for value in ("8", -8, 0, 8.0, True, None, [8], 1e308, 10**4000)),
        *(("kernel_size", value) for value in (-3, float("nan"), float("inf"), "3", {"a": 1})),
        *(("padding", value) for value in (-1, 0.5, True, "1", float("nan"), None, 10**400)),
        *(("bias", value) for value in (1, 0, "false", None, 0.5)),
        *(("inputs", value) for value in ([], ["conv"], [1], "input", 3, None, {"input": 1})),
        *(("block", value) for value in (3, None, ["stem"])),
        *(("prunable", value) for value in ("false", 1, None, [])),
        *(("name", value) for value in (3, None, "", "a.b", "bn", ["conv"], True)),
    ],
    ids=lambda value: f"{value!s:.20}",
)
def test_bad_entries(key: str, value: Any):
    with pytest.raises(ValueError) as caught:
        ModelSpec.from_json(corrupted(("nodes", 0, key), value))
    if key not in ("name",):
        assert "'conv'" in str(caught.value)


@pytest.mark.parametrize("key", ["name", "layer", "inputs", "block", "prunable", "out_channels"])
def test_missing_entries_are_named(key: str):
    document = json.loads(example().to_json())
    del document["nodes"][0][key]
    with pytest.raises(ValueError, match=key):
        ModelSpec.from_json(json.dumps(document))


@pytest.mark.parametrize(
    "shape", [[], [0], [-3, 8, 8], [3, 8.0, 8], ["3", 8, 8], [True, 8, 8], [1e9]]
)
def test_bad_input_shape(shape: list):
    with pytest.raises(ValueError, match="input_shape"):
        ModelSpec.from_json(corrupted(("input_shape",), shape))


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 9)
    | st.integers()
    | st.sampled_from([1 << 31, 1 << 64, 10**400, -(10**400)])
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["conv", "bn", INPUT, *LAYERS]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
SETTINGS = sorted({"name", "layer", "inputs", "block", "prunable", "extra"}) + sorted(
    {"out_channels", "kernel_size", "stride", "padding", "groups", "bias", "eps", "momentum"}
)


def only_value_errors(text: str) -> None:
    """Either a ValueError, or a spec that is what it says: integers for shapes, stable JSON."""
    try:
        spec = ModelSpec.from_json(text)
    except ValueError:
        return
    sides = [
        side for shape in (*spec.shapes.values(), *spec.tensor_shapes.values()) for side in shape
    ]
    assert all(type(side) is int and side > 0 for side in sides)
    json.loads(spec.to_json(), parse_constant=pytest.fail)  # NaN and Infinity are not JSON
    assert ModelSpec.from_json(spec.to_json()) == spec


@settings(max_examples=400, deadline=None)
@given(
    st.integers(0, 9), st.lists(st.tuples(st.sampled_from(SETTINGS), JUNK), min_size=1, max_size=3)
)
def test_fuzz_entries(index: int, changes: list[tuple[str, Any]]):
    document = json.loads(example().to_json())
    document["nodes"][index] |= dict(changes)
    only_value_errors(json.dumps(document))


@settings(max_examples=300, deadline=None)
@given(JUNK, JUNK)
def test_fuzz_documents(shape: Any, nodes: Any):
    only_value_errors(json.dumps({"input_shape": shape, "nodes": nodes}))
    only_value_errors(json.dumps({"input_shape": shape, "nodes": [nodes]}))
    only_value_errors(json.dumps(nodes))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_fuzz_text(data):
    """Cut, doubled and overwritten stretches of a valid document."""
    text = example().to_json()
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 40)))
    patch = data.draw(st.text(alphabet='{}[],:"0123456789-.eNaInfinity', max_size=8))
    only_value_errors(text[:start] + patch + text[end:])
