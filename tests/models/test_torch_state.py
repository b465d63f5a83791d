"""Masks, frozen parameters and examples of every kind: what is read before a module is traced."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models.odd import CNN, IMAGES, VECTORS, Net, cnn, mlp
from torch import nn
from torch.nn.utils import prune

from fedlean.core import SubModel
from fedlean.engine.open import open_engine
from fedlean.engine.protocol import SGD
from fedlean.models.torch import Converted, from_torch
from fedlean.tree import apply_mask

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_weights() -> None:
    torch.manual_seed(0)


def assert_masked(converted: Converted, module: nn.Module, *names: str) -> None:
    """`names` and no others are masked: by the module's own masks, with the module's weights."""
    spec, params, sub_model = converted
    assert set(sub_model.masks) == set(names) <= set(spec.prunable)
    layers = dict(module.named_modules())
    for name in names:
        layer, shape = layers[name.partition(".")[0]], spec.param_shapes[name]
        expected = layer.get_buffer("weight_mask").numpy().reshape(shape) != 0
        mask = sub_model.masks[name]
        assert mask.dtype == np.bool_ and mask.flags.c_contiguous
        assert np.array_equal(mask, expected)
        original = layer.get_parameter("weight_orig").detach().float().numpy().reshape(shape)
        assert np.array_equal(params[name], np.where(expected, original, 0))
    for name, value in apply_mask(params, sub_model.masks).items():
        assert value.tobytes() == params[name].tobytes()  # +0, not -0


PRUNINGS = {
    "unstructured": lambda m: prune.l1_unstructured(m[0], "weight", 0.4),
    "structured": lambda m: prune.ln_structured(m[0], "weight", 0.5, n=2, dim=0),
    "inputs": lambda m: prune.random_structured(m[0], "weight", 0.5, dim=1),
    "custom": lambda m: prune.custom_from_mask(m[0], "weight", m[0].weight > 0),
    "all of it": lambda m: prune.custom_from_mask(m[0], "weight", torch.zeros_like(m[0].weight)),
    "identity": lambda m: prune.identity(m[0], "weight"),
    "global": lambda m: prune.global_unstructured(
        [(m[0], "weight")], prune.L1Unstructured, amount=9
    ),
}


@pytest.mark.parametrize("first", PRUNINGS)
@pytest.mark.parametrize("second", [None, "unstructured", "custom"])
@pytest.mark.parametrize("used", [False, True])
def test_masks_come_back(first: str, second: str | None, used: bool):
    module = cnn()
    PRUNINGS[first](module)
    if used:  # the pruned weight now has a grad_fn, and weight_orig a gradient
        module(IMAGES).sum().backward()
    if second:
        PRUNINGS[second](module)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    assert_masked(from_torch(module, IMAGES), module, "0.weight")
    assert list(module.state_dict()) == list(state)  # the user's module is still pruned
    assert all(torch.equal(state[name], value) for name, value in module.state_dict().items())
    assert prune.is_pruned(module)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2**30 - 1)), min_size=1, max_size=4))
def test_masks_of_any_layers_in_any_order(masks: list[tuple[int, int]]):
    module = nn.Sequential(*(nn.Linear(n, m) for n, m in [(6, 5), (5, 4), (4, 3), (3, 2)]))
    for at, bits in masks:
        weight = module[at].weight
        kept = [bool(bits >> i & 1) for i in range(weight.numel())]
        prune.custom_from_mask(module[at], "weight", torch.tensor(kept).reshape(weight.shape))
    converted = from_torch(module, VECTORS)
    assert_masked(converted, module, *{f"{at}.weight" for at, _ in masks})


def test_a_mask_by_hand():
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0, -3.0], [4.0, 5.0, 6.0]]))
    prune.custom_from_mask(layer, "weight", torch.tensor([[1, 1, 0], [0, 1, 1]]))
    prune.l1_unstructured(layer, "weight", 1)  # of the four that are left, the smallest
    _, params, sub_model = from_torch(layer, np.ones((2, 3)))
    assert sub_model.masks["0.weight"].tolist() == [[False, True, False], [False, True, True]]
    assert params["0.weight"].tolist() == [[0, 2, 0], [0, 5, 6]]
    assert not np.signbit(params["0.weight"]).any()


def test_a_mask_of_a_convolution_that_becomes_linear():
    module = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 3, 1), nn.Flatten())
    prune.random_unstructured(module[1], "weight", 0.5)
    converted = from_torch(module, IMAGES)
    assert converted.sub_model.masks["1.weight"].shape == (3, 4)
    assert_masked(converted, module, "1.weight")


def test_masks_of_channels_last_and_half_modules():
    module = cnn()
    prune.random_unstructured(module[0], "weight", 0.5)
    module.to(memory_format=torch.channels_last)
    assert_masked(from_torch(module, IMAGES), module, "0.weight")
    module = mlp().half()
    prune.random_unstructured(module[2], "weight", 0.5)
    assert_masked(from_torch(module, VECTORS), module, "2.weight")


def test_a_layer_that_is_not_used_may_be_pruned_as_it_likes():
    module = mlp()
    module[1].extra = nn.Linear(3, 3)  # of a ReLU: no forward reads it
    prune.random_unstructured(module[1].extra, "bias", 0.5)
    assert from_torch(module, VECTORS).sub_model == SubModel()


@pytest.mark.parametrize(
    ("at", "name", "kind"), [(0, "bias", "Conv2d"), (1, "weight", "BatchNorm2d")]
)
def test_what_a_spec_cannot_mask(at: int, name: str, kind: str):
    module = cnn()
    prune.random_unstructured(module[at], name, 0.5)
    message = rf"layer '{at}' \({kind}\): '{name}' is pruned.*prune\.remove\(layer, '{name}'\)"
    with pytest.raises(ValueError, match=message):
        from_torch(module, IMAGES)
    prune.remove(module[at], name)  # the remedy
    assert from_torch(module, IMAGES).sub_model == SubModel()


def test_masks_that_are_no_masks():
    module = mlp()
    prune.custom_from_mask(module[0], "weight", torch.full((5, 6), 0.5))
    with pytest.raises(ValueError, match=r"layer '0' \(Linear\): the mask of 'weight' has values"):
        from_torch(module, VECTORS)


def test_frozen_parameters():
    module = cnn()
    prune.random_unstructured(module[0], "weight", 0.5)
    for parameter in (module[0].weight_orig, module[1].weight, module[1].bias, module[5].bias):
        parameter.requires_grad_(False)
    converted = from_torch(module, IMAGES)
    expected = {"0.weight", "1.weight", "1.bias", "5.bias"}
    assert converted.sub_model.frozen == expected  # and no running statistics
    assert_masked(converted, module, "0.weight")
    module.requires_grad_(False)
    assert from_torch(module, IMAGES).sub_model.frozen == set(converted.spec.param_shapes)


def test_a_weight_that_is_no_parameter_is_frozen():
    module = mlp()
    weight = module[0].weight.detach()
    del module[0].weight
    module[0].register_buffer("weight", weight)
    assert from_torch(module, VECTORS).sub_model.frozen == {"0.weight"}


@pytest.mark.parametrize("name", ["torch", "native"])
def test_training_is_that_of_the_user_s_module(name: str):
    """Three steps of SGD on a pruned module with frozen layers, BatchNorm included."""
    if name == "native" and importlib.util.find_spec("fedlean._native") is None:
        pytest.skip("the native engine is not built: there is no fedlean._native")
    module = nn.Sequential(
        nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1),
        nn.ReLU(), nn.Flatten(), nn.Linear(216, 3),
    )  # fmt: skip
    prune.random_unstructured(module[0], "weight", 0.5)
    prune.ln_structured(module[6], "weight", 0.5, n=2, dim=1)
    module[1].requires_grad_(False)
    module[3].weight.requires_grad_(False)
    converted = from_torch(module, IMAGES)
    sgd = SGD(lr=0.1, momentum=0.9, weight_decay=0.05)
    session = open_engine(name, 1).open(*converted, batch_size=8, optimizer=sgd)
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, sgd.lr, sgd.momentum, weight_decay=sgd.weight_decay)
    random = torch.Generator().manual_seed(0)
    for _ in range(3):
        x, y = torch.randn((8, 4, 8, 8), generator=random), torch.arange(8) % 3
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(x), y)
        loss.backward()
        optimizer.step()
        assert session.step(x.numpy(), y.numpy()) == pytest.approx(loss.item(), abs=1e-5)
    module(IMAGES)  # pruned weights are made anew by forward
    trained, masks = session.params(), converted.sub_model.masks
    for tensor in converted.spec.param_shapes:
        path, _, suffix = tensor.partition(".")
        expected = getattr(module[int(path)], suffix).detach().numpy()
        np.testing.assert_allclose(trained[tensor], expected, rtol=1e-4, atol=1e-5)
        same = trained[tensor].tobytes() == converted.params[tensor].tobytes()
        assert same == (tensor in converted.sub_model.frozen), tensor
    assert {*masks} == {"0.weight", "6.weight"}
    assert all((trained[tensor][~mask] == 0).all() for tensor, mask in masks.items())
    assert not np.array_equal(trained["1.running_mean"], converted.params["1.running_mean"])


EXAMPLES = {
    "uint8": torch.arange(12, dtype=torch.uint8).reshape(2, 6),
    "int64": torch.arange(12).reshape(2, 6) - 5,
    "bool": VECTORS > 0,
    "float64": VECTORS.double(),
    "float16": VECTORS.half(),
    "bfloat16": VECTORS.bfloat16(),
    "with gradients": VECTORS.clone().requires_grad_(),
    "nested list": VECTORS.tolist(),
    "list of tensors": [*VECTORS],
    "list of integers": [[1, 2, 3, 4, 5, 6]],
    "big-endian": VECTORS.numpy().astype(">f8"),
    "uint16": np.ones((2, 6), np.uint16),
    "reversed": VECTORS.numpy()[::-1],
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_of_other_kinds_give_the_same(name: str):
    module = mlp()
    expected, got = from_torch(module, VECTORS), from_torch(module, EXAMPLES[name])
    assert got.spec == expected.spec
    assert all(np.array_equal(got.params[key], expected.params[key]) for key in expected.params)


def test_a_read_only_example():
    example = VECTORS.numpy().copy()
    example.flags.writeable = False
    assert from_torch(mlp(), example).spec.input_shape == (6,)


HOLE = VECTORS.clone()
HOLE[1, 2:4] = float("nan")


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (HOLE, "example_input holds 2 of 18 values that are NaN or infinite"),
        (np.full((2, 6), 1e300), "example_input holds 12 of 12 values"),
        (VECTORS.to(torch.complex64), "'example_input' is torch.complex64, expected real numbers"),
        (VECTORS.numpy().astype(np.complex64), "nested lists of real numbers, got a ndarray of co"),
        (VECTORS.to_sparse(), "'example_input' is torch.sparse_coo, expected a dense tensor"),
        (VECTORS.to("meta"), "'example_input' is on the meta device"),
        ([[1, 2], [3]], "nested lists of real numbers, got a list: "),
        ((VECTORS, torch.zeros(3)), "must be one tensor, an array or nested lists .* got a tuple"),
        ([["a", "b"]], "got a list of <U1"),
        (None, "got a NoneType"),
        ({"x": VECTORS}, "got a dict"),
        ([1.0, 2.0], r"must be \(B, ...\), got shape \(2,\)"),
    ],
)
def test_examples_that_are_none(example: object, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        from_torch(mlp(), example)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_modules_of_other_precisions(dtype: torch.dtype):
    module = cnn().to(dtype)
    spec, params, _ = from_torch(module, IMAGES)
    assert spec == CNN
    for name, value in params.items():
        assert value.dtype == np.float32
        path, suffix = name.split(".")
        expected = getattr(module[int(path)], suffix)
        assert expected.dtype == dtype
        assert np.array_equal(value, expected.detach().float().numpy())


def test_weights_in_another_order_of_memory():
    """Engines take C-contiguous arrays only."""
    module = cnn()
    expected = from_torch(module, IMAGES).params
    module[5].weight.data = module[5].weight.data.t().clone().t()
    module.to(memory_format=torch.channels_last)
    for name, value in from_torch(module, IMAGES).params.items():
        assert value.flags.c_contiguous
        assert np.array_equal(value, expected[name])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_conversion_does_not_depend_on_the_caller_s_gradients(mode: type):
    detached = Net(torch.no_grad()(lambda self, x: self.fc(x)), fc=nn.Linear(6, 3))
    with mode():
        assert from_torch(cnn(), IMAGES).spec == CNN
        with pytest.raises(ValueError, match=r"'fc.weight' gets no gradient"):
            from_torch(detached, VECTORS)
