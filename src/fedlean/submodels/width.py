"""Slicing a model by width: every layer keeps some of its channels, the same wherever they appear.

HeteroFL, FjORD, FedRolex and Federated Dropout differ in which channels stay (`submodels.choose`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedlean.channels import Channels, Space, channels, is_depthwise
from fedlean.narrowed import is_dense, kept_channels, with_channels
from fedlean.spec import ModelSpec
from fedlean.submodels.choose import Choose, prefix
from fedlean.submodels.cut import Axis, Cut, axis_of, num_ids
from fedlean.submodels.scaler import with_scalers

# In (0, 1].  By block or by layer, which comes before its block: what is not named stays whole.
Rate = float | Mapping[str, float]


def width(
    spec: ModelSpec,
    rate: Rate,
    choose: Choose = prefix,
    *,
    multiple: int = 1,
    scaler: bool = False,
) -> Cut:
    """The model with ceil(rate · C) of each C channels; its inputs and outputs stay whole.

    A space of channels that several layers or blocks share, as the sum of a residual stage is, has
    the rate of the one in which it begins.  Squeeze-and-excite's hidden units are a space of their
    own.  With `multiple`, counts are rounded up to the next multiple of it.  With `scaler`,
    HeteroFL's scaler follows each layer whose outputs are sliced (`submodels.scaler`).

    A GroupNorm keeps its number of groups, as in HeteroFL's code: the kept channels, in ascending
    order, form them anew, so that a channel may be normalised with others than in the full model.

    Raises ValueError naming the layer when a GroupNorm's groups do not divide what is kept, or when
    a convolution in groups that is not depthwise would be sliced; and for a rate outside (0, 1], an
    unknown block, and a choice that is not `kept` ascending ids.

    >>> from fedlean.models.conv2 import conv2
    >>> cut = width(conv2((1, 28, 28), 62), 0.5)
    >>> cut.spec.param_shapes["fc1.weight"], cut.index["fc1.weight"]
    ((1024, 1568), (slice(0, 1024, None), slice(0, 1568, None)))
    """
    found = channels(spec)
    rates = _rates(spec, found, rate)
    kept = {
        space.name: _kept(space, rates[space.name], choose, multiple)
        for space in {channel.space for channel in found.values()}
    }
    slicing = _Slicing(spec, found, kept)
    index = {name: slicing.axes(name) for name in spec.tensor_shapes}
    sliced = with_channels(spec, found, {name: num_ids(axis) for name, axis in kept.items()})
    if scaler:
        sliced = with_scalers(sliced, slicing.factors(rates))
    return Cut(sliced, index, spec)


@dataclass(frozen=True)
class _Slicing:
    spec: ModelSpec
    found: Mapping[str, Channels]
    kept: Mapping[str, Axis]  # by space

    def axes(self, tensor: str) -> tuple[Axis, ...]:
        """Axis 0 is the layer's output, axis 1 of a dense weight its input; windows stay whole."""
        node = self.spec.by_name[tensor.rpartition(".")[0]]
        axes: list[Axis] = [slice(0, side) for side in self.spec.tensor_shapes[tensor]]
        axes[0] = self._axis(node.name)
        if len(axes) > 1 and is_dense(node):
            axes[1] = self._axis(node.inputs[0])
        return tuple(axes)

    def factors(self, rates: Mapping[str, float]) -> dict[str, float]:
        """1 / rate for each layer that makes channels of which not all stay."""
        return {
            node.name: 1 / rates[self.found[node.name].space.name]
            for node in self.spec.weighted
            if self._is_sliced(node.name) and not is_depthwise(self.spec, node)
        }

    def _is_sliced(self, activation: str) -> bool:
        space = self.found[activation].space
        return num_ids(self.kept[space.name]) < space.count

    def _axis(self, activation: str) -> Axis:
        """The kept entries of the activation's first axis."""
        channel = self.found[activation]
        kept, spread = self.kept[channel.space.name], channel.spread
        if isinstance(kept, slice):
            return slice(kept.start * spread, kept.stop * spread)
        return (kept[:, None] * spread + np.arange(spread)).ravel()


def _rates(spec: ModelSpec, found: Mapping[str, Channels], rate: Rate) -> dict[str, float]:
    """By space."""
    by_block = rate if isinstance(rate, Mapping) else dict.fromkeys(spec.blocks, rate)
    for block, value in by_block.items():
        if block not in spec.blocks and block not in spec.by_name:
            raise ValueError(
                f"no block or layer {block!r} to give a rate to; the blocks are "
                f"{', '.join(spec.blocks)}"
            )
        if isinstance(value, bool) or not 0 < value <= 1:
            raise ValueError(f"the rate of a width must be in (0, 1], got {value!r}")
    spaces = {channel.space for channel in found.values()}
    return {
        s.name: 1.0 if s.fixed else float(by_block.get(s.name, by_block.get(s.block, 1.0)))
        for s in spaces
    }


def _kept(space: Space, rate: float, choose: Choose, multiple: int) -> Axis:
    if multiple < 1:
        raise ValueError(f"multiple must be at least 1, got {multiple}")
    kept = min(space.count, -(-kept_channels(space.count, rate) // multiple) * multiple)
    if kept == space.count:
        return slice(0, kept)
    ids = np.asarray(choose(space.name, space.count, kept))
    inside = ids.shape == (kept,) and ids[0] >= 0 and ids[-1] < space.count
    if not inside or (np.diff(ids) <= 0).any():
        raise ValueError(
            f"choose must give {kept} ascending ids of the {space.count} channels of "
            f"{space.name!r}, got {ids!s:.80}"
        )
    return axis_of(ids)
