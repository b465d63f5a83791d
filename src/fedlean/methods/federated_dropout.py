"""Federated Dropout: each device trains a slice of random channels, drawn anew each round.

Caldas, Konečný, McMahan and Talwalkar, "Expanding the Reach of Federated Learning by Reducing
Client Resource Requirements", 2018, arXiv 1812.07210, Section 3.  The server drops a fixed share of
the units of each dense layer and of the filters of each convolution, and sends what is left, which
is a smaller dense model; the answers are mapped back and averaged.  Here each client of a round has
channels of its own.

**Deviations.**  Means are weighted by examples and go over the clients that have an element; one
that no client has keeps its value.  The paper drops the same share at all devices: here it follows
from what the device has (`assign`), and one name in `widths` gives the paper's.  The scaler, which
is dropout's 1/share, is HeteroFL's.  The paper's lossy compression of what travels is not there.
Norms as in `heterofl`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlean.algorithm import FederatedAlgorithm, Server
from fedlean.core import Batches, ClientState, ClientTask, ClientUpdate, derive_seed
from fedlean.engine.protocol import Engine
from fedlean.submodels.choose import random
from fedlean.submodels.cut import Cut
from fedlean.submodels.sliced import Slices, sliced, train_slice, without_effect
from fedlean.submodels.width import width
from fedlean.train.local_sgd import LocalSGD, with_settings


@with_settings(LocalSGD, Slices)
def federated_dropout(
    server: Server, sgd: LocalSGD, slices: Slices, *, scaler: bool = True
) -> FederatedAlgorithm:
    """Federated averaging of slices of random channels.

    Args:
      sgd: local SGD, whose settings are this method's as well.
      slices: the same; `widths` are the shares of channels that are not dropped.
      scaler: a slice multiplies what its layers give by 1/width in training.

    Raises ValueError naming the hyper-parameter that is out of range, the layer that cannot be
    sliced, or what `static_norm` lacks.
    """

    def cut_of(rate: float, round: int, client: int) -> Cut:
        choose = random(derive_seed(server.seed, round, client, "channels"))
        return width(server.spec, rate, choose, scaler=scaler)

    return sliced(server, sgd, slices, cut_of, client_update)


def unused(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings without effect beside the others, and why."""
    return without_effect(settings, "scaler")


def client_update(
    task: ClientTask, batches: Batches, engine: Engine, client_state: ClientState
) -> tuple[ClientUpdate, ClientState]:
    """w_n <- w - η·g for `local_steps` steps on the slice."""
    return train_slice(task, batches, engine), client_state
