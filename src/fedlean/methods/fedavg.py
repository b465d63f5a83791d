"""FedAvg: local SGD, then the example-weighted mean of the models.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
AISTATS 2017, arXiv 1602.05629, Algorithm 1, counted in local steps instead of epochs as PruneFL
(arXiv 1909.12326, Algorithm 1 without pruning) does.

**Deviations.**  `warmup_steps` lets one client train alone before the first round; it is a control
for methods that do so (PruneFL's initial pruning) and 0 by default.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedlean.algorithm import Device, FederatedAlgorithm, Server
from fedlean.core import (
    Batches,
    ClientState,
    ClientTask,
    ClientUpdate,
    Masks,
    Model,
    Params,
    Scalar,
)
from fedlean.engine.protocol import Engine
from fedlean.train.cohort import check_client, cohort_tasks
from fedlean.train.hyperparameters import at_least
from fedlean.train.local_sgd import LocalSGD, train_kept_weights, with_local_sgd
from fedlean.train.start import dense_params
from fedlean.train.work import only_sgd
from fedlean.tree import fold


@dataclass(frozen=True)
class State:
    """What survives a round."""

    round: int  # training rounds completed
    phase: str  # "warmup", then "train"
    params: Params
    masks: Masks = field(default_factory=dict)  # always empty: FedAvg is dense


@with_local_sgd
def fedavg(
    server: Server,
    sgd: LocalSGD,
    *,
    warmup_steps: int = 0,
    warmup_client: int = 0,
    warmup_examples: int = 200,
) -> FederatedAlgorithm:
    """Dense federated averaging.

    Args:
      sgd: local SGD, whose settings are this method's as well.
      warmup_steps: local steps of `warmup_client` before the first round.
      warmup_client: the client that takes them.
      warmup_examples: of its examples, that it takes them on; 0: all.

    Raises ValueError naming the hyper-parameter that is out of range.
    """
    check_client("warmup_client", warmup_client, server)
    at_least("warmup_steps", warmup_steps, 0)
    at_least("warmup_examples", warmup_examples, 0)

    def init(model: Model) -> State:
        return State(
            round=0, phase="warmup" if warmup_steps else "train", params=dense_params(model)
        )

    def configure(state: State, devices: Sequence[Device]) -> list[ClientTask]:
        round, clients = state.round + 1, sgd.clients(server, devices, state.round + 1)
        changed: dict[str, Scalar] = {"examples": 0}  # all
        if state.phase == "warmup":
            round, clients = 0, [warmup_client]
            changed = {"local_steps": warmup_steps, "examples": warmup_examples}
        return cohort_tasks(
            server,
            clients,
            round=round,
            phase=state.phase,
            model=Model(server.spec, state.params),
            hparams={**sgd.hparams(state.round), **changed},
        )

    def server_update(state: State, updates: Iterable[ClientUpdate]) -> State:
        merged = fold(state.params, updates, variances=server.spec.variances)
        if state.phase == "warmup":
            # without an answer it is asked again
            return replace(state, phase="train", params=merged.params()) if merged.count else state
        return replace(state, round=state.round + 1, params=merged.params())

    def done(state: State) -> bool:
        return state.round >= server.rounds

    return FederatedAlgorithm(init, configure, client_update, server_update, done, work=only_sgd)


def unused(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings without effect beside the others, and why."""
    if settings["warmup_steps"]:
        return {}
    return dict.fromkeys(("warmup_client", "warmup_examples"), "warmup_steps is 0")


def client_update(
    task: ClientTask, batches: Batches, engine: Engine, client_state: ClientState
) -> tuple[ClientUpdate, ClientState]:
    """w_n <- w - η·g for `local_steps` steps."""
    return train_kept_weights(task, batches, engine), client_state
