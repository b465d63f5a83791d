"""A narrower model that is trained for its own sake, and the weights that it begins with."""

from __future__ import annotations

from collections.abc import Iterable
from math import lcm

from fedlean.algorithm import Server
from fedlean.channels import channels
from fedlean.core import Params
from fedlean.layers import GroupNorm
from fedlean.models.initialise import init_params
from fedlean.spec import ModelSpec
from fedlean.submodels.cut import Cut, whole
from fedlean.submodels.width import width


def narrow(spec: ModelSpec, rate: float) -> Cut:
    """The first ceil(rate · C) of each layer's C channels; the model itself at rate 1.

    Raises ValueError as `submodels.width.width`.
    """
    return whole(spec) if rate == 1 else width(spec, rate)


def narrow_after(spec: ModelSpec, full: Iterable[str], rate: float) -> Cut:
    """The layers `full` with all of their channels, of the others the first ceil(rate · C).

    Channels that the two share, as a residual sum that goes on after `full`, stay whole.  Counts
    are rounded up to what the groups of the model's GroupNorms divide.

    Raises ValueError as `submodels.width.width`.

    >>> from fedlean.models.lenet300 import lenet300
    >>> cut = narrow_after(lenet300((1, 8, 8), 10), ["fc1"], 0.25)
    >>> [cut.spec.param_shapes[f"fc{n}.weight"] for n in (1, 2, 3)]
    [(300, 64), (25, 300), (10, 25)]
    """
    found = channels(spec)
    kept = {found[name].space for name in full}
    spaces = {each.space for each in found.values() if not each.space.fixed} - kept
    rates = {space.name: rate for space in spaces}
    multiple = lcm(*(n.layer.groups for n in spec.nodes if isinstance(n.layer, GroupNorm)))
    return width(spec, rates, multiple=multiple)


def first_params(cut: Cut, params: Params, server: Server) -> Params:
    """What a run of the cut alone begins with.

    Its own draw by the run's seed, since the scale of first weights follows from the number of
    inputs, of which a slice has fewer; of a given model, its slice.
    """
    if cut.spec.hash == cut.full.hash:
        return params
    if server.given:
        return cut.take(params)
    return init_params(cut.spec, server.seed, server.init)
