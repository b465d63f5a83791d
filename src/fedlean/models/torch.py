"""PyTorch modules from specs, and specs from PyTorch modules.

With its parts (`_torch_*.py`) the only module of this package that imports torch;
nothing else in the package imports it in turn.  `to_torch` gives a module whose state dict has
exactly the tensor names of the spec.  `from_torch` follows the module with torch.fx (it keeps
modules whole, so an error can name the user's layer, which torch.export's flattened operators
cannot) and refuses, by name, what a spec cannot say.
Images of 1x1, (B, C, 1, 1), that follow a global pooling are vectors (C,) in a spec; a 1x1
convolution on one becomes a Linear.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.node import map_arg

from fedlean import layers
from fedlean.core import Masks, Params, SubModel
from fedlean.layers import Layer, Shape
from fedlean.models import _torch_layers as convert
from fedlean.models._draft import Draft, Held, not_supported, only_new_axes
from fedlean.models._in_place import refuse_visible_writes
from fedlean.models._torch_state import checked_copy, read_example, read_tensor
from fedlean.models._torch_trace import Result, results, trace, where
from fedlean.models._torch_verify import verify
from fedlean.models.brought import Converted, Names, TensorName
from fedlean.models.initialise import check_params, init_params
from fedlean.spec import INPUT, ModelSpec
from fedlean.tree import apply_mask

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d)


class _Add(nn.Module):
    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return sum(inputs[1:], start=inputs[0])


class _Scale(nn.Module):
    def forward(self, image: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return image * gate.reshape(*image.shape[:2], *[1] * (image.ndim - 2))  # (B, C)


class _Concat(nn.Module):
    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return torch.cat(inputs, 1)


class _Scaler(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor if self.training else x


class _GlobalAvgPool(nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image.flatten(2).mean(2)


class _BatchNorm(nn.Module):
    """nn.BatchNorm1d/2d without `num_batches_tracked`, which no spec has and nothing here reads."""

    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(self, channels: int, eps: float, momentum: float) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight, self.bias = (nn.Parameter(torch.empty(channels)) for _ in range(2))
        self.register_buffer("running_mean", torch.empty(channels))
        self.register_buffer("running_var", torch.empty(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, var = self.running_mean, self.running_var
        weight, bias = self.weight, self.bias
        return F.batch_norm(x, mean, var, weight, bias, self.training, self.momentum, self.eps)


def to_torch(spec: ModelSpec, params: Params | None = None) -> fx.GraphModule:
    """A trainable float32 module that computes `spec`; without `params`, `init_params(spec, 0)`.

    Its submodules carry the nodes' names and its state dict the spec's tensor names, so params and
    state dicts are interchangeable.  Arrays are copied; torch's random state is not touched.

    >>> from fedlean.models.lenet300 import lenet300
    >>> module = to_torch(lenet300((1, 8, 8), 10))
    >>> list(module.state_dict())[:2], module(torch.zeros(5, 1, 8, 8)).shape
    (['fc1.weight', 'fc1.bias'], torch.Size([5, 10]))
    """
    params = init_params(spec, 0) if params is None else params
    check_params(spec, params)
    graph = fx.Graph()
    values = {INPUT: graph.placeholder("x")}
    modules: dict[str, Any] = {}
    for node in spec.nodes:
        if hasattr(fx.GraphModule, node.name) or node.name in ("graph", "meta", "training"):
            raise ValueError(
                f"layer {node.name!r}: PyTorch modules use this name themselves, choose another"
            )
        with torch.device("meta"):  # no memory, no random draws: the values come from `params`
            modules[node.name] = _module(node.layer, spec.input_shapes(node)[0])
        inputs = tuple(values[source] for source in node.inputs)
        values[node.name] = graph.create_node("call_module", node.name, inputs)
    graph.output(values[spec.nodes[-1].name])
    module = fx.GraphModule(modules, graph, "SpecModule")
    state = {name: torch.from_numpy(np.array(params[name])) for name in spec.tensor_shapes}
    module.load_state_dict(state, assign=True)
    return module


class _Stored(nn.Module):
    """A network that reads stored values: x · factor - shift per channel, then itself."""

    factor: torch.Tensor
    shift: torch.Tensor

    def __init__(self, network: nn.Module, factor: np.ndarray, shift: np.ndarray) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("factor", torch.from_numpy(factor))
        self.register_buffer("shift", torch.from_numpy(shift))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        each = (-1, *(1 for _ in x.shape[2:]))
        return self.network(x * self.factor.reshape(each) - self.shift.reshape(each))


def exported(
    spec: ModelSpec, params: Params, factor: np.ndarray, shift: np.ndarray, file: BinaryIO
) -> None:
    """Writes what `torch.export.load` reads: a program of stored values, of any batch size."""
    module = _Stored(to_torch(spec, params), factor, shift).eval()
    example = torch.zeros(2, *spec.input_shape)
    sizes = {"x": {0: torch.export.Dim("examples")}}
    torch.export.save(torch.export.export(module, (example,), dynamic_shapes=sizes), file)


def run_exported(file: BinaryIO, x: np.ndarray) -> np.ndarray:
    """What the program computes of stored values x."""
    file.seek(0)
    with torch.no_grad():
        return torch.export.load(file).module()(torch.from_numpy(x)).numpy()


def as_tensors(arrays: Params) -> dict[str, torch.Tensor]:
    """A state dict of arrays, whose memory it shares."""
    return {name: torch.from_numpy(value) for name, value in arrays.items()}


def _module(layer: Layer, shape: Shape) -> nn.Module:
    """`layer` for a (first) input of `shape`, with uninitialised parameters."""
    match layer:
        case layers.Linear():
            return nn.Linear(shape[0], layer.out_features, layer.bias)
        case layers.Conv2d(out, kernel, stride, padding, groups, bias, dilation):
            make: Any = nn.Conv2d if layer.rank == 3 else nn.Conv1d
            return make(shape[0], out, kernel, stride, padding, dilation, groups, bias)
        case layers.AvgPool2d():
            make: Any = nn.AvgPool2d if layer.rank == 3 else nn.AvgPool1d
            return make(layer.kernel_size, layer.stride, layer.padding)
        case layers.MaxPool2d():
            make: Any = nn.MaxPool2d if layer.rank == 3 else nn.MaxPool1d
            return make(layer.kernel_size, layer.stride, layer.padding)
        case layers.GroupNorm():
            return nn.GroupNorm(layer.groups, shape[0], layer.eps)
        case layers.BatchNorm():
            return _BatchNorm(shape[0], layer.eps, layer.momentum)
        case layers.Scaler():
            return _Scaler(layer.factor)
        case layers.LeakyReLU():
            return nn.LeakyReLU(layer.slope)
        case layers.Hardtanh():
            return nn.Hardtanh(layer.low, layer.high)
        case layers.GELU():
            return nn.GELU("tanh" if layer.tanh else "none")
        case layers.Dropout():
            of_channels = {3: nn.Dropout2d, 2: nn.Dropout1d} if layer.channels else {}
            return of_channels.get(len(shape), nn.Dropout)(layer.p)
        case _:
            return _STATELESS[type(layer)]()


_STATELESS: dict[type, type[nn.Module]] = {
    layers.GlobalAvgPool: _GlobalAvgPool,
    layers.ReLU: nn.ReLU,
    layers.Hardswish: nn.Hardswish,
    layers.Hardsigmoid: nn.Hardsigmoid,
    layers.Sigmoid: nn.Sigmoid,
    layers.Tanh: nn.Tanh,
    layers.SiLU: nn.SiLU,
    layers.Flatten: nn.Flatten,
    layers.Add: _Add,
    layers.Concat: _Concat,
    layers.Scale: _Scale,
}


# --- from_torch: what there is --------------------------------------------------------------------


def _is(layer: Layer | None) -> Callable[[Any, Shape], Layer | None]:
    return lambda _, __: layer


_Layers = Layer | tuple[Layer, ...] | None  # several follow one another; None: passes its input on
_MODULES: dict[Any, Callable[[Any, Shape], _Layers]] = {
    nn.Linear: convert.linear,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d), convert.conv),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d), convert.max_pool),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d), convert.avg_pool),
    **dict.fromkeys((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d), convert.adaptive_avg_pool),
    **dict.fromkeys((nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d), convert.adaptive_max_pool),
    **dict.fromkeys((nn.Hardtanh, nn.ReLU6), convert.hardtanh),
    nn.LeakyReLU: convert.leaky_relu,
    nn.GELU: convert.gelu,
    nn.LayerNorm: convert.layer_norm,
    nn.GroupNorm: convert.group_norm,
    nn.BatchNorm1d: convert.batch_norm,
    nn.BatchNorm2d: convert.batch_norm,
    _BatchNorm: convert.batch_norm,
    _Scaler: lambda scaler, _: layers.Scaler(scaler.factor),
    nn.Identity: _is(None),
    **dict.fromkeys(_DROPOUTS, convert.dropout),
    **{module: _is(layer()) for layer, module in _STATELESS.items()},
}


def _dropout(kind: Callable[[float], nn.Module]) -> Callable[..., nn.Module]:
    def module(p: float = 0.5, training: bool = True, inplace: bool = False) -> nn.Module:
        if training and p:  # the graph is that of evaluation
            raise ValueError(
                f"drops p={p} in evaluation, too: pass training=self.training, or use nn.Dropout"
            )
        return kind(p)

    return module


# Calls that are a module in another spelling: (arguments after the input) -> that module.
_CALLS: dict[Any, Callable[..., nn.Module]] = {
    F.max_pool1d: nn.MaxPool1d,
    F.max_pool2d: nn.MaxPool2d,
    F.avg_pool1d: nn.AvgPool1d,
    F.avg_pool2d: nn.AvgPool2d,
    F.adaptive_avg_pool1d: nn.AdaptiveAvgPool1d,
    F.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d,
    F.adaptive_max_pool1d: nn.AdaptiveMaxPool1d,
    F.adaptive_max_pool2d: nn.AdaptiveMaxPool2d,
    F.dropout: _dropout(nn.Dropout),
    F.dropout1d: _dropout(nn.Dropout1d),
    F.dropout2d: _dropout(nn.Dropout2d),
    F.hardswish: nn.Hardswish,
    F.hardsigmoid: nn.Hardsigmoid,
    F.relu6: nn.ReLU6,
    F.hardtanh: nn.Hardtanh,
    F.leaky_relu: nn.LeakyReLU,
    F.silu: nn.SiLU,
    F.gelu: nn.GELU,
    **dict.fromkeys((F.sigmoid, torch.sigmoid, "sigmoid"), nn.Sigmoid),
    **dict.fromkeys((F.tanh, torch.tanh, "tanh"), nn.Tanh),
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, "relu", "relu_"), nn.ReLU),
}
_EXPANDS = {"expand", "expand_as"}
_RESHAPES = {torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze, operator.getitem} | {
    *("flatten", "reshape", "view", "squeeze", "unsqueeze", "contiguous", *_EXPANDS)
}
_MEANS = {torch.mean, "mean"}
_SUMS = {operator.add, torch.add, "add"}
_PRODUCTS = {operator.mul, torch.mul, "mul"}
_CATS = {torch.cat, torch.concat, torch.concatenate}
_CALLS_OF_TENSORS = _RESHAPES | _MEANS | _SUMS | _PRODUCTS | _CATS


# --- from_torch: the graph ------------------------------------------------------------------------


@torch.inference_mode(False)  # which turns gradients on, whatever the caller has set
def from_torch(
    module: nn.Module,
    example_input: torch.Tensor | np.ndarray | Sequence[Any],
    *,
    drop_dropout: bool = False,
) -> Converted:
    """The spec of `module` and a float32 copy of its tensors; `example_input` is (B, ...).

    Layers are named after their module path with '.' -> '_'.  A block is a child of the top module;
    outside of those each Linear or Conv2d starts one.  With `drop_dropout` the spec has no Dropout.

    Weights pruned by torch.nn.utils.prune come back masked, parameters with requires_grad=False
    frozen.  The statistics of a BatchNorm move in training even if its parameters are frozen, as in
    PyTorch; `train()` and `eval()` of the user's module are not looked at.  Modules and examples of
    another precision are converted to float32, integer and boolean examples too.

    The result's outputs and gradients are compared with those of `module`, in float32.  Raises
    ValueError that names the layer which cannot be converted, and what to do.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    >>> spec, params, sub_model = from_torch(net, torch.zeros(1, 1, 8, 8))
    >>> [node.name for node in spec.nodes], params["1.weight"].shape
    (['0', '1'], (10, 64))
    """
    example = read_example(example_input)
    alone = type(module) in _MODULES
    original, masks = checked_copy(nn.Sequential(module) if alone else module)
    traced = trace(original, _MODULES, example)
    _refuse_visible_writes(traced)
    traced.graph.eliminate_dead_code()
    found = results(traced, example, lambda node: _known(traced, node))
    conversion = _Conversion(traced, found, masks, drop_dropout)
    for node in traced.graph.nodes:
        conversion.visit(node)
    spec = ModelSpec(tuple(example.shape[1:]), tuple(conversion.draft.nodes))
    sub_model = SubModel(masks=conversion.masks, frozen=frozenset(conversion.frozen))
    params = {name: conversion.tensors[name] for name in spec.tensor_shapes}
    params = apply_mask(params, sub_model.masks)  # -1·0 is -0
    verify(original, to_torch(spec, params).eval(), example, conversion.trained)
    return Converted(spec, params, sub_model, _names(conversion, spec, original, alone=alone))


def _names(conversion: _Conversion, spec: ModelSpec, original: nn.Module, *, alone: bool) -> Names:
    """alone: `original` is the user's layer in a container of ours, whose "0." he does not know."""

    def own(name: str) -> str:
        return name.removeprefix("0.") if alone else name

    of = {name: conversion.own_names[name] for name in spec.tensor_shapes}
    known = {each.name for each in of.values()}
    rest = {
        own(name): np.array(tensor.detach().numpy())
        for name, tensor in original.state_dict().items()
        if name not in known and not name.endswith("num_batches_tracked")
    }
    return Names({name: each._replace(name=own(each.name)) for name, each in of.items()}, rest)


