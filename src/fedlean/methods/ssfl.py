"""SSFL: one mask for all before training, by the summed saliency of one batch of every client.

Ohib, Thapaliya, Dziugaite, Liu, Calhoun and Plis, "SSFL: Discovering Sparse Unified Subnetworks at
Initialization for Efficient Federated Learning", TMLR 2026, arXiv 2405.09037, and the authors' code
(github.com/riohib/SSFL).  Every client sends the saliency |∂L/∂w ⊙ w| of one mini-batch at the
common initial weights, the server adds them up with p_n = n_n/Σn and keeps the largest of the whole
model; from then on all train the same sub-network by FedAvg and exchange kept values only.  Of the
paper no more was at hand than its abstract and what its authors say of it beside their code.

The server reads Σ n·saliency once and Σ n·w after that, each over one set of coordinates that all
clients share, and never one client's alone: sums are all that secure aggregation gives.

**Deviations.**
- The sum is weighted by examples, as in the paper; the authors' code takes the plain mean.
- The models have their BatchNorm, if any, in training mode for the saliency; the code has it in
  evaluation mode, with the statistics that a new model begins with.
- Of equal scores the first is kept; the code keeps all that equal the last.
- A device that cannot hold the whole model with its gradient takes no part in the scoring, but
  trains the sub-network if it can hold that.
- The new mask that the paper takes after a shift of the data is not there.
SNIP (`snip`) differs in the order: there clients send signed gradients, which cancel where clients
disagree, and |Σ p_n g_n ⊙ w| is the score.  Here the absolute value comes first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

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
    Statistic,
    StatisticForm,
    Work,
)
from fedlean.engine.pieces import Pieces, sweep, whole
from fedlean.engine.protocol import SGD, Engine
from fedlean.pruning.density import full_masks
from fedlean.pruning.global_top import count_at, keep_largest
from fedlean.train.cohort import cohort_tasks
from fedlean.train.hyperparameters import at_least, in_range
from fedlean.train.local_sgd import LocalSGD, loss_of, train_kept_weights, with_local_sgd
from fedlean.train.rehearsal import Rehearsal
from fedlean.train.start import dense_params
from fedlean.train.work import only_sgd
from fedlean.tree import apply_mask, fold

SALIENCY = "saliency"  # name of the statistic


@dataclass(frozen=True)
class State:
    """What survives a round."""

    round: int  # training rounds completed
    phase: str  # "score" until somebody has answered, then "train"
    params: Params
    masks: Masks = field(default_factory=dict)  # empty until the model is pruned


@with_local_sgd
def ssfl(
    server: Server,
    sgd: LocalSGD,
    *,
    density: float = 0.5,
    score_batches: int = 1,
    importance_budget_bytes: int = 0,
) -> FederatedAlgorithm:
    """Federated averaging of the sub-network that all clients' saliency finds before training.

    Args:
      sgd: local SGD, whose settings are this method's as well; the saliency is asked of all clients
        that are there, whatever the cohort.
      density: 1 - σ, kept share of all prunable weights together (paper: 0.5); 1: FedAvg.
      score_batches: mini-batches of `batch_size` over which a client takes the mean of |g ⊙ w|
        (paper: 1).
      importance_budget_bytes: memory of a client for the gradient of all weights, which is taken in
        pieces of that size, each with a pass of its own over the batch; 0: all at once.

    Raises ValueError naming the hyper-parameter that is out of range.
    """
    in_range("density", density, 0.0, 1.0, open_low=True)
    count = count_at(density, server.spec)
    at_least("score_batches", score_batches, 1)
    at_least("importance_budget_bytes", importance_budget_bytes, 0)
    if importance_budget_bytes:
        sweep(server.spec, importance_budget_bytes)  # refuses one that holds no row
    scoring: dict[str, Scalar] = {
        "batch_size": sgd.batch_size,
        "loss": sgd.loss,
        "score_batches": score_batches,
        "piece_bytes": importance_budget_bytes,
    }

    def init(model: Model) -> State:
        return State(0, "score" if density < 1 else "train", dense_params(model))

    def configure(state: State, devices: Sequence[Device]) -> list[ClientTask]:
        round, clients = state.round + 1, sgd.clients(server, devices, state.round + 1)
        hparams = sgd.hparams(state.round)
        if state.phase == "score":
            round, clients = 0, sorted(device.id for device in devices)
            hparams = scoring
        return cohort_tasks(
            server,
            clients,
            round=round,
            phase=state.phase,
            model=Model(server.spec, state.params, state.masks),
            hparams=hparams,
        )

    def server_update(state: State, updates: Iterable[ClientUpdate]) -> State:
        merged = fold(state.params, updates, variances=server.spec.variances)
        if state.phase == "train":
            return replace(state, round=state.round + 1, params=merged.params())
        saliency = merged.statistic(SALIENCY)  # s = Σ p_n s_n
        if not saliency:  # without an answer it is asked again
            return state
        masks = keep_largest(saliency, count, full_masks(server.spec))
        return replace(state, phase="train", params=apply_mask(state.params, masks), masks=masks)

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
    if settings["density"] < 1:
        return {}
    return dict.fromkeys(
        ("score_batches", "importance_budget_bytes"), "density is 1: nothing is pruned"
    )


def rehearsals(settings: Mapping[str, Any]) -> Sequence[Rehearsal]:
    """The shortest run in which clients do all that they do in a long one."""
    return [Rehearsal(rounds=1, until=1, one_batch=True)]


def statistics(task: ClientTask) -> dict[str, StatisticForm]:
    """The saliency of every prunable weight, while scores are taken."""
    if task.phase != "score":
        return {}
    shapes = {name: task.spec.param_shapes[name] for name in task.spec.prunable}
    return {SALIENCY: StatisticForm(shapes, non_negative=True)}


def work(task: ClientTask) -> tuple[Work, ...]:
    """Of a round, or as many steps with the gradient of all weights as there are pieces."""
    if task.phase != "score":
        return only_sgd(task)
    h = task.hparams
    steps = int(h["score_batches"]) * len(_parts(task))
    budget_bytes = int(h["piece_bytes"])
    return (Work(steps, int(h["batch_size"]), importance_steps=steps, piece_bytes=budget_bytes),)


def client_update(
    task: ClientTask, batches: Batches, engine: Engine, client_state: ClientState
) -> tuple[ClientUpdate, ClientState]:
    """The saliency at the model of the task, or w_n <- w - η·g ⊙ m for `local_steps` steps."""
    half = _saliency if task.phase == "score" else train_kept_weights
    return half(task, batches, engine), client_state


def _saliency(task: ClientTask, batches: Batches, engine: Engine) -> ClientUpdate:
    """s_n = |∂L(w_0; B)/∂w ⊙ w|, the mean over `score_batches` batches B.

    The engine gives g² of one batch, in steps of rate 0.
    """
    h, spec = task.hparams, task.spec
    steps, batch_size = int(h["score_batches"]), int(h["batch_size"])
    total = {name: np.zeros(spec.param_shapes[name], np.float32) for name in spec.prunable}
    losses = []
    for x, y in batches.draw(steps=steps, batch_size=batch_size, seed=task.seed):
        session = engine.open(  # anew, so that its sums are of this batch
            spec,
            task.params,
            task.sub_model,
            batch_size=batch_size,
            optimizer=SGD(0.0),
            loss=loss_of(task),
        )
        for part in _parts(task):
            losses.append(session.step(x, y, importance=part))
            squares = session.importance()
            for name, row, rows in part:
                if name in total:
                    at = slice(row, row + rows)
                    saliency = np.sqrt(squares[name]) * np.abs(task.params[name][at])
                    total[name][at] += saliency / np.float32(steps)
    return ClientUpdate(
        client=task.client,
        num_examples=batches.num_examples,
        params={},
        sub_model=task.sub_model,
        statistics={SALIENCY: Statistic(total, "mean")},
        metrics={"train_loss": float(np.mean(losses))},
        work=work(task),
    )


def _parts(task: ClientTask) -> tuple[Pieces, ...]:
    """Of all weights, those whose gradients a step takes."""
    budget_bytes = int(task.hparams["piece_bytes"])
    return sweep(task.spec, budget_bytes) if budget_bytes else (whole(task.spec),)
