"""What the native engine derives from a model and what of it is trained, the same for every pass.

A model of `Structure` in `native/src/program.cpp`: around images lie zeros, so that a convolution
never asks whether a pixel is inside.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from fedlean import layers as L
from fedlean.engine.gradient_flow import needs_gradient
from fedlean.engine.native_storage import Geometry
from fedlean.spec import INPUT, ModelSpec, Node


@dataclass(frozen=True)
class Structure:
    """Per activation, by the node that makes it (or the input)."""

    value_halo: dict[str, int]  # zeros around the image
    grad_halo: dict[str, int]  # and around its gradient
    needs_grad: Mapping[str, bool]
    readers: Counter[str]


def structure(spec: ModelSpec, frozen: frozenset[str]) -> Structure:
    """`frozen` names tensors that are not trained."""
    names = (INPUT, *spec.by_name)
    s = Structure(
        dict.fromkeys(names, 0),
        dict.fromkeys(names, 0),
        needs_gradient(spec, frozen),
        Counter(source for node in spec.nodes for source in node.inputs),
    )
    for node in spec.nodes:
        if isinstance(node.layer, L.Conv2d):
            halo = node.layer.padding if node.layer.stride == 1 else 0
            s.value_halo[node.inputs[0]] = max(s.value_halo[node.inputs[0]], halo)
            if s.needs_grad[node.inputs[0]]:
                s.grad_halo[node.name] = _gradient_halo(spec, node, node.layer)
    alike = [n for n in spec.nodes if isinstance(n.layer, L.ReLU | L.Add | L.Scaler)]
    alike = [node for node in alike if s.readers[node.inputs[0]] == 1]  # they may share memory
    for node in reversed(alike):
        source = node.inputs[0]
        s.value_halo[source] = max(s.value_halo[source], s.value_halo[node.name])
    for node in alike:
        s.grad_halo[node.name] = max(s.grad_halo[node.name], s.grad_halo[node.inputs[0]])
    return s


def geometries(spec: ModelSpec, s: Structure, slower: Collection[str] = ()) -> dict[str, Geometry]:
    """Of the layers with weights, by name; those in `slower` take the slower of two forms."""
    return {
        node.name: Geometry(
            s.needs_grad[node.inputs[0]],
            s.value_halo[node.inputs[0]],
            s.grad_halo[node.name],
            node.name in slower,
        )
        for node in spec.weighted
    }


def _gradient_halo(spec: ModelSpec, node: Node, conv: L.Conv2d) -> int:
    if conv.stride == 1:
        return max(0, conv.kernel_size - 1 - conv.padding)
    inside, outside = spec.input_shapes(node)[0][1:], spec.shapes[node.name][1:]
    beyond = (
        -(-(side + 2 * conv.padding) // conv.stride) - out
        for side, out in zip(inside, outside, strict=True)
    )
    return max((conv.kernel_size - 1) // conv.stride, *beyond)
