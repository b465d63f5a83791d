"""Specs to PyTorch and back: structure, parameters and outputs survive."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedlean import layers as L
from fedlean.core import Params, generator
from fedlean.models import catalog
from fedlean.models.initialise import init_params
from fedlean.models.resnet import resnet8
from fedlean.models.torch import from_torch, to_torch
from fedlean.spec import INPUT, ModelSpec, Node

torch.set_num_threads(1)


def everything() -> ModelSpec:
    """Every layer of the vocabulary, squeeze-and-excite and a sum of three included."""
    nodes = [
        Node("conv", L.Conv2d(8, 3, stride=2, padding=1, groups=2, bias=False), (INPUT,)),
        Node("bn", L.BatchNorm(eps=1e-3, momentum=0.2), ("conv",)),
        Node("swish", L.Hardswish(), ("bn",)),
        Node("squeeze", L.GlobalAvgPool(), ("swish",)),
        Node("down", L.Linear(3), ("squeeze",)),
        Node("relu", L.ReLU(), ("down",)),
        Node("up", L.Linear(8), ("relu",)),
        Node("gate", L.Hardsigmoid(), ("up",)),
        Node("scale", L.Scale(), ("swish", "gate")),
        Node("gn", L.GroupNorm(eps=1e-4, groups=4), ("scale",)),
        Node("sum", L.Add(), ("gn", "scale", "conv")),
        Node("max", L.MaxPool2d(3, 2, 1), ("sum",)),
        Node("avg", L.AvgPool2d(2, 1, 1), ("max",)),
        Node("scaler", L.Scaler(2.5), ("avg",)),
        Node("drop", L.Dropout(0.25, channels=True), ("scaler",)),
        Node("rectangle", L.Conv2d(3, (3, 1), (2, 1), (1, 0), dilation=(2, 1)), ("drop",)),
        Node("leaky", L.LeakyReLU(0.25), ("rectangle",)),
        Node("silu", L.SiLU(), ("leaky",)),
        Node("gelu", L.GELU(), ("silu",)),
        Node("gelu_tanh", L.GELU(tanh=True), ("gelu",)),
        Node("sigmoid", L.Sigmoid(), ("gelu_tanh",)),
        Node("tanh", L.Tanh(), ("sigmoid",)),
        Node("hardtanh", L.Hardtanh(0.0, 6.0), ("tanh",)),
        Node("cat", L.Concat(), ("hardtanh", "sigmoid")),
        Node("max_row", L.MaxPool2d((1, 2)), ("cat",)),
        Node("avg_row", L.AvgPool2d((1, 2), (2, 1)), ("max_row",)),
        Node("flat", L.Flatten(), ("avg_row",)),
        Node("drop_vector", L.Dropout(0.5), ("flat",)),
        Node("bn_vector", L.BatchNorm(), ("drop_vector",)),
        Node("fc", L.Linear(5, bias=False), ("bn_vector",)),
    ]
    return ModelSpec((4, 9, 11), tuple(nodes))


def of_signals() -> ModelSpec:
    """Every layer of signals (C, L)."""
    nodes = [
        Node("conv", L.Conv1d(8, 5, 2, 2, 2, bias=False), (INPUT,)),
        Node("bn", L.BatchNorm(), ("conv",)),
        Node("gn", L.GroupNorm(groups=2), ("bn",)),
        Node("max", L.MaxPool1d(3, 2, 1), ("gn",)),
        Node("drop", L.Dropout(0.25, channels=True), ("max",)),
        Node("dilated", L.Conv1d(8, 3, padding=2, dilation=2), ("drop",)),
        Node("squeeze", L.GlobalAvgPool(), ("dilated",)),
        Node("gate", L.Sigmoid(), ("squeeze",)),
        Node("scale", L.Scale(), ("dilated", "gate")),
        Node("sum", L.Add(), ("scale", "max")),
        Node("cat", L.Concat(), ("sum", "scale")),
        Node("avg", L.AvgPool1d(2), ("cat",)),
        Node("flat", L.Flatten(), ("avg",)),
        Node("fc", L.Linear(5), ("flat",)),
    ]
    return ModelSpec((6, 32), tuple(nodes))


SPECS = {
    "signals": of_signals(),
    "everything": everything(),
    "lenet300": catalog.build("lenet300", (1, 8, 8), 10),
    "conv2": catalog.build("conv2", (1, 8, 8), 10),
    "vgg11": catalog.build("vgg11", (3, 32, 32), 10),
    "resnet8": catalog.build("resnet8", (3, 12, 12), 10),
    "resnet20": catalog.build("resnet20", (3, 8, 8), 10),
    "resnet8_bn": resnet8((1, 8, 8), 10, norm="batch"),
}


def random_params(spec: ModelSpec) -> Params:
    """Nothing at its default, so that a tensor in the wrong place shows."""
    draws = {name: generator(1, 0, 0, name) for name in spec.tensor_shapes}
    return {
        name: (draws[name].uniform(0.5, 1.5, shape) if "running_var" in name else p + 0.1).astype(
            np.float32
        )
        for (name, shape), p in zip(
            spec.tensor_shapes.items(), init_params(spec, 7).values(), strict=True
        )
    }


def example(shape: tuple[int, ...], batch: int = 3) -> torch.Tensor:
    return torch.from_numpy(generator(2, 0, 0, "x").standard_normal((batch, *shape), np.float32))


def structure(spec: ModelSpec) -> list:
    return [(node.name, node.layer, node.inputs) for node in spec.nodes]


def close(spec: ModelSpec, params: Params, module: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        got, expected = to_torch(spec, params).eval()(x), module.eval()(x)
    assert torch.allclose(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SPECS)
def test_round_trip(name: str):
    spec = SPECS[name]
    params, x = random_params(spec), example(spec.input_shape)
    module = to_torch(spec, params)
    again, copied, _ = from_torch(module, x)
    assert structure(again) == structure(spec)
    assert again.input_shape == spec.input_shape
    assert list(copied) == list(params)
    assert all(copied[key].tobytes() == params[key].tobytes() for key in params)
    close(again, copied, module, x)


@pytest.mark.parametrize("name", SPECS)
def test_state_dict_has_the_names_of_the_spec(name: str):
    spec = SPECS[name]
    module = to_torch(spec)
    state = module.state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == spec.tensor_shapes
    assert {key for key, _ in module.named_parameters()} == set(spec.param_shapes)
    assert [key for key, _ in module.named_children()] == [node.name for node in spec.nodes]
    fresh = init_params(spec, 0)
    assert all(np.array_equal(state[key].numpy(), fresh[key]) for key in state)
    other = {key: torch.from_numpy(value) for key, value in random_params(spec).items()}
    module.load_state_dict(other)  # a plain dict is enough


def test_activation_shapes_are_the_spec_s():
    spec = everything()
    module, shapes = to_torch(spec).eval(), {}
    for name, child in module.named_children():
        child.register_forward_hook(
            lambda _, __, out, name=name: shapes.update({name: tuple(out.shape[1:])})
        )
    module(example(spec.input_shape))
    assert shapes == {key: shape for key, shape in spec.shapes.items() if key != INPUT}


def test_to_torch_trains_and_copies():
    spec = everything()
    params = random_params(spec)
    before = {key: value.copy() for key, value in params.items()}
    module = to_torch(spec, params)
    module(example(spec.input_shape)).sum().backward()
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    assert all(parameter.grad is not None for parameter in module.parameters())
    assert all(np.array_equal(params[key], before[key]) for key in params)
    state = module.state_dict()
    assert not np.array_equal(state["fc.weight"].numpy(), params["fc.weight"])
    assert not np.array_equal(state["bn.running_mean"].numpy(), params["bn.running_mean"])


def test_batch_norm_trains_as_torch_s_own_does():
    spec = ModelSpec((4, 3, 3), (Node("bn", L.BatchNorm(eps=1e-3, momentum=0.3), (INPUT,)),))
    ours, theirs = to_torch(spec), nn.BatchNorm2d(4, eps=1e-3, momentum=0.3)
    x = example((4, 3, 3))
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.state_dict()["bn.running_var"], theirs.running_var)


def test_torch_s_random_state_is_left_alone():
    spec = SPECS["everything"]
    before = torch.get_rng_state()
    module = to_torch(spec)
    from_torch(module, example(spec.input_shape))
    assert torch.equal(torch.get_rng_state(), before)


def test_to_torch_names_what_does_not_fit():
    spec = SPECS["lenet300"]
    with pytest.raises(ValueError, match=r"'fc1.bias' is in the spec but not in params"):
        to_torch(spec, {k: v for k, v in init_params(spec, 0).items() if k != "fc1.bias"})
    taken = ModelSpec((4,), (Node("train", L.Linear(3), (INPUT,)),))
    with pytest.raises(ValueError, match="layer 'train': PyTorch modules use this name"):
        to_torch(taken)


class SqueezeExcite(nn.Module):
    """MobileNetV3's, with 1x1 convolutions on the pooled image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = F.adaptive_avg_pool2d(x, 1)
        gate = F.hardsigmoid(self.fc2(F.relu(self.fc1(gate), inplace=True)))
        return gate * x


