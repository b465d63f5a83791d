"""SynFlow: pruning before training and without data, then FedAvg on what is left.

Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic flow",
NeurIPS 2020, arXiv 2006.05467, Algorithm 1, as a baseline of PruneFL (Jiang et al., TNNLS 2022,
arXiv 1909.12326): the server prunes the initial model once, in 100 steps, before the first round;
then all train the pruned model and exchange the values of kept weights only.

**Deviations**:
- Biases are left out of the score, as in the paper's formula; the authors' code adds their absolute
  values to the flow.  Layers that the paper's networks lack (GroupNorm, Hardswish, gates) are
  treated as `fedlean.pruning.linearised` says.
- The score is computed in float64, the authors' in float32; between equal scores the first weight
  is kept, where the authors' threshold drops all of them.
- The score is of the whole model on the server, which costs no device anything; the pattern travels
  with the first round, and is charged.
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
)
from fedlean.engine.protocol import Engine
from fedlean.pruning.global_top import count_at
from fedlean.pruning.synaptic_flow import prune_by_flow
from fedlean.train.cohort import cohort_tasks
from fedlean.train.hyperparameters import at_least, in_range
from fedlean.train.local_sgd import LocalSGD, train_kept_weights, with_local_sgd
from fedlean.train.rehearsal import Rehearsal
from fedlean.train.start import dense_params
from fedlean.train.work import only_sgd
from fedlean.tree import apply_mask, fold


@dataclass(frozen=True)
class State:
    """What survives a round."""

    round: int  # training rounds completed
    phase: str  # "prune", a step of the server alone, then "train"
    params: Params
    masks: Masks = field(default_factory=dict)  # empty until the model is pruned


@with_local_sgd
def synflow(
    server: Server,
    sgd: LocalSGD,
    *,
    density: float = 0.2,
    synflow_steps: int = 100,
) -> FederatedAlgorithm:
    """Iterative synaptic flow pruning before the first round.

    Args:
      sgd: local SGD, whose settings are this method's as well.
      density: kept share of all prunable weights together; PruneFL's final one in comparisons.
      synflow_steps: n of Algorithm 1 (100).

    Raises ValueError naming the hyper-parameter that is out of range.
    """
    in_range("density", density, 0.0, 1.0, open_low=True)
    count_at(density, server.spec)
    at_least("synflow_steps", synflow_steps, 1)

    def init(model: Model) -> State:
        return State(round=0, phase="prune", params=dense_params(model))

    def configure(state: State, devices: Sequence[Device]) -> list[ClientTask]:
        if state.phase == "prune":
            return []
        round = state.round + 1
        return cohort_tasks(
            server,
            sgd.clients(server, devices, round),
            round=round,
            phase="train",
            model=Model(server.spec, state.params, state.masks),
            hparams=sgd.hparams(state.round),
        )

    def server_update(state: State, updates: Iterable[ClientUpdate]) -> State:
        if state.phase == "prune":
            masks = prune_by_flow(server.spec, state.params, density, synflow_steps)
            params = apply_mask(state.params, masks)
            return replace(state, phase="train", params=params, masks=masks)
        merged = fold(state.params, updates, variances=server.spec.variances)
        return replace(state, round=state.round + 1, params=merged.params())

    def done(state: State) -> bool:
        return state.round >= server.rounds

    return FederatedAlgorithm(init, configure, client_update, server_update, done, work=only_sgd)


def unused(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings without effect beside the others, and why."""
    return {} if settings["density"] < 1 else {"synflow_steps": "density is 1: nothing is pruned"}


def rehearsals(settings: Mapping[str, Any]) -> Sequence[Rehearsal]:
    """The shortest run in which clients do all that they do in a long one."""
    return [Rehearsal({"synflow_steps": 1}, rounds=1, until=1)]


def client_update(
    task: ClientTask, batches: Batches, engine: Engine, client_state: ClientState
) -> tuple[ClientUpdate, ClientState]:
    """w_n <- w - η·g ⊙ m for `local_steps` steps."""
    return train_kept_weights(task, batches, engine), client_state
