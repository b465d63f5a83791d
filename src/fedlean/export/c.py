"""A model as one C99 file: no heap, no library but libm, activations in one fixed block.

A layer kind is a function of C (`c_kernels`) and a case here that writes its call.  Weights of
which few are kept stand as their values and a byte of distance each, row by row; others densely.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from math import prod
from typing import Any

import numpy as np

from fedlean.core import Model
from fedlean.export.buffers import VIEWS, Buffers, buffers
from fedlean.export.c_kernels import HEAD, KERNELS, MAIN
from fedlean.export.folded import Folded, folded
from fedlean.export.window import window
from fedlean.layers import (
    GELU,
    Add,
    AvgPool2d,
    BatchNorm,
    Concat,
    Conv2d,
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
    Shape,
    Sigmoid,
    SiLU,
    Tanh,
)
from fedlean.normalisation import Normalisation
from fedlean.spec import INPUT, Node

SPARSE_BYTES, DENSE_BYTES = 5, 4  # per kept weight with its distance; per weight
ESCAPE = 255  # of a distance: so many columns without a kept weight, and it goes on
PER_LINE = 8
_POINTWISE = {
    ReLU: "relu",
    Hardswish: "hardswish",
    Hardsigmoid: "hardsigmoid",
    LeakyReLU: "leaky_relu",
    Hardtanh: "hardtanh",
    Sigmoid: "sigmoid",
    Tanh: "hyperbolic_tangent",
    SiLU: "silu",
    GELU: "gelu",
}


def c_source(
    model: Model, normalisation: Normalisation, class_names: tuple[str, ...], name: str = "model"
) -> str:
    """The file.  name: what its functions and constants begin with, a C identifier.

    Raises ValueError naming the layer that has no C yet.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,40}", name):
        raise ValueError(f"name must be a C identifier in lower case, got {name!r:.50}")
    net = folded(model)
    return _Writer(net, buffers(net.spec, net.nodes), name).text(normalisation, class_names)


