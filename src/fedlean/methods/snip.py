"""SNIP: pruned once, after the first round, by connection sensitivity; then FedAvg on what is left.

Lee, Ajanthan and Torr, "SNIP: single-shot network pruning based on connection sensitivity", ICLR
2019, arXiv 1810.02340, eq. (4)-(6), as a baseline of PruneFL (Jiang et al., TNNLS 2022, arXiv
1909.12326).  The first round trains the whole model (phase "dense"); its clients then score the
merged model w (phase "score"), and all train what is left of it, exchanging the values of kept
weights only (phase "train").  ∂L/∂c_j at c = 1 is g_j·w_j, so a client sends g, taken at the same w
as all others, and Σ p_n g_n is the gradient of the pooled data: the score is SNIP's on that data.

**Deviations**:
- How the score is made among clients is OURS; PruneFL's paper does not say.  Its authors' code
  makes it from what the first round sends anyway, |(w_0 - w_1) ⊙ w_0| with w_0 the initial model
  and w_1 the merged one: `score="update"`, which costs nothing and is SNIP's score if there is one
  local step, without momentum and decay.  The mask is applied to w_1 in both.
- SNIP scores the initial weights on one mini-batch; "gradient" scores the weights after the first
  round (PruneFL's moment) on `snip_batches` mini-batches of each client.
- The number of kept weights, κ, is rounded down; the authors of PruneFL keep one weight more.
- As published, nothing protects a unit, or a layer, from losing every weight; the run's summary
  counts `dead_units`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

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
    StatisticForm,
    Work,
)
from fedlean.engine.protocol import Engine
from fedlean.pruning import connection_sensitivity
from fedlean.pruning.connection_sensitivity import GRADIENT, sensitive
from fedlean.pruning.global_top import count_at
from fedlean.train.cohort import cohort_tasks
from fedlean.train.hyperparameters import at_least, in_range
from fedlean.train.local_sgd import LocalSGD, train_kept_weights, with_local_sgd
from fedlean.train.rehearsal import Rehearsal
from fedlean.train.start import dense_params
from fedlean.train.work import only_sgd
from fedlean.tree import apply_mask, fold

Score = Literal["gradient", "update"]


@dataclass(frozen=True)
class State:
    """What survives a round."""

    round: int  # training rounds completed
    phase: str  # "dense" until a round was answered, "score", then "train"
    params: Params
    masks: Masks = field(default_factory=dict)  # empty until the model is pruned


@with_local_sgd
def snip(
    server: Server,
    sgd: LocalSGD,
    *,
    density: float = 0.2,
    score: Score = "gradient",
    snip_batches: int = 5,
) -> FederatedAlgorithm:
    """Single-shot pruning after the first round.

    Args:
      sgd: local SGD, whose settings are this method's as well.
      density: κ as a share of all prunable weights together; PruneFL's final one in comparisons.
      score: "gradient", by a step in which the clients of the first round send the gradient at the
        merged model; "update", by the change of the model in the first round (PruneFL's code).
      snip_batches: batches of `batch_size` over which a client takes that gradient.

    Raises ValueError naming the hyper-parameter that is out of range.
    """
    in_range("density", density, 0.0, 1.0, open_low=True)
    count = count_at(density, server.spec)
    at_least("snip_batches", snip_batches, 1)
    if score not in get_args(Score):
        raise ValueError(f"score must be 'gradient' or 'update', got {score!r}")

    def init(model: Model) -> State:
        return State(round=0, phase="dense", params=dense_params(model))

    def tasks(
        state: State, devices: Sequence[Device], phase: str, round: int, hparams: dict[str, Scalar]
    ) -> list[ClientTask]:
        return cohort_tasks(
            server,
            sgd.clients(server, devices, round),
            round=round,
            phase=phase,
            model=Model(server.spec, state.params, state.masks),
            hparams=hparams,
        )

    def configure(state: State, devices: Sequence[Device]) -> list[ClientTask]:
        if state.phase == "score":  # the cohort of the round that was answered
            hparams = connection_sensitivity.orders(sgd, snip_batches)
            return tasks(state, devices, "score", state.round, hparams)
        return tasks(state, devices, "train", state.round + 1, sgd.hparams(state.round))

    def prune(state: State, gradient: Params, weights: Params) -> State:
        masks = sensitive(server.spec, gradient, weights, count)
        return replace(state, phase="train", params=apply_mask(state.params, masks), masks=masks)

    def server_update(state: State, updates: Iterable[ClientUpdate]) -> State:
        merged = fold(state.params, updates, variances=server.spec.variances)
        if state.phase == "score":
            gradient = merged.statistic(GRADIENT)  # Σ p_n g_n
            return prune(state, gradient, state.params) if gradient else state
        after = replace(state, round=state.round + 1, params=merged.params())
        if state.phase == "train" or not merged.count:
            return after
        if score == "gradient":
            return replace(after, phase="score")
        moved = {name: state.params[name] - after.params[name] for name in server.spec.prunable}
        return prune(after, moved, state.params)

    def done(state: State) -> bool:
        return state.phase != "score" and state.round >= server.rounds

    return FederatedAlgorithm(
        init,
        configure,
        client_update,
        server_update,
        done,
        statistics,
        work,
        sends_params=lambda task: task.phase != "score",
    )


def unused(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings without effect beside the others, and why."""
    return {"snip_batches": "score is 'update'"} if settings["score"] == "update" else {}


def rehearsals(settings: Mapping[str, Any]) -> Sequence[Rehearsal]:
    """The shortest run in which clients do all that they do in a long one."""
    return [Rehearsal(rounds=2, until=2, one_batch=True)]


def statistics(task: ClientTask) -> dict[str, StatisticForm]:
    """The gradient of every prunable weight, while scores are taken."""
    return connection_sensitivity.forms(task) if task.phase == "score" else {}


def work(task: ClientTask) -> tuple[Work, ...]:
    """Of a round, or of the gradient."""
    return connection_sensitivity.work(task) if task.phase == "score" else only_sgd(task)


def client_update(
    task: ClientTask, batches: Batches, engine: Engine, client_state: ClientState
) -> tuple[ClientUpdate, ClientState]:
    """A round of local SGD, or the gradient of the loss at the model of the task."""
    half = connection_sensitivity.answer if task.phase == "score" else train_kept_weights
    return half(task, batches, engine), client_state