class SqueezeExciteLinear(nn.Module):
    """The other usual spelling: Linear layers, views and expand_as."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Sequential(nn.Linear(channels, channels), nn.Hardsigmoid())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, c, _, _ = x.size()
        return x * self.fc(self.pool(x).view(b, c)).view(b, c, 1, 1).expand_as(x)


class Residual(nn.Module):
    def __init__(self, channels: int, excite: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding="same", bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, groups=2)
        self.relu = nn.ReLU(inplace=True)  # used twice, as torchvision does
        self.excite = excite

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.excite(self.bn2(self.conv2(out)))
        out += x
        return self.relu(out)


class UserNet(nn.Module):
    def __init__(self, excite: type[nn.Module] = SqueezeExcite) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding="valid")
        self.norm = nn.GroupNorm(2, 8)
        self.layer1 = nn.Sequential(Residual(8, excite(8)), Residual(8, nn.Identity()))
        self.drop = nn.Dropout(0.0)
        self.fc = nn.Linear(8 * 2 * 2, 5)
        self.unused = nn.LSTM(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.hardswish(self.norm(self.conv(x))), 3, 2, padding=1)
        x = F.avg_pool2d(self.layer1(x), kernel_size=2)
        return self.fc(self.drop(x.view(x.size(0), -1)))


@pytest.mark.parametrize("excite", [SqueezeExcite, SqueezeExciteLinear])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_user_s_module(excite: type[nn.Module], batch: int):
    module = UserNet(excite)
    x = example((3, 17, 17), 16)
    module(x)  # moves the running statistics
    state = {key: value.clone() for key, value in module.state_dict().items()}
    spec, params, _ = from_torch(module, x[:batch])
    assert module.training and module.layer1.training  # the user's module is as it was
    assert all(torch.equal(state[key], value) for key, value in module.state_dict().items())
    close(spec, params, module, x)
    assert list(spec.blocks) == ["conv", "layer1", "fc"]
    expected = {key.replace(".", "_", key.count(".") - 1) for key in state if "unused" not in key}
    assert set(params) == {key for key in expected if "num_batches" not in key}
    assert [n.name for n in spec.nodes if isinstance(n.layer, L.Add | L.Scale)] == [
        *("layer1_0_excite_mul", "layer1_0_add", "layer1_1_add"),
    ]
    assert {"layer1_0_relu", "layer1_0_relu_2"} <= set(spec.by_name)


def test_one_by_one_convolutions_on_pooled_images_become_linear():
    spec, params, _ = from_torch(UserNet(), example((3, 17, 17)))
    assert spec.by_name["layer1_0_excite_fc1"].layer == L.Linear(4)
    assert params["layer1_0_excite_fc1.weight"].shape == (4, 8)


def wrap(function, *modules: nn.Module) -> nn.Module:
    """A module that computes function(x, *modules)."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for index, module in enumerate(modules):
                self.add_module(f"part{index}", module)

        def forward(self, x: torch.Tensor):
            return function(x, *self.children())

    return Wrapped()


