"""A model as a supernet: all of its sub-networks by depth and width of its stages.

Dynamic model selection (Yao, arXiv 2409.08858): a sub-network is a prefix of the units of each
stage and a prefix of the channels of each layer, at a rate for each stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from math import lcm, prod
from typing import NamedTuple

import numpy as np

from fedlean.channels import channels
from fedlean.core import Scalar
from fedlean.layers import GroupNorm
from fedlean.spec import ModelSpec
from fedlean.submodels.cut import Cut, whole
from fedlean.submodels.depth import depth, stages
from fedlean.submodels.width import width


class SubNet(NamedTuple):
    """One of a supernet's: units kept of each stage that can be shorter, the rate of each group."""

    depths: tuple[int, ...]
    widths: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Supernet:
    """`depths` are the units that each stage may keep, fewest first; `rates` the widths that each
    group of blocks may have, from the largest to the smallest."""

    spec: ModelSpec
    rates: tuple[float, ...]
    scaler: bool
    depths: dict[str, tuple[int, ...]]  # by stage
    groups: tuple[tuple[str, ...], ...]  # blocks, or layers, whose channels have one rate
    _cuts: dict[SubNet, Cut] = field(default_factory=dict, repr=False)

    @property
    def largest(self) -> SubNet:
        most = tuple(counts[-1] for counts in self.depths.values())
        return SubNet(most, (self.rates[0],) * len(self.groups))

    @property
    def smallest(self) -> SubNet:
        least = tuple(counts[0] for counts in self.depths.values())
        return SubNet(least, (self.rates[-1],) * len(self.groups))

    @property
    def count(self) -> int:
        """How many sub-networks there are."""
        return prod(map(len, self.depths.values())) * len(self.rates) ** len(self.groups)

    def draw(self, random: np.random.Generator) -> SubNet:
        """Each depth and each rate uniform, apart from the others."""
        return SubNet(
            tuple(int(random.choice(counts)) for counts in self.depths.values()),
            tuple(float(random.choice(self.rates)) for _ in self.groups),
        )

    def cut(self, net: SubNet) -> Cut:
        """The same object for the same sub-network."""
        if net not in self._cuts:
            self._cuts[net] = self._made(net)
        return self._cuts[net]

    def said(self, net: SubNet) -> dict[str, Scalar]:
        """What a task says of its sub-network, from which `heard` has it again.

        >>> from fedlean.models.lenet300 import lenet300
        >>> net = supernet(lenet300((1, 8, 8), 10), (1.0, 0.5))
        >>> net.said(net.smallest), net.heard(net.said(net.smallest)) == net.smallest
        ({'width': '0.5/0.5'}, True)
        """
        said: dict[str, Scalar] = {"width": "/".join(f"{rate:g}" for rate in net.widths)}
        return {"depth": "/".join(map(str, net.depths)), **said} if net.depths else said

    def heard(self, said: Mapping[str, Scalar]) -> SubNet:
        depths = str(said.get("depth", ""))
        return SubNet(
            tuple(map(int, depths.split("/"))) if depths else (),
            tuple(map(float, str(said["width"]).split("/"))),
        )

    def name(self, net: SubNet) -> str:
        """A word or two, which sort as any text does and from which `named` has it again."""
        return " ".join(map(str, self.said(net).values()))

    def named(self, name: str) -> SubNet:
        return self.heard(dict(zip(("width", "depth"), reversed(name.split()), strict=False)))

    def _made(self, net: SubNet) -> Cut:
        short = whole(self.spec)
        if net.depths != self.largest.depths:
            short = depth(self.spec, dict(zip(self.depths, net.depths, strict=True)))
        rates = {
            block: rate
            for blocks, rate in zip(self.groups, net.widths, strict=True)
            for block in blocks
            if block in short.spec.blocks or block in short.spec.by_name
        }
        if set(rates.values()) <= {1.0}:
            return short
        multiple = lcm(*_groups_of_norms(self.spec))
        thin = width(short.spec, rates, multiple=multiple, scaler=self.scaler)
        return short.compose(thin)


def supernet(spec: ModelSpec, rates: Sequence[float], *, scaler: bool = False) -> Supernet:
    """`spec` with depths where its blocks are units (`submodels.depth.stages`), widths everywhere.

    A stage keeps its first units: 1 or more of them, as far as those left out keep the shape of
    what they read.  Blocks that add into one sum, and those of one stage, have one rate; in a model
    of a single block each layer has its own.  Counts of channels are rounded up to what the groups
    of the model's GroupNorms divide.  `scaler`: as of `submodels.width.width`.

    Raises ValueError where there is one sub-network only, and naming the layer that no rate can
    slice.

    >>> from fedlean.models.resnet import resnet18
    >>> net = supernet(resnet18((3, 32, 32), 10, blocks="unit"), (1.0, 0.5))
    >>> net.largest, net.count
    (SubNet(depths=(2, 2, 2, 2), widths=(1.0, 1.0, 1.0, 1.0)), 256)
    """
    depths = {stage: _depths(spec, stage, len(units)) for stage, units in stages(spec).items()}
    depths = {stage: counts for stage, counts in depths.items() if len(counts) > 1}
    found = Supernet(spec, tuple(rates), scaler, depths, tuple(_groups(spec)))
    if found.count == 1:
        raise ValueError(
            f"the model has one sub-network only with the widths {', '.join(map(str, rates))}: "
            "give widths several rates, or take a model whose blocks are units (blocks=unit)"
        )
    found.cut(found.smallest)  # whose layers would refuse the rate
    return found


@lru_cache(maxsize=256)
def _depths(spec: ModelSpec, stage: str, units: int) -> tuple[int, ...]:
    """How many units the stage may keep."""
    kept = []
    for count in range(1, units):
        with suppress(ValueError):  # one that is left out changes the shape
            depth(spec, {stage: count})
            kept.append(count)
    return (*kept, units)


def _groups(spec: ModelSpec) -> list[tuple[str, ...]]:
    """Blocks that have channels of their own to slice, those of one rate together."""
    found = channels(spec)
    stage_of = {unit: stage for stage, units in stages(spec).items() for unit in units}
    own = {each.space.block for each in found.values() if not each.space.fixed}
    groups: list[list[str]] = []
    for block, nodes in spec.blocks.items():
        space = found[nodes[-1].name].space
        before = groups[-1][-1] if groups else None
        together = before is not None and (
            found[spec.blocks[before][-1].name].space == space
            or (block in stage_of and stage_of.get(before) == stage_of[block])
        )
        if together:
            groups[-1].append(block)
        elif block in own:
            groups.append([block])
    if len(spec.blocks) == 1:
        names = dict.fromkeys(each.space.name for each in found.values() if not each.space.fixed)
        return [(name,) for name in names]
    return [tuple(group) for group in groups]


def _groups_of_norms(spec: ModelSpec) -> list[int]:
    return [node.layer.groups for node in spec.nodes if isinstance(node.layer, GroupNorm)]
