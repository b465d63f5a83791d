"""Following a module with torch.fx: its graph, and what each node of it gives on an example.

It keeps modules whole whose types are in `leaves`, so that an error can name the user's layer.  It
does not say what a node is in a spec.
"""

from __future__ import annotations

import copy
import inspect
import operator
import re
from collections.abc import Callable, Container
from contextlib import suppress
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from fedlean.layers import Shape
from fedlean.models._draft import not_supported

_SHAPES = ("size", "dim", getattr)  # no layers: they read shapes


class Result(NamedTuple):
    shape: Shape  # of a tensor, with the batch axis


class _Tracer(fx.Tracer):
    def __init__(self, leaves: Container[type]) -> None:
        super().__init__()
        self._leaves = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in self._leaves or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """The call module(x): further arguments keep their defaults, rather than become inputs."""
        del is_module, concrete_args
        return root_fn, [self.root, self.create_proxy("placeholder", "x", (), {})]

    def path_of_module(self, mod: nn.Module) -> str:
        try:
            return super().path_of_module(mod)
        except NameError:
            raise NameError(f"{type(mod).__name__} is not registered as a submodule") from None


class _Shaped(fx.Proxy):
    """Stands for a tensor whose shape is known."""

    tracer: _WithShapes

    @property
    def shape(self) -> torch.Size:
        return self.tracer.value(self.node).shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def __len__(self) -> int:
        return self.shape[0]


class _WithShapes(_Tracer):
    """Knows the shapes that tensors have on the example, so that a forward may branch on them.

    Its values are on the meta device: nothing is computed, and no statistics move.
    """

    def __init__(self, leaves: Container[type], module: nn.Module, example: torch.Tensor) -> None:
        super().__init__(leaves)
        self._module = copy.deepcopy(module).to("meta")
        self._example = example.to("meta")
        self._values: dict[fx.Node, Any] = {}

    def value(self, node: fx.Node) -> Any:
        return self._values[node]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Shaped(node, self)

    def create_proxy(self, *given: Any, **named: Any) -> fx.Proxy:
        made = super().create_proxy(*given, **named)
        self._values[made.node] = self._run(made.node)
        return made

    @torch.no_grad()
    def _run(self, node: fx.Node) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), self.value)
        target: Any = node.target
        match node.op:
            case "placeholder":
                return self._example
            case "call_module":
                # not a call, which the tracer would take for one of the user's
                return self._module.get_submodule(target).forward(*args, **kwargs)
            case "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)
            case "call_function":
                return target(*args, **kwargs)
            case "get_attr":
                return operator.attrgetter(target)(self._module)
        return None


def trace(module: nn.Module, leaves: Container[type], example: torch.Tensor) -> fx.GraphModule:
    """The graph of module(x) in evaluation mode, in which `module` is left.

    Where its forward branches on shapes, that of tensors shaped as they are on `example`.

    Raises ValueError if torch.fx cannot follow, or if the layers are others in training.
    """
    try:
        inspect.signature(type(module).forward).bind(module, None)
    except TypeError as error:
        raise ValueError(
            f"{type(module).__name__}.forward takes several inputs ({error}), only one is "
            "supported: pass a module whose forward takes one tensor"
        ) from None
    in_training, traced = (_trace(module, leaves, example, mode) for mode in (True, False))
    for pair in zip_longest(in_training.graph.nodes, traced.graph.nodes):
        first, second = ((n.op, n.target, str(n.all_input_nodes)) if n else None for n in pair)
        if first != second:
            name = label(in_training, pair[0]) if first else label(traced, pair[1])
            raise ValueError(
                f"{name} is not the same in training and in evaluation: write a forward without "
                "`if self.training`"
            )
    return traced


def _trace(
    module: nn.Module, leaves: Container[type], example: torch.Tensor, training: bool
) -> fx.GraphModule:
    for layer in module.modules():  # not train(), which the user's class may define otherwise
        layer.training = training
    tracer = _Tracer(leaves)
    try:
        return fx.GraphModule(module, tracer.trace(module))
    except Exception as error:  # whatever the user's forward raises on symbolic values
        with suppress(Exception):  # the first error is the one to report
            return fx.GraphModule(module, _WithShapes(leaves, module, example).trace(module))
        path, kind = next(reversed(tracer.module_stack.values()), ("", type(module)))
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(
            f"{f'layer {path!r}: ' if path else ''}torch.fx cannot follow {kind.__name__}.forward: "
            f"{reason}.  Its control flow must not depend on the values of tensors, and "
            "the layers that it calls must be attributes or in an nn.ModuleList"
        ) from error


def where(traced: fx.GraphModule, node: fx.Node) -> tuple[str, str]:
    """The dotted path by which the user knows a layer, and what it is."""
    if node.op == "call_module":
        path = str(node.target)
        return path, type(traced.get_submodule(path)).__name__
    stack = list((node.meta.get("nn_module_stack") or {"": ("", None)}).values())
    kind = re.sub(r"_\d+$", "", node.name)
    return f"{stack[-1][0]}.{kind}".lstrip("."), kind


def label(traced: fx.GraphModule, node: fx.Node) -> str:
    path, kind = where(traced, node)
    return f"layer {path!r} ({kind})"


def refusal(traced: fx.GraphModule, node: fx.Node) -> str:
    path, kind = where(traced, node)
    return f"layer {path!r} ({kind}): {not_supported(kind)}"


def results(
    traced: fx.GraphModule, example: torch.Tensor, known: Callable[[fx.Node], bool]
) -> dict[fx.Node, Any]:
    """What each node gives on the example: a `Result`, or the value itself (sizes, numbers).

    Raises ValueError that names the layer which fails, or the module that is not `known`.
    """
    found: dict[fx.Node, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if n.op == "call_module" and not known(n):  # not run: it may want other types
                raise ValueError(refusal(traced, n))
            try:
                value = super().run_node(n)
            except Exception as error:
                if n.op != "call_module" and n.target not in _SHAPES and not known(n):
                    raise ValueError(refusal(traced, n)) from error
                name = str(n.target if n.op == "call_module" else n)
                reason = str(error).partition("\n")[0]
                shape = tuple(example.shape)
                raise ValueError(
                    f"layer {name!r} fails on example_input of shape {shape}: {reason}"
                ) from error
            found[n] = Result(tuple(value.shape)) if isinstance(value, torch.Tensor) else value
            return value

    recorder = Recorder(traced)
    recorder.extra_traceback = False  # a page that fx would add to each message
    with torch.no_grad():
        recorder.run(example.clone())  # the module may write to its input
    return found