@dataclass
class _Writer:
    net: Folded
    places: Buffers
    name: str

    def __post_init__(self) -> None:
        self._data: list[str] = []
        self._calls: list[str] = []
        self._used: set[str] = set()

    def text(self, normal: Normalisation, class_names: tuple[str, ...]) -> str:
        spec = self.net.spec
        channels, size = spec.input_shape[0], prod(spec.input_shape)
        self._call(
            "normalise",
            "x",
            self._at(INPUT),
            self._floats("input_factor", normal.factor),
            self._floats("input_shift", normal.shift),
            channels,
            size // channels,
        )
        for node in self.net.nodes:
            if not isinstance(node.layer, VIEWS):
                self._node(node)
        outputs = spec.output_shape[0]
        last = self._at(self.net.nodes[-1].name)
        names = list(class_names[:outputs]) + [""] * (outputs - len(class_names))
        about = {
            "NAME": self.name,
            "UPPER": self.name.upper(),
            "INPUTS": size,
            "SHAPE": " x ".join(map(str, spec.input_shape)),
            "OUTPUTS": outputs,
            "MEMORY": self.places.size,
            "CLASSES": ", ".join(map(_quoted, names)),
        }
        parts = [
            _filled(HEAD, about),
            *(KERNELS[kernel] for kernel in KERNELS if kernel in self._used),
            *self._data,
            f"void {self.name}_run(const float *x, float *y) {{",
            *(f"    {call}" for call in self._calls),
            f"    for (int i = 0; i < {outputs}; i++) y[i] = {last}[i];",
            "}\n",
            _filled(MAIN, about),
        ]
        return "\n".join(parts)

    def _node(self, node: Node) -> None:
        for kind, write in _CASES.items():
            if isinstance(node.layer, kind):
                write(self, node, [self.net.spec.shapes[name] for name in node.inputs])
                return
        raise ValueError(
            f"layer {node.name!r} ({type(node.layer).__name__}) cannot be exported to C yet: take "
            "--format onnx or torch"
        )

    def _call(self, kernel: str, *arguments: object) -> None:
        self._used.add(kernel)
        self._calls.append(f"{kernel}({', '.join(map(str, arguments))});")

    def _at(self, name: str) -> str:
        return f"(memory + {self.places.at[name]})"

    def _ends(self, node: Node) -> tuple[str, str]:
        """Where it reads, and where it writes."""
        return self._at(node.inputs[0]), self._at(node.name)

    def _floats(self, name: str, values: np.ndarray | None) -> str:
        if values is None:
            return "0"
        return self._array("float", name, [_number(value) for value in values.ravel()])

    def _array(self, type: str, name: str, texts: list[str]) -> str:
        name = "v_" + re.sub(r"\W", "_", name)
        lines = [
            ", ".join(texts[start : start + PER_LINE]) for start in range(0, len(texts), PER_LINE)
        ]
        self._data.append(
            f"static const {type} {name}[{max(1, len(texts))}] = {{\n"
            + ",\n".join(lines or ["0"])
            + "\n};"
        )
        return name

    def weights(self, node: Node) -> tuple[str, str, str, str]:
        """Names of values, distances ("0": dense), kept per row, bias."""
        own = self.net.values[node.name]
        bias = self._floats(f"{node.name}_bias", own.get("bias"))
        rows = own["weight"].reshape(len(own["weight"]), -1)
        kept = np.count_nonzero(rows)
        if kept * SPARSE_BYTES >= rows.size * DENSE_BYTES:
            return self._floats(f"{node.name}_weight", rows), "0", "0", bias
        distances: list[str] = []
        for row in rows:
            for gap in np.diff(np.flatnonzero(row), prepend=-1) - 1:
                distances += [str(ESCAPE)] * (gap // ESCAPE) + [str(gap % ESCAPE)]
        counts = [str(count) for count in np.count_nonzero(rows, axis=1)]
        return (
            self._floats(f"{node.name}_weight", rows[rows != 0]),
            self._array("uint8_t", f"{node.name}_distance", distances),
            self._array("uint32_t", f"{node.name}_kept", counts),
            bias,
        )


def _linear(writer: _Writer, node: Node, shapes: list[Shape]) -> None:
    values, distances, kept, bias = writer.weights(node)
    rows = writer.net.spec.shapes[node.name][0]
    ends = writer._ends(node)
    if distances == "0":
        writer._call("linear", *ends, values, bias, rows, shapes[0][0])
    else:
        writer._call("linear_sparse", *ends, values, distances, kept, bias, rows)


def _conv(writer: _Writer, node: Node, shapes: list[Shape]) -> None:
    values, distances, kept, bias = writer.weights(node)
    layer: Any = node.layer
    out = writer.net.spec.shapes[node.name]
    writer._call(
        "conv",
        *writer._ends(node),
        values,
        distances,
        kept,
        bias,
        *_image(shapes[0]),
        *_image(out),
        *(side for sides in window(layer) for side in sides),
        layer.groups,
    )


def _pool(kernel: str) -> Callable[[_Writer, Node, list[Shape]], None]:
    def write(writer: _Writer, node: Node, shapes: list[Shape]) -> None:
        _, height, width = _image(writer.net.spec.shapes[node.name])
        sides = [side for sides in window(node.layer)[:3] for side in sides]
        writer._call(kernel, *writer._ends(node), *_image(shapes[0]), height, width, *sides)

    return write


def _global_pool(writer: _Writer, node: Node, shapes: list[Shape]) -> None:
    channels, *sides = shapes[0]
    writer._call("global_average", *writer._ends(node), channels, prod(sides))


def _group_norm(writer: _Writer, node: Node, shapes: list[Shape]) -> None:
    own, layer = writer.net.values[node.name], node.layer
    assert isinstance(layer, GroupNorm)
    tensors = (writer._floats(f"{node.name}_{key}", own[key]) for key in ("weight", "bias"))
    channels, *sides = shapes[0]
    eps = _number(np.float32(layer.eps))
    writer._call(
        "group_norm", *writer._ends(node), *tensors, channels, prod(sides), layer.groups, eps
    )


def _batch_norm(writer: _Writer, node: Node, shapes: list[Shape]) -> None:
    own = writer.net.values[node.name]
    tensors = (writer._floats(f"{node.name}_{key}", own[key]) for key in ("factor", "shift"))
    channels, *sides = shapes[0]
    writer._call("affine", *writer._ends(node), *tensors, channels, prod(sides))


def _pointwise(writer: _Writer, node: Node, shapes: list[Shape]) -> None:
    layer: Any = node.layer
    kernel = _POINTWISE[type(layer)]
    settings = []
    if isinstance(layer, GELU):
        kernel = "gelu_tanh" if layer.tanh else kernel
    else:
        settings = [_number(np.float32(getattr(layer, each.name))) for each in fields(layer)]
    writer._call(kernel, *writer._ends(node), prod(shapes[0]), *settings)


def _add(writer: _Writer, node: Node, shapes: list[Shape]) -> None:
    first, *others = (writer._at(name) for name in node.inputs)
    own, size = writer._at(node.name), prod(shapes[0])
    for other in others:
        writer._call("add", first, other, own, size)
        first = own


def _concat(writer: _Writer, node: Node, shapes: list[Shape]) -> None:
    at = writer.places.at[node.name]
    for name, shape in zip(node.inputs, shapes, strict=True):
        writer._call("copy", writer._at(name), f"(memory + {at})", prod(shape))
        at += prod(shape)


def _scale(writer: _Writer, node: Node, shapes: list[Shape]) -> None:
    image, gate = (writer._at(name) for name in node.inputs)
    channels, *sides = shapes[0]
    writer._call("scale", image, gate, writer._at(node.name), channels, prod(sides))


_CASES: Mapping[type, Callable[[_Writer, Node, list[Shape]], None]] = {
    Linear: _linear,
    Conv2d: _conv,
    AvgPool2d: _pool("average_pool"),
    MaxPool2d: _pool("max_pool"),
    GlobalAvgPool: _global_pool,
    GroupNorm: _group_norm,
    BatchNorm: _batch_norm,
    **dict.fromkeys(_POINTWISE, _pointwise),
    Add: _add,
    Concat: _concat,
    Scale: _scale,
}


def _image(shape: Shape) -> tuple[int, int, int]:
    """(C, H, W): a signal (C, L) is an image of one row."""
    channels, *sides = shape
    return channels, sides[0] if len(sides) == 2 else 1, sides[-1] if sides else 1


def _number(value: np.floating) -> str:
    """The shortest decimal that is this float32 again."""
    text = str(np.float32(value))
    return f"{text}f" if "." in text or "e" in text else f"{text}.0f"


def _quoted(name: str) -> str:
    """A C string of any text: bytes beyond printable ASCII as octal, which ends after 3 digits."""
    plain = {*range(32, 127)} - {ord('"'), ord("\\"), ord("?")}
    return '"' + "".join(chr(b) if b in plain else f"\\{b:03o}" for b in name.encode()) + '"'


def _filled(template: str, values: Mapping[str, object]) -> str:
    for key, value in values.items():
        template = template.replace(f"@{key}@", str(value))
    return template
