"""Odd modules end in the right result, or in one line that names the layer and the remedy."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models.odd import IMAGES, VECTORS, Net, cnn, mlp
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from fedlean.models.torch import from_torch, to_torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_weights() -> None:
    torch.manual_seed(0)


Make = Callable[[], nn.Module]


def changed(change: Callable[[nn.Sequential], object], module: Make = mlp) -> Make:
    """`module` after `change`."""

    def make() -> nn.Module:
        made = module()
        with warnings.catch_warnings(action="ignore"):  # what PyTorch is about to remove
            change(made)
        return made

    return make


def net(function: Callable[..., object], **parts: Callable[[], object]) -> Make:
    return lambda: Net(function, **{name: part() for name, part in parts.items()})


def compiled() -> nn.Module:
    with warnings.catch_warnings(action="ignore"):
        return torch.compile(mlp())


def linear() -> nn.Linear:
    return nn.Linear(6, 3)


def set_data(m: nn.Sequential, at: int, name: str, index: object, value: float) -> None:
    m[at].get_parameter(name).data[index] = value


class OptionalInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = linear()

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None, **options: bool):
        y = self.fc(x if gate is None else x * gate)
        return (y, x) if options.get("features") else y


class StarArguments(OptionalInputs):
    def forward(self, *inputs: torch.Tensor):
        return self.fc(inputs[0])


class KeywordOnly(OptionalInputs):
    def forward(self, x: torch.Tensor, *, gate: torch.Tensor):
        return self.fc(x) * gate


class OwnTrain(OptionalInputs):
    def train(self):
        raise NotImplementedError

    def forward(self, x: torch.Tensor):
        return self.fc(x)


class NoSuper(nn.Module):
    def __init__(self) -> None:
        pass

    def forward(self, x: torch.Tensor):
        return F.relu(x)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x)

    @staticmethod
    def backward(ctx: object, g: torch.Tensor) -> torch.Tensor:
        return -g


def no_grad(self: Net, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        x = self.body(x)
    return self.head(x)


def autocast(self: Net, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu"):
        return self.fc(x)


def auxiliary(self: Net, x: torch.Tensor):
    return (self.fc(x), self.aux(x)) if self.training else self.fc(x)


def asserting(self: Net, x: torch.Tensor) -> torch.Tensor:
    assert x.shape[1] == 6
    return self.fc(x)


def branching(self: Net, x: torch.Tensor) -> torch.Tensor:
    """On every way to ask for a shape."""
    assert x.size(1) == 6 and x.dim() == x.ndim == len(x.shape) == 2 and len(x) == x.size()[0]
    y = self.fc(x)
    return y + self.other(x) if y.shape[-1] > 2 else self.never(x)


def of_sign(self: Net, x: torch.Tensor) -> torch.Tensor:
    return self.fc(x) if x.sum() > 0 else self.fc(-x)


def several_lines(self: Net, x: torch.Tensor) -> torch.Tensor:
    raise KeyError("first", "second\nthird")


# Each with the names of its layers in the spec.
CONVERTED = {
    "asserting a shape": (net(asserting, fc=linear), "fc"),
    "branching on shapes": (net(branching, fc=linear, other=linear, never=linear), "fc other add"),
    "optional inputs": (OptionalInputs, "fc"),
    "star arguments": (StarArguments, "fc"),
    "its own train()": (OwnTrain, "fc"),
    "a shared ReLU": (lambda: nn.Sequential(r := nn.ReLU(), nn.Linear(6, 6), r), "0 1 0_2"),
    "lazy, after a forward": (changed(lambda m: m(VECTORS), lambda: nn.LazyLinear(3)), "0"),
    "compiled in place": (changed(lambda m: m.compile()), "0 1 2"),
    "an activation kept": (changed(lambda m: setattr(m, "last", m(VECTORS))), "0 1 2"),
    "parameters of one vector": (
        changed(
            lambda m: nn.utils.vector_to_parameters(
                nn.utils.parameters_to_vector(m.parameters()).detach(), m.parameters()
            )
        ),
        "0 1 2",
    ),
    "checkpointed": (net(lambda s, x: checkpoint(s.fc, x, use_reentrant=False), fc=linear), "fc"),
    "an unused layer with a hole": (
        net(lambda s, x: s.fc(x), fc=linear, spare=lambda: nn.Linear(1, 1).apply(
            lambda m: m.weight.data.fill_(float("nan"))
        )),
        "fc",
    ),
    "dropout by self.training": (
        net(lambda s, x: F.dropout(s.fc(x), 0.0, s.training), fc=linear), "fc",
    ),
    "its weight norm removed": (
        changed(lambda m: parametrize.remove_parametrizations(
            parametrizations.weight_norm(m[0]), "weight"
        )),
        "0 1 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERTED)
def test_is_converted(name: str):
    make, names = CONVERTED[name]
    module = make()
    spec, params, sub_model = from_torch(module, VECTORS)
    assert [node.name for node in spec.nodes] == names.split()
    assert not sub_model.masks and not sub_model.frozen
    with torch.no_grad():
        got, expected = to_torch(spec, params)(VECTORS), module(VECTORS)
    assert torch.allclose(got, expected, atol=1e-6)


NAN = float("nan")
KEYWORDS = "is called with keywords: give its inputs by position"
UNKNOWN = "is not supported; supported are Linear"
REMOVE = "call torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') first"
GRADIENT = "gets no gradient although it requires one: set requires_grad=False, or remove"

REFUSED = {
    # what rewrites a weight
    "weight_norm, old": (
        changed(lambda m: nn.utils.weight_norm(m[0])(VECTORS)),
        "layer '0' (Linear): 'weight' is rewritten by WeightNorm",
        "call torch.nn.utils.remove_weight_norm(layer) first",
    ),
    "weight_norm of a bias": (
        changed(lambda m: nn.utils.weight_norm(m[0], "bias")),
        "call torch.nn.utils.remove_weight_norm(layer, 'bias') first",
    ),
    "spectral_norm, old": (
        changed(lambda m: nn.utils.spectral_norm(m[2])),
        "layer '2' (Linear)", "call torch.nn.utils.remove_spectral_norm(layer) first",
    ),
    "weight_norm": (changed(lambda m: parametrizations.weight_norm(m[0])), "layer '0'", REMOVE),
    "spectral_norm": (changed(lambda m: parametrizations.spectral_norm(m[0])), "layer '0'", REMOVE),
    "orthogonal": (changed(lambda m: parametrizations.orthogonal(m[0])), "layer '0'", REMOVE),
    "a parametrization": (
        changed(lambda m: parametrize.register_parametrization(m[0], "weight", nn.Tanh())),
        "layer '0'", REMOVE,
    ),
    # hooks
    "forward hook": (
        changed(lambda m: m[1].register_forward_hook(lambda _, __, out: 2 * out)),
        "layer '1' (ReLU): has a forward hook, which a spec cannot hold: remove it",
    ),
    "forward pre-hook": (
        changed(lambda m: m[1].register_forward_pre_hook(lambda _, args: (2 * args[0],))),
        "layer '1' (ReLU): has a forward pre-hook",
    ),
    "hook of the whole": (
        changed(lambda m: m.register_forward_hook(lambda _, __, out: 2 * out)),
        "Sequential: has a forward hook",
    ),
    "pre-hook of a pruned layer": (
        changed(lambda m: (
            prune.random_unstructured(m[0], "weight", 0.5),
            m[0].register_forward_pre_hook(lambda _, args: (2 * args[0],)),
        )),
        "layer '0' (Linear): has a forward pre-hook",
    ),
    "backward hook": (
        changed(lambda m: m[1].register_full_backward_hook(lambda _, __, ___: None)),
        "layer '1' (ReLU): has a backward hook",
    ),
    "backward pre-hook": (
        changed(lambda m: m[1].register_full_backward_pre_hook(lambda _, __: None)),
        "layer '1' (ReLU): has a backward pre-hook",
    ),
    "gradient hook": (
        changed(lambda m: m[2].weight.register_hook(lambda g: 0 * g)),
        "layer '2' (Linear): 'weight' has a gradient hook",
    ),
    # tensors
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), "layer '0' (LazyLinear): 'weight' has no"),
    "meta": (changed(lambda m: m.to("meta")), "layer '0' (Linear): 'weight' is on the meta device"),
    "sparse": (
        changed(lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.data.to_sparse()))),
        "layer '0' (Linear): 'weight' is torch.sparse_coo", ".to_dense()",
    ),
    "complex": (
        lambda: nn.Sequential(nn.Linear(6, 3, dtype=torch.complex64)),
        "layer '0' (Linear): 'weight' is torch.complex64",
    ),
    "integers": (
        changed(lambda m: setattr(
            m[0], "weight", nn.Parameter(m[0].weight.data.to(torch.int8), requires_grad=False)
        )),
        "layer '0' (Linear): 'weight' is torch.int8, expected floats",
    ),
    "NaN": (
        changed(lambda m: set_data(m, 0, "weight", (0, slice(2)), NAN)),
        "layer '0' (Linear): '0.weight' holds 2 of 30 values that are NaN or infinite",
    ),
    "infinity": (
        changed(lambda m: set_data(m, 2, "bias", 0, float("inf"))),
        "layer '2' (Linear): '2.bias' holds 1 of 3 values",
    ),
    "NaN that is pruned": (  # in PyTorch NaN * 0 is NaN
        changed(lambda m: (
            set_data(m, 0, "weight", (0, 0), NAN),
            prune.custom_from_mask(m[0], "weight", m[0].weight.isfinite()),
        )),
        "'0.weight' holds 1 of 30 values",
    ),
    "too large for float32": (
        changed(lambda m: set_data(m.double(), 0, "weight", (0, 0), 1e300)),
        "'0.weight' holds 1 of 30 values", "in float32",
    ),
    "not a number in a buffer": (
        changed(lambda m: m[1].running_mean.fill_(NAN), cnn),
        "layer '1' (BatchNorm2d): '1.running_mean' holds 8 of 8 values",
    ),
    "negative variance": (
        changed(lambda m: m[1].running_var[2:5].fill_(-1), cnn),
        "layer '1' (BatchNorm2d): '1.running_var' holds 3 of 8 values below 0",
    ),
    "no statistics": (
        changed(lambda m: (setattr(m[1], "running_mean", None), setattr(m[1], "running_var", None)),
                cnn),
        "layer '1' (BatchNorm2d): '1.running_mean' is of shape None, expected (8,)",
    ),
    "shared parameter": (
        lambda: nn.Sequential(fc := nn.Linear(6, 6), nn.ReLU(), fc),
        "layer '0' (Linear): is used twice", "give each use a layer and parameters of its own",
    ),
    "shared memory": (
        changed(lambda m: setattr(m[1].weight, "data", m[0].weight.data),
                lambda: nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))),
        "layer '1' (Linear): 'weight' shares its memory with '0.weight'", "weight.data.clone()",
    ),
    "computed weight": (
        changed(lambda m: (weight := 2 * m[0].weight, delattr(m[0], "weight"),
                           setattr(m[0], "weight", weight))),
        "layer '0' (Linear): '0.weight' is computed by the module", "make it an nn.Parameter",
    ),
    # modules around modules, and no modules
    "torch.compile": (compiled, "OptimizedModule: only wraps the layers", "its ._orig_mod"),
    "DataParallel": (lambda: nn.DataParallel(mlp()), "DataParallel: only wraps", "its .module"),
    "wrapped inside": (
        lambda: nn.Sequential(nn.DataParallel(mlp()), nn.ReLU()), "layer '0' (DataParallel)",
    ),
    "quantised": (
        changed(lambda m: m.append(torch.ao.nn.quantized.Linear(3, 3))),
        "layer '3' (Linear): belongs to a quantised model: pass the float model",
    ),
    "quantised dynamically": (
        changed(lambda m: m.append(torch.ao.nn.quantized.dynamic.Linear(3, 3))),
        "layer '3' (Linear): belongs to a quantised model",
    ),
    "no layers": (nn.Sequential, "the model has no layers"),
    "only Identity": (nn.Identity, "the model has no layers"),
    "a class": (lambda: nn.Linear, "must be an instance of nn.Module, got the class Linear"),
    "a state dict": (OrderedDict, "must be an instance of nn.Module, got OrderedDict"),
    "no super().__init__": (NoSuper, "NoSuper: its __init__ does not call super().__init__()"),
    "no forward": (nn.Module, "torch.fx cannot follow Module.forward"),
    "a lock": (
        changed(lambda m: setattr(m[1], "lock", threading.Lock())),
        "layer '1' (ReLU): the attribute 'lock' cannot be copied (cannot pickle '_thread.lock'",
        "set it to None first",
    ),
    "activations kept in a list": (
        changed(lambda m: setattr(m, "kept", [m(VECTORS)])),
        "Sequential: the attribute 'kept' cannot be copied", "set it to None first",
    ),
    # forward
    "forward of a layer replaced": (
        changed(lambda m: setattr(m[1], "forward", torch.tanh)),
        "layer '1' (ReLU): has a forward that was set on the object", "define it in a class",
    ),
    "not registered": (
        net(lambda s, x: s.layers[0](x), layers=lambda: [linear()]),
        "torch.fx cannot follow Net.forward: Linear is not registered", "in an nn.ModuleList",
    ),
    "not registered, further down": (
        lambda: nn.Sequential(Net(lambda s, x: s.layers[0](x), layers=[linear()])),
        "layer '0': torch.fx cannot follow Net.forward: Linear is not registered",
    ),
    "keyword-only input": (KeywordOnly, "KeywordOnly.forward takes several inputs", "'gate'"),
    "two outputs": (net(lambda s, x: (F.relu(x), x)), "the model returns a tuple, only one tensor"),
    "no output": (net(lambda s, x: None), "the model returns a NoneType, only one tensor"),
    "a branch in training": (
        net(auxiliary, fc=linear, aux=linear),
        "layer 'aux' (Linear) is not the same in training", "without `if self.training`",
    ),
    "branching on values": (net(of_sign, fc=linear), "must not depend on the values of tensors"),
    "raising": (net(several_lines), "torch.fx cannot follow Net.forward"),
    "a layer called by keyword": (
        net(lambda s, x: s.fc(input=x), fc=linear), f"layer 'fc' (Linear): {KEYWORDS}",
    ),
    "flatten by keyword": (net(lambda s, x: torch.flatten(input=x, start_dim=1)), KEYWORDS),
    "add by keyword": (net(lambda s, x: torch.add(x, other=x)), f"layer 'add' (add): {KEYWORDS}"),
    "mul by keyword": (net(lambda s, x: torch.mul(input=x, other=x)), KEYWORDS),
    "a buffer": (
        net(lambda s, x: x + s.shift, shift=lambda: nn.Buffer(torch.ones(3, 6))),
        "layer 'add' (add): reads shift, which no layer computes", "no tensors outside of layers",
    ),
    "a tensor": (net(lambda s, x: x + s.shift, shift=lambda: torch.ones(3, 6)), "reads shift"),
    "a pruned tensor of its own": (
        changed(lambda m: prune.random_unstructured(m, "gain", 0.5),
                net(lambda s, x: F.relu(x) + s.gain, gain=lambda: nn.Parameter(torch.ones(3, 6)))),
        "layer 'add' (add): reads gain, which no layer computes",
    ),
    "a subclass": (
        lambda: nn.Sequential(type("Mine", (nn.Linear,), {})(6, 3)), "layer '0.linear'", UNKNOWN,
    ),
    "noise": (net(lambda s, x: x + torch.randn_like(x)), "layer 'randn_like'", UNKNOWN),
    "a conversion of types": (net(lambda s, x: s.fc(x.double()), fc=linear), "layer 'fc' fails on"),
    # training
    "no_grad": (net(no_grad, body=linear, head=lambda: nn.Linear(3, 2)), "'body.weight'", GRADIENT),
    "no_grad around all": (net(torch.no_grad()(lambda s, x: s.fc(x)), fc=linear), GRADIENT),
    "another backward": (
        net(lambda s, x: Reversed.apply(s.fc(x)), fc=linear),
        "'fc.weight' gets another gradient than from its layers", "with a backward of their own",
    ),
    "autocast": (net(autocast, fc=linear), "Net computes torch.bfloat16", "remove autocast"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused(name: str):
    make, *messages = REFUSED[name]
    module = make()
    example = IMAGES if "BatchNorm" in messages[0] else VECTORS
    with pytest.raises(ValueError) as caught:
        from_torch(module, example)
    for message in messages:
        assert message in str(caught.value)
    assert "\n" not in str(caught.value)
