"""HeteroFL: each device trains the slice by width that it can hold, cut from one shared model.

Diao, Ding and Tarokh, "HeteroFL: Computation and Communication Efficient Federated Learning for
Heterogeneous Clients", ICLR 2021, arXiv 2010.01264, Section 3.  A device of level p holds the first
r^(p-1)·C of each layer's C channels; the server averages each element over the devices that hold
it.

**Deviations.**  Means are weighted by examples; the paper counts devices.  An element that nobody
held keeps its value.  Channels are rounded up.  The paper gives out levels by hand: here the memory
of the device decides, `assign` gives the paper's two ways.  Our models have GroupNorm unless told
otherwise.  The paper's BatchNorm has no running statistics while it trains, and the clients find
them once in the end; with `static_norm` the server finds them after each round, on inputs of its
own.  The masked cross-entropy for clients that lack classes is not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlean.algorithm import FederatedAlgorithm, Server
from fedlean.core import Batches, ClientState, ClientTask, ClientUpdate
from fedlean.engine.protocol import Engine
from fedlean.submodels.cut import Cut
from fedlean.submodels.levels import rates_from
from fedlean.submodels.sliced import Slices, sliced, train_slice, without_effect
from fedlean.submodels.width import width
from fedlean.train.local_sgd import LocalSGD, with_settings


@with_settings(LocalSGD, Slices)
def heterofl(
    server: Server, sgd: LocalSGD, slices: Slices, *, scaler: bool = True
) -> FederatedAlgorithm:
    """Federated averaging of slices of one model.

    Args:
      sgd: local SGD, whose settings are this method's as well.
      slices: the same; `widths` are r^(p-1) (paper: 1, 1/2, 1/4, 1/8 and 1/16), `assign` "fixed" or
        "drawn" its fixed and dynamic assignment.
      scaler: a slice multiplies what its layers give by 1/width in training.

    Raises ValueError naming the hyper-parameter that is out of range, the layer that cannot be
    sliced, or what `static_norm` lacks.
    """
    rates = rates_from(slices.widths)
    # one object for all rounds and clients, so that a width is cut once for all who have it
    cuts = {rate: width(server.spec, rate, scaler=scaler) for rate in rates}

    def cut_of(rate: float, round: int, client: int) -> Cut:
        return cuts[rate]

    return sliced(server, sgd, slices, cut_of, client_update)


def unused(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings without effect beside the others, and why."""
    return without_effect(settings, "scaler")


def client_update(
    task: ClientTask, batches: Batches, engine: Engine, client_state: ClientState
) -> tuple[ClientUpdate, ClientState]:
    """w_n <- w - η·g for `local_steps` steps on the slice."""
    return train_slice(task, batches, engine), client_state