SPELLINGS = {
    "mean": (lambda x, f: f(x.mean((2, 3))), [nn.Linear(4, 3)]),
    "mean_keepdim": (lambda x, f: f(x.mean([-1, -2], keepdim=True).flatten(1)), [nn.Linear(4, 3)]),
    "torch_mean": (lambda x, f: f(torch.mean(x, dim=(3, 2))), [nn.Linear(4, 3)]),
    "reshape": (lambda x, f: f(x.reshape(x.shape[0], -1)), [nn.Linear(256, 3)]),
    "flatten": (lambda x, f: f(torch.flatten(x, 1)), [nn.Linear(256, 3)]),
    "relu": (lambda x: torch.relu(x).relu() + x, []),
    "relu_": (lambda x, f: f(x).relu_(), [nn.Conv2d(4, 2, 1)]),
    "add_self": (lambda x: torch.add(x, x), []),
    "global_avg_pool": (
        lambda x, f: f(F.avg_pool2d(x, x.size()[2:]).squeeze(-1).squeeze(-1)),
        [nn.Linear(4, 3)],
    ),
    "gate_from_avg_pool": (lambda x: torch.mul(F.avg_pool2d(x, 8), x), []),
    "gate_with_new_axes": (
        lambda x, f: x * f(x.mean((2, 3)))[:, :, None, None].expand(-1, -1, 8, 8),
        [nn.Linear(4, 4)],
    ),
    "unsqueeze": (lambda x: x * x.mean((2, 3)).unsqueeze(2).unsqueeze(-1), []),
    "pool_twice": (
        lambda x, f, g: g(f(f(x))),
        [nn.AdaptiveAvgPool2d(1), nn.Sequential(nn.Flatten(), nn.Linear(4, 2))],
    ),
    "bn1d": (lambda x, *fs: fs[1](fs[0](x.flatten(1))), [nn.Linear(256, 3), nn.BatchNorm1d(3)]),
    "two_dimensional_window": (lambda x, f: f(x), [nn.MaxPool2d((3, 3), (2, 2), (1, 1))]),
    "dropped": (lambda x: F.dropout(x, 0.0) + x, []),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str):
    function, parts = SPELLINGS[name]
    module, x = wrap(function, *parts), example((4, 8, 8))
    spec, params, _ = from_torch(module, x)
    close(spec, params, module, x)


def test_dropout_is_kept_or_dropped():
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    spec, params, _ = from_torch(module, example((4,)))
    assert spec.by_name["1"].layer == L.Dropout(0.5)
    close(spec, params, module, example((4,)))
    spec, params, _ = from_torch(module, example((4,)), drop_dropout=True)
    assert [node.name for node in spec.nodes] == ["0", "2"]
    close(spec, params, module, example((4,)))


def test_half_precision_and_numpy_examples():
    module = nn.Linear(4, 2).double()
    spec, params, _ = from_torch(module, np.zeros((1, 4)))
    assert params["0.weight"].dtype == np.float32 and module.weight.dtype == torch.float64
    assert spec.num_params == 10
