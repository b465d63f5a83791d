"""A narrower model that is trained for its own sake, and the weights that it begins with."""

from __future__ import annotations

from fedlean.algorithm import Server
from fedlean.core import Params
from fedlean.models.initialise import init_params
from fedlean.spec import ModelSpec
from fedlean.submodels.cut import Cut, whole
from fedlean.submodels.width import width


def narrow(spec: ModelSpec, rate: float) -> Cut:
    """The first ceil(rate · C) of each layer's C channels; the model itself at rate 1.

    Raises ValueError as `submodels.width.width`.
    """
    return whole(spec) if rate == 1 else width(spec, rate)


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
