"""A model as ONNX, its normalisation inside: the same layers, one operator or a few each.

Pruned weights are 0 in it: ONNX has no sparse arithmetic that its runtimes use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fedlean.core import Model
from fedlean.export.window import window
from fedlean.layers import (
    GELU,
    Add,
    AvgPool2d,
    BatchNorm,
    Concat,
    Conv2d,
    Dropout,
    Flatten,
    GlobalAvgPool,
    GroupNorm,
    Hardsigmoid,
    Hardswish,
    Hardtanh,
    LeakyReLU,
    Linear,
    MaxPool2d,
    ReLU,
    Scale,
    Scaler,
    Sigmoid,
    SiLU,
    Tanh,
)
from fedlean.normalisation import Normalisation
from fedlean.spec import INPUT, Node

OPSET, IR_VERSION = 21, 10  # the first with GroupNormalization per channel
STORED, OUTPUT = "stored", "outputs"  # names of the graph's ends
_NO_ONNX = "writing ONNX needs the packages onnx and onnxruntime: pip install 'fedlean[onnx]'"


def onnx_bytes(model: Model, normalisation: Normalisation, class_names: tuple[str, ...]) -> bytes:
    """A graph from `stored`, float32 (examples, *input_shape), to `outputs` (examples, classes).

    Class names stand in its metadata, a line each.  Raises ValueError naming the layer that has no
    ONNX yet, or what to install.
    """
    try:
        from onnx import TensorProto, checker, helper
    except ImportError:
        raise ValueError(_NO_ONNX) from None
    graph = _Graph(model)
    graph.normalise(normalisation)
    for node in model.spec.nodes:
        graph.add(node)
    graph.operator("Identity", [model.spec.nodes[-1].name], OUTPUT)
    ends = {STORED: model.spec.input_shape, OUTPUT: model.spec.output_shape}
    first, last = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["examples", *shape])
        for name, shape in ends.items()
    )
    made = helper.make_model(
        helper.make_graph(graph.operators, "fedlean", [first], [last], graph.tensors),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="fedlean",
    )
    helper.set_model_props(made, {"class_names": "\n".join(class_names)})
    checker.check_model(made)
    return made.SerializeToString()


def onnx_outputs(content: bytes, x: np.ndarray) -> np.ndarray:
    """What onnxruntime computes of stored values x.  Raises ValueError saying what to install."""
    try:
        import onnxruntime
    except ImportError:
        raise ValueError(_NO_ONNX) from None
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return np.asarray(session.run([OUTPUT], {STORED: np.ascontiguousarray(x, np.float32)})[0])


class _Graph:
    """Operators and tensors so far; an activation has the name of its node."""

    def __init__(self, model: Model) -> None:
        from onnx import helper, numpy_helper

        self._make, self._tensor = helper.make_node, numpy_helper.from_array
        self.model = model
        self.operators: list[Any] = []
        self.tensors: list[Any] = []
        self._known: set[str] = set()

    def normalise(self, normal: Normalisation) -> None:
        each = (-1, *(1 for _ in self.model.spec.input_shape[1:]))
        factor = self.tensor("normalise.factor", normal.factor.reshape(each))
        shift = self.tensor("normalise.shift", normal.shift.reshape(each))
        self.operator("Mul", [STORED, factor], "normalise.scaled")
        self.operator("Sub", ["normalise.scaled", shift], INPUT)

    def add(self, node: Node) -> None:
        for kind, write in _CASES.items():
            if isinstance(node.layer, kind):
                write(self, node, list(node.inputs))
                return
        raise ValueError(
            f"layer {node.name!r} ({type(node.layer).__name__}) cannot be exported to ONNX yet: "
            "take --format torch"
        )

    def operator(self, kind: str, inputs: list[str], output: str, **settings: Any) -> None:
        self.operators.append(self._make(kind, inputs, [output], output, **settings))

    def tensor(self, name: str, values: np.ndarray) -> str:
        if name not in self._known:
            self._known.add(name)
            self.tensors.append(self._tensor(np.ascontiguousarray(values), name))
        return name

    def own(self, node: Node, *suffixes: str) -> list[str]:
        """Those of its tensors that it has."""
        names = [f"{node.name}.{suffix}" for suffix in suffixes]
        return [
            self.tensor(name, self.model.params[name])
            for name in names
            if name in self.model.params
        ]


def _linear(graph: _Graph, node: Node, inputs: list[str]) -> None:
    graph.operator("Gemm", inputs + graph.own(node, "weight", "bias"), node.name, transB=1)


def _conv(graph: _Graph, node: Node, inputs: list[str]) -> None:
    layer: Any = node.layer
    tensors = graph.own(node, "weight", "bias")
    graph.operator("Conv", inputs + tensors, node.name, group=layer.groups, **_window(layer))


def _max_pool(graph: _Graph, node: Node, inputs: list[str]) -> None:
    graph.operator("MaxPool", inputs, node.name, **_window(node.layer))


def _avg_pool(graph: _Graph, node: Node, inputs: list[str]) -> None:
    window = _window(node.layer)
    graph.operator("AveragePool", inputs, node.name, count_include_pad=1, **window)


def _global_pool(graph: _Graph, node: Node, inputs: list[str]) -> None:
    graph.operator("GlobalAveragePool", inputs, f"{node.name}.image")
    graph.operator("Flatten", [f"{node.name}.image"], node.name)


def _group_norm(graph: _Graph, node: Node, inputs: list[str]) -> None:
    layer: Any = node.layer
    tensors = graph.own(node, "weight", "bias")
    vector = len(graph.model.spec.shapes[node.name]) == 1
    source, out = inputs[0], node.name
    if vector:  # the operator wants a side beside the channels
        axis = graph.tensor("axes.2", np.array([2], np.int64))
        graph.operator("Unsqueeze", [source, axis], f"{node.name}.signal")
        source, out = f"{node.name}.signal", f"{node.name}.normed"
    graph.operator(
        "GroupNormalization", [source, *tensors], out, epsilon=layer.eps, num_groups=layer.groups
    )
    if vector:
        graph.operator("Flatten", [out], node.name)


def _batch_norm(graph: _Graph, node: Node, inputs: list[str]) -> None:
    layer: Any = node.layer
    tensors = graph.own(node, "weight", "bias", "running_mean", "running_var")
    graph.operator("BatchNormalization", inputs + tensors, node.name, epsilon=layer.eps)


def _hardtanh(graph: _Graph, node: Node, inputs: list[str]) -> None:
    layer: Any = node.layer
    ends = [
        graph.tensor(f"{node.name}.{key}", np.array(getattr(layer, key), np.float32))
        for key in ("low", "high")
    ]
    graph.operator("Clip", inputs + ends, node.name)


def _silu(graph: _Graph, node: Node, inputs: list[str]) -> None:
    graph.operator("Sigmoid", inputs, f"{node.name}.gate")
    graph.operator("Mul", [*inputs, f"{node.name}.gate"], node.name)


def _named(kind: str, **settings: Any) -> Callable[[_Graph, Node, list[str]], None]:
    def write(graph: _Graph, node: Node, inputs: list[str]) -> None:
        graph.operator(kind, inputs, node.name, **settings)

    return write


def _scale(graph: _Graph, node: Node, inputs: list[str]) -> None:
    sides = len(graph.model.spec.shapes[inputs[0]]) - 1  # of an image two, of a signal one
    axes = graph.tensor(f"axes.{sides}", np.arange(2, 2 + sides))
    graph.operator("Unsqueeze", [inputs[1], axes], f"{node.name}.gate")
    graph.operator("Mul", [inputs[0], f"{node.name}.gate"], node.name)


_CASES: Mapping[type, Callable[[_Graph, Node, list[str]], None]] = {
    Linear: _linear,
    Conv2d: _conv,
    AvgPool2d: _avg_pool,
    MaxPool2d: _max_pool,
    GlobalAvgPool: _global_pool,
    GroupNorm: _group_norm,
    BatchNorm: _batch_norm,
    ReLU: _named("Relu"),
    Hardswish: _named("HardSwish"),
    Hardsigmoid: _named("HardSigmoid", alpha=1 / 6, beta=0.5),
    Flatten: _named("Flatten"),
    Scaler: _named("Identity"),  # it works in training only, as dropout does
    Dropout: _named("Identity"),
    Add: _named("Sum"),
    Concat: _named("Concat", axis=1),
    LeakyReLU: lambda graph, node, inputs: graph.operator(
        "LeakyRelu", inputs, node.name, alpha=getattr(node.layer, "slope", 0.0)
    ),
    Hardtanh: _hardtanh,
    Sigmoid: _named("Sigmoid"),
    Tanh: _named("Tanh"),
    SiLU: _silu,
    GELU: lambda graph, node, inputs: graph.operator(
        "Gelu",
        inputs,
        node.name,
        approximate="tanh" if getattr(node.layer, "tanh", False) else "none",
    ),
    Scale: _scale,
}


def _window(layer: Any) -> dict[str, list[int]]:
    """ONNX counts the sides that there are: of a signal one."""
    found = window(layer)
    first = 1 if getattr(layer, "rank", 3) == 2 else 0
    settings = {
        "kernel_shape": list(found.kernel[first:]),
        "strides": list(found.stride[first:]),
        "pads": [*found.padding[first:], *found.padding[first:]],
    }
    return settings | (
        {"dilations": list(found.dilation[first:])} if max(found.dilation) > 1 else {}
    )