def _known(traced: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(traced.get_submodule(str(node.target))) in _MODULES
    return node.target in _CALLS or node.target in _CALLS_OF_TENSORS


def _refuse_visible_writes(traced: fx.GraphModule) -> None:
    def module(node: fx.Node) -> nn.Module | None:
        return traced.get_submodule(str(node.target)) if node.op == "call_module" else None

    def writes(node: fx.Node) -> bool:
        if (called := module(node)) is not None:
            return bool(getattr(called, "inplace", False)) and not isinstance(called, _DROPOUTS)
        name = getattr(node.target, "__name__", str(node.target))
        by_position = node.target is F.relu and node.args[1:2] == (True,)
        return by_position or name.endswith("_") or bool(node.kwargs.get("inplace"))

    def shares_memory(node: fx.Node) -> bool:
        passes = isinstance(module(node), (nn.Identity, nn.Flatten, *_DROPOUTS))
        return passes or node.target in _RESHAPES or node.target is F.dropout

    refuse_visible_writes(traced.graph.nodes, writes=writes, shares_memory=shares_memory)


_BY_POSITION = "is called with keywords: give its inputs by position"


class _Conversion:
    """Visits the nodes of a traced module in order; collects the spec's nodes and tensors."""

    def __init__(
        self,
        traced: fx.GraphModule,
        results: dict[fx.Node, Any],
        user_masks: Masks,  # by the dotted path of the tensor
        drop_dropout: bool,
    ) -> None:
        self.traced, self.results = traced, results
        self.user_masks, self.drop_dropout = user_masks, drop_dropout
        self.draft = Draft(path for path, _ in traced.named_modules())
        self.tensors: dict[str, np.ndarray] = {}
        self.own_names: dict[str, TensorName] = {}
        self.masks: dict[str, np.ndarray] = {}
        self.frozen: set[str] = set()
        self.trained: dict[str, torch.Tensor] = {}
        self.held: dict[fx.Node, Held] = {}
        self.batch = 0
        self.seen: set[int] = set()  # ids of the parameters that a layer owns

    def visit(self, node: fx.Node) -> None:
        path, kind = where(self.traced, node)
        try:
            if node.op == "placeholder":
                self._input(node)
            elif node.op == "output":
                self._output(node)
            elif node.op == "call_module":
                self._module(node, path, self.traced.get_submodule(str(node.target)))
            elif node.op != "get_attr" and isinstance(self.results[node], Result):
                self._call(node, path)
        except (ValueError, TypeError) as error:
            raise ValueError(f"layer {path!r} ({kind}): {error}") from None

    def _input(self, node: fx.Node) -> None:
        self.batch, *shape = self.results[node].shape
        self.held[node] = Held(INPUT, tuple(shape), tuple(shape))

    def _output(self, node: fx.Node) -> None:
        if not isinstance(node.args[0], fx.Node):
            kind = type(node.args[0]).__name__
            raise ValueError(f"the model returns a {kind}, only one tensor is supported")
        held = self._read(node.args[0])
        if not self.draft.nodes:
            raise ValueError("the model has no layers")
        if held.shape != held.torch_shape or held.name != self.draft.nodes[-1].name:
            raise ValueError(f"the result of shape {held.torch_shape} is not {held.name!r} itself")

    def _read(self, value: Any) -> Held:
        if not isinstance(value, fx.Node):
            raise ValueError(f"only tensors of other layers are supported, got {value!r}")
        if value not in self.held:
            raise ValueError(
                f"reads {value.target!s:.80}, which no layer computes: a spec has no tensors "
                "outside of layers"
            )
        return self.held[value]

    def _shape(self, node: fx.Node) -> Shape:
        shape = self.results[node].shape
        if shape[:1] != (self.batch,):
            raise ValueError(f"turns a batch of {self.batch} into shape {shape}")
        return shape[1:]

    def _module(self, node: fx.Node, path: str, module: nn.Module) -> None:
        # A call's further arguments are settings, and have gone into `module`.
        inputs = node.args if node.op == "call_module" else node.args[:1]
        if not inputs:
            raise ValueError(_BY_POSITION)
        sources = [self._read(value).checked() for value in inputs]
        layer = _MODULES[type(module)](module, sources[0].shape)
        if self.drop_dropout and isinstance(layer, layers.Dropout):
            layer = None
        shape, call = self._shape(node), node.op != "call_module"
        if layer is None:
            self.held[node] = sources[0]._replace(torch_shape=shape)
            return
        if isinstance(layer, tuple):
            *before, layer = layer
            for one in before:
                between = one.output_shape([source.shape for source in sources])
                sources = [self.draft.add(f"{path}_first", one, sources, between, call=True)]
        self._own(module)
        held = self.held[node] = self.draft.add(path, layer, sources, shape, call=call)
        for method in ("param_shapes", "buffer_shapes"):
            own = getattr(layer, method, lambda _: {})([source.shape for source in sources])
            for suffix, tensor_shape in own.items():
                name, tensor = f"{held.name}.{suffix}", getattr(module, suffix)
                self.tensors[name] = read_tensor(name, tensor, tensor_shape)
                self.own_names[name] = TensorName(f"{path}.{suffix}", tuple(tensor.shape))
                if tensor.requires_grad:
                    self.trained[name] = tensor
                elif method == "param_shapes":
                    self.frozen.add(name)
                if (mask := self.user_masks.get(f"{path}.{suffix}")) is not None:
                    convert.refuse_mask(layer, suffix)
                    self.masks[name] = mask.reshape(tensor_shape)

    def _own(self, module: nn.Module) -> None:
        own = {id(parameter) for parameter in module.parameters()}
        if own & self.seen:
            raise ValueError(
                "is used twice or shares its parameters, which is not supported: give each use a "
                "layer and parameters of its own"
            )
        self.seen |= own

    def _call(self, node: fx.Node, path: str) -> None:
        if node.target in _CALLS:
            args, kwargs = map_arg((node.args[1:], node.kwargs), self.results.__getitem__)
            self._module(node, path, _CALLS[node.target](*args, **kwargs))
            return
        if node.target not in _CALLS_OF_TENSORS or node.kwargs.get("alpha"):
            raise ValueError(not_supported(where(self.traced, node)[1]))
        inputs = 2 if node.target in _SUMS | _PRODUCTS else 1
        if len(node.args) < inputs:
            raise ValueError(_BY_POSITION)
        if node.target in _CATS:
            axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
            parts = [self._read(value) for value in tuple(node.args[0])]  # type: ignore[arg-type]
            self.held[node] = self.draft.concat(path, parts, axis, self._shape(node))
            return
        sides = [self._read(value) for value in node.args[:inputs]]
        shape = self._shape(node)
        if node.target in _RESHAPES:
            if node.target is operator.getitem and not only_new_axes(node.args[1]):
                raise ValueError("only new axes are supported, as in x[:, :, None, None]")
            expand = node.target in _EXPANDS
            self.held[node] = self.draft.reshape(path, sides[0], shape, expand=expand)
        elif node.target in _MEANS:
            axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
            self.held[node] = self.draft.mean(path, sides[0], axes, shape)
        elif node.target in _SUMS:
            self.held[node] = self.draft.sum(path, sides, shape)
        else:
            self.held[node] = self.draft.scale(path, sides, shape)
