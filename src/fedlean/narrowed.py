"""A model with fewer channels in its layers, as a spec: which ones those are is no matter here.

`fedlean.submodels.width` says which, and where they lie in the full model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil

from fedlean.channels import Channels, channels, is_depthwise
from fedlean.layers import Conv2d, GroupNorm, Layer, Linear
from fedlean.spec import ModelSpec, Node


@lru_cache(maxsize=256)
def narrowed(spec: ModelSpec, rate: float) -> ModelSpec:
    """With ceil(rate · C) of each C channels; inputs and outputs stay whole.

    Raises ValueError as `with_channels`, and for a rate outside (0, 1].
    """
    if not 0 < rate <= 1:
        raise ValueError(f"the rate of a width must be in (0, 1], got {rate!r}")
    found = channels(spec)
    spaces = {channel.space for channel in found.values()}
    counts = {
        space.name: space.count if space.fixed else kept_channels(space.count, rate)
        for space in spaces
    }
    return with_channels(spec, found, counts)


def kept_channels(count: int, rate: float) -> int:
    """ceil(rate · count), without float's rounding: 0.07 · 100 is 7.

    >>> kept_channels(100, 0.07), kept_channels(5, 0.5)
    (7, 3)
    """
    return ceil(round(rate * count, 9))


def with_channels(
    spec: ModelSpec, found: Mapping[str, Channels], counts: Mapping[str, int]
) -> ModelSpec:
    """`spec` with so many channels in each space; found: `channels(spec)`.

    Raises ValueError naming the layer when a GroupNorm's groups do not divide what stays, or when a
    convolution in groups that is not depthwise would be sliced.
    """
    given = _Counted(spec, found, counts)
    nodes = tuple(replace(node, layer=given.layer(node)) for node in spec.nodes)
    return ModelSpec(spec.input_shape, nodes)


def is_dense(node: Node) -> bool:
    """Whether each output reads all input channels."""
    layer = node.layer
    return isinstance(layer, Linear) or (isinstance(layer, Conv2d) and layer.groups == 1)


@dataclass(frozen=True)
class _Counted:
    spec: ModelSpec
    found: Mapping[str, Channels]
    counts: Mapping[str, int]  # by space

    def layer(self, node: Node) -> Layer:
        """The layer for what is kept of its channels."""
        layer = node.layer
        if not self._is_sliced(node.name) and not any(map(self._is_sliced, node.inputs)):
            return layer
        out = self._count(node.name)
        match layer:
            case Linear():
                return replace(layer, out_features=out)
            case Conv2d() if is_depthwise(self.spec, node):
                return replace(layer, out_channels=out, groups=self._count(node.inputs[0]))
            case Conv2d():
                self._check_dense(node, layer)
                return replace(layer, out_channels=out)
            case GroupNorm(groups=groups) if out % groups:
                raise ValueError(
                    f"layer {node.name!r} (GroupNorm): its {groups} groups must divide the "
                    f"channels that stay, got {out} of {self.spec.shapes[node.name][0]}: take "
                    f"another rate, multiple={groups}, or a model with fewer groups or BatchNorm"
                )
        return layer

    def _check_dense(self, node: Node, layer: Conv2d) -> None:
        if is_dense(node):
            return
        (source,) = node.inputs
        counts = [f"{self._count(n)} of {self.spec.shapes[n][0]}" for n in (source, node.name)]
        blocks = {self.found[n].space.block for n in (source, node.name)} - {""}
        raise ValueError(
            f"layer {node.name!r} (Conv2d): with groups={layer.groups} it is neither dense nor "
            f"depthwise, so its channels must stay whole, got {counts[0]} in and {counts[1]} out: "
            f"give rates by block and leave out {', '.join(map(repr, sorted(blocks)))}, or build "
            "it with groups=1"
        )

    def _is_sliced(self, activation: str) -> bool:
        space = self.found[activation].space
        return self.counts[space.name] < space.count

    def _count(self, activation: str) -> int:
        channel = self.found[activation]
        return self.counts[channel.space.name] * channel.spread
