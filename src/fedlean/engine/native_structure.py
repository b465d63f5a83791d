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
from fedlean.engine.native_storage import NO_HALO, Geometry, is_split
from fedlean.layers import Pair, Window, as_image
from fedlean.spec import INPUT, ModelSpec, Node


@dataclass(frozen=True)
class Structure:
    """Per activation, by the node that makes it (or the input)."""

    value_halo: dict[str, Pair]  # zeros around the image: above and below, left and right
    grad_halo: dict[str, Pair]  # and around its gradient
    needs_grad: Mapping[str, bool]
    readers: Counter[str]


def structure(spec: ModelSpec, frozen: frozenset[str]) -> Structure:
    """`frozen` names tensors that are not trained."""
    names = (INPUT, *spec.by_name)
    s = Structure(
        dict.fromkeys(names, NO_HALO),
        dict.fromkeys(names, NO_HALO),
        needs_gradient(spec, frozen),
        Counter(source for node in spec.nodes for source in node.inputs),
    )
    for node in spec.nodes:
        if isinstance(node.layer, L.Conv2d):
            window = node.layer.window
            halo = NO_HALO if is_split(window) else window.padding
            s.value_halo[node.inputs[0]] = _larger(s.value_halo[node.inputs[0]], halo)
            if s.needs_grad[node.inputs[0]]:
                s.grad_halo[node.name] = _gradient_halo(spec, node, window)
    alike = [n for n in spec.nodes if isinstance(n.layer, L.ReLU | L.Add | L.Scaler | L.Dropout)]
    alike = [node for node in alike if s.readers[node.inputs[0]] == 1]  # they may share memory
    for node in reversed(alike):
        source = node.inputs[0]
        s.value_halo[source] = _larger(s.value_halo[source], s.value_halo[node.name])
    for node in alike:
        s.grad_halo[node.name] = _larger(s.grad_halo[node.name], s.grad_halo[node.inputs[0]])
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


def _larger(one: Pair, other: Pair) -> Pair:
    return max(one[0], other[0]), max(one[1], other[1])


def _gradient_halo(spec: ModelSpec, node: Node, window: Window) -> Pair:
    inside = as_image(spec.input_shapes(node)[0])[1:]
    outside = as_image(spec.shapes[node.name])[1:]
    rows, columns = (
        _gradient_side(window, i, inside[i], outside[i], split=is_split(window)) for i in (0, 1)
    )
    return rows, columns


def _gradient_side(window: Window, i: int, size: int, out: int, *, split: bool) -> int:
    padding, stride = window.padding[i], window.stride[i]
    reach = window.reach[i] // stride
    if not split:
        return max(0, reach - padding)
    return max(reach, -(-(size + 2 * padding) // stride) - out)
