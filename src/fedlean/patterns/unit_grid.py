"""A weight as a grid of units: which coordinates join which output to which input unit.

A unit is a feature of a Linear or a channel of a Conv2d.  Where a Linear reads a flattened image,
its input units are the image's channels, not the pixels.
"""

from __future__ import annotations

from typing import NamedTuple

from fedlean.layers import Conv2d, Flatten, Shape
from fedlean.spec import INPUT, ModelSpec, Node


class UnitGrid(NamedTuple):
    """`weight.reshape(shape)` is (groups, outputs, inputs, positions), all per group.

    positions: the coordinates that join two units (a kernel's, or the pixels of a channel)
    hidden: whether the inputs are units of the model; pixels of its input need no path
    """

    shape: Shape
    hidden: bool


def unit_grid(spec: ModelSpec, name: str) -> UnitGrid:
    """The grid of one prunable weight.  Raises ValueError for another name.

    >>> from fedlean.models.lenet300 import lenet300
    >>> unit_grid(lenet300((1, 8, 8), 10), "fc3.weight")
    UnitGrid(shape=(1, 10, 100, 1), hidden=True)
    """
    if name not in spec.prunable:
        raise ValueError(f"{name!r} is no prunable weight, expected one of {list(spec.prunable)}")
    node = spec.by_name[name.removesuffix(".weight")]
    weight = spec.param_shapes[name]
    hidden = not spec.reads_input(node)
    if isinstance(node.layer, Conv2d):
        groups, taps = node.layer.groups, node.layer.window.area
        return UnitGrid((groups, weight[0] // groups, weight[1], taps), hidden)
    channels = _channels(spec, node)
    return UnitGrid((1, weight[0], channels, weight[1] // channels), hidden)


def _channels(spec: ModelSpec, node: Node) -> int:
    """Units that a Linear reads: behind a Flatten, the channels of what was flattened."""
    source, features = node.inputs[0], spec.shapes[node.inputs[0]]
    while source != INPUT and spec.shapes[source] == features:
        before = spec.by_name[source]
        if isinstance(before.layer, Flatten):
            return spec.shapes[before.inputs[0]][0]
        if len(before.inputs) != 1 or before in spec.weighted:
            break
        source = before.inputs[0]  # elementwise layers and norms keep the order
    return features[0]
