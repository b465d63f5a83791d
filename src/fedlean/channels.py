"""Which activations of a model must keep the same channels.

A channel is an entry of an activation's first axis.  A Linear or Conv2d layer makes a new space of
channels.  Norms, activations, pooling and depthwise convolutions hand a space on, Add and Scale
(squeeze-and-excite) join those of their inputs, and Flatten spreads each channel over its pixels.
Concat makes one space of several, in which all channels stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import lcm, prod
from typing import NamedTuple

from fedlean.layers import Add, Concat, Conv2d, Flatten, Linear, Scale
from fedlean.spec import INPUT, ModelSpec, Node


@dataclass(frozen=True)
class Space:
    """Channels that stay or go together, wherever they appear."""

    name: str  # of the first layer that has it, or "input"
    block: str  # of that layer; "" for the input
    count: int
    fixed: bool  # holds the model's input or output, or what Concat joins: these stay whole


class Channels(NamedTuple):
    """The first axis of an activation: `spread` consecutive entries for each of space.count."""

    space: Space
    spread: int


def channels(spec: ModelSpec) -> Mapping[str, Channels]:
    """The channels of the input and of every node, by activation.

    >>> from fedlean.models.conv2 import conv2
    >>> found = channels(conv2((1, 28, 28), 62))
    >>> found["flatten"]
    Channels(space=Space(name='conv2', block='conv2', count=64, fixed=False), spread=49)
    >>> found["fc2"].space.fixed
    True
    """
    joined = _Joined()
    raw = {INPUT: joined.fresh(0, spec.input_shape[0])}
    for position, node in enumerate(spec.nodes, start=1):
        raw[node.name] = _raw(spec, node, position, raw, joined)
    found = {name: joined.find(channel) for name, channel in raw.items()}
    whole = [INPUT, spec.nodes[-1].name]
    for node in spec.nodes:
        if isinstance(node.layer, Concat):
            whole += [node.name, *node.inputs]
    fixed = {found[name].space for name in whole}
    names = [(INPUT, ""), *((node.name, node.block) for node in spec.nodes)]
    spaces = {
        number: Space(*names[joined.makers[number]], joined.counts[number], number in fixed)
        for number in {channel.space for channel in found.values()}
    }
    return {name: Channels(spaces[number], spread) for name, (number, spread) in found.items()}


def is_depthwise(spec: ModelSpec, node: Node) -> bool:
    """Whether each output channel reads one input channel of several."""
    layer = node.layer
    return isinstance(layer, Conv2d) and 1 < layer.groups == spec.input_shapes(node)[0][0]


class _Raw(NamedTuple):
    space: int  # its number, before spaces are joined
    spread: int


def _raw(
    spec: ModelSpec, node: Node, position: int, raw: Mapping[str, _Raw], joined: _Joined
) -> _Raw:
    source = raw[node.inputs[0]]
    match node.layer:
        case Conv2d(groups=groups, out_channels=out) if is_depthwise(spec, node):
            return _Raw(source.space, source.spread * (out // groups))
        case Linear() | Conv2d() | Concat():
            return joined.fresh(position, spec.shapes[node.name][0])
        case Flatten():
            return _Raw(source.space, source.spread * prod(spec.input_shapes(node)[0][1:]))
        case Add() | Scale():
            for other in node.inputs[1:]:
                joined.join(source, raw[other])
    return source


class _Joined:
    """A union-find of spaces in which joining may also coarsen.

    16 units added to the flattened pixels of 4 channels are 4 channels of 4 entries each; where
    neither side divides the other, the least common multiple of their spreads stays together.
    """

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.makers: list[int] = []  # position of the first node that has it
        self._parents: list[_Raw | None] = []  # of what, and how many of it are one there

    def fresh(self, maker: int, count: int) -> _Raw:
        self.counts.append(count)
        self.makers.append(maker)
        self._parents.append(None)
        return _Raw(len(self.counts) - 1, 1)

    def find(self, channel: _Raw) -> _Raw:
        space, spread = channel
        while (parent := self._parents[space]) is not None:
            space, spread = parent.space, spread * parent.spread
        return _Raw(space, spread)

    def join(self, one: _Raw, other: _Raw) -> None:
        """Both have the same number of entries."""
        left, right = self.find(one), self.find(other)
        if left.space == right.space:
            return
        spread = lcm(left.spread, right.spread)
        maker = min(self.makers[left.space], self.makers[right.space])
        union = self.fresh(maker, self.counts[left.space] * left.spread // spread)
        for side in (left, right):
            self._parents[side.space] = _Raw(union.space, spread // side.spread)
