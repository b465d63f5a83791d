"""Trains the model that a run starts from under its masks: the lottery-ticket studies.

Frankle & Carbin, "The Lottery Ticket Hypothesis", ICLR 2019, arXiv 1803.03635: a sparse network
that is found by training learns as well as the dense one when it starts from its *original* initial
weights, and worse from new ones.  PruneFL (arXiv 1909.12326, Sec. VI-C) asks that of its final
mask.  Where the mask and the weights come from is a matter of the run (`runtime.start`); this is
FedAvg on the pruned model.

**Deviations.**  Going on from the final weights is ours.  New random weights are drawn from a seed
derived from the run's; PruneFL's code takes the next seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from fedlean.algorithm import Device, FederatedAlgorithm, Server
from fedlean.core import (
    Batches,
    ClientState,
    ClientTask,
    ClientUpdate,
    Masks,
    Model,
    Params,
)
from fedlean.engine.protocol import Engine
from fedlean.train.cohort import cohort_tasks
from fedlean.train.local_sgd import LocalSGD, train_kept_weights, with_local_sgd
from fedlean.train.work import only_sgd
from fedlean.tree import fold


@dataclass(frozen=True)
class State:
    """What survives a round."""

    round: int  # training rounds completed
    phase: str
    params: Params
    masks: Masks = field(default_factory=dict)  # never changes; empty: dense


@with_local_sgd
def fixed_mask(server: Server, sgd: LocalSGD) -> FederatedAlgorithm:
    """Federated averaging of the model that the run starts from, under its masks.

    Args:
      sgd: local SGD, whose settings are this method's as well.

    Raises ValueError naming the hyper-parameter that is out of range.
    """
    spec = server.spec

    def init(model: Model) -> State:
        return State(0, "train", model.params, model.masks)

    def configure(state: State, devices: Sequence[Device]) -> list[ClientTask]:
        round = state.round + 1
        return cohort_tasks(
            server,
            sgd.clients(server, devices, round),
            round=round,
            phase=state.phase,
            model=Model(spec, state.params, state.masks),
            hparams=sgd.hparams(state.round),
        )

    def server_update(state: State, updates: Iterable[ClientUpdate]) -> State:
        merged = fold(state.params, updates, variances=spec.variances)
        return replace(state, round=state.round + 1, params=merged.params())

    def done(state: State) -> bool:
        return state.round >= server.rounds

    return FederatedAlgorithm(init, configure, client_update, server_update, done, work=only_sgd)


def client_update(
    task: ClientTask, batches: Batches, engine: Engine, client_state: ClientState
) -> tuple[ClientUpdate, ClientState]:
    """w_n <- w - η·g ⊙ m for `local_steps` steps."""
    return train_kept_weights(task, batches, engine), client_state
