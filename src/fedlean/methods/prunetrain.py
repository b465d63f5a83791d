"""PruneTrain: group-lasso regularisation from the start, and channels that died are removed.

Lym, Choukse, Zangeneh, Wen, Sanghavi, Erez, "PruneTrain: Fast Neural Network Training by Dynamic
Sparse Model Reconfiguration", SC 2019, arXiv 1901.09290.  The loss gets λ·Σ_g ‖w_g‖ over the input
and output channels of every layer (`fedlean.pruning.group_lasso`), with one λ for the whole run,
set once such that the penalty is a given share of the first loss.  From time to time channels
whose weights, made and read, have all come near 0 are removed (`fedlean.pruning.channels`).

PruneFL (arXiv 1909.12326) compares with the *cost* of its training only; how it runs in a
federation is ours.

**Deviations.**
- The penalty acts through its proximal operator after each local step: groups become exactly 0
  where the gradient that the paper takes would step over it.  Above that it is the same step, with
  what momentum would make of it; rows come first, then columns, which overlap them.
- In the first round each client finds λ from its own first batch; the example-weighted mean of
  these is λ from then on.
- Weights that the spec never prunes have no penalty, though they can keep a channel alive.
- Removed channels are masked; the model keeps its shape, and sparse kernels save what is masked.
  A channel does not come back, unless weights that are never pruned grow again and revive it.
  Biases and norms of removed channels stay.
- Reconfigurations come every `reconfigure_every` rounds (authors' code: 5 epochs), none after the
  last.
- Nothing keeps a layer from losing its last channel, and the model from becoming constant: the
  ratio was too large.
- Shrinking is one pass over the weights per step, which is not charged; the authors do not time
  it either.
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
    Statistic,
    StatisticForm,
)
from fedlean.engine.protocol import SGD, Engine, Session
from fedlean.pruning.channels import channel_masks, channels, living
from fedlean.pruning.group_lasso import coefficient, group_axes, penalty, shrunk
from fedlean.train.cohort import cohort_tasks
from fedlean.train.hyperparameters import at_least, in_range
from fedlean.train.local_sgd import LocalSGD, with_local_sgd
from fedlean.train.rehearsal import Rehearsal
from fedlean.train.sgd import local_sgd
from fedlean.train.start import dense_params
from fedlean.train.work import only_sgd
from fedlean.tree import apply_mask, fold


@dataclass(frozen=True)
class State:
    """What survives a round."""

    round: int  # training rounds completed
    phase: str
    params: Params
    masks: Masks = field(default_factory=dict)  # empty until a channel is removed
    coefficient: float = 0.0  # λ; 0: not set yet


@with_local_sgd
def prunetrain(
    server: Server,
    sgd: LocalSGD,
    *,
    penalty_ratio: float = 0.2,
    threshold: float = 1e-4,
    reconfigure_every: int = 10,
) -> FederatedAlgorithm:
    """Federated averaging under a group lasso, on fewer and fewer channels.

    Args:
      sgd: local SGD, whose settings are this method's as well.
      penalty_ratio: share of the penalty in the first loss (penalty included), in [0, 0.99]
        (authors' code: 0.2); 0: FedAvg.  A group of norm n takes about n / (λ·lr) steps to die.
      threshold: a channel is removed when no weight that makes or reads it is larger (authors'
        code: 1e-4).
      reconfigure_every: rounds between removals, below the number of rounds.

    Raises ValueError naming the hyper-parameter that is out of range.
    """
    in_range("penalty_ratio", penalty_ratio, 0.0, 0.99)
    in_range("threshold", threshold, 0.0, 1e6)
    at_least("reconfigure_every", reconfigure_every, 1)
    if penalty_ratio and reconfigure_every >= server.rounds:
        raise ValueError(
            f"reconfigure_every must be below the number of rounds ({server.rounds}), got "
            f"{reconfigure_every}: nothing would be pruned (penalty_ratio=0 is FedAvg)"
        )

    spec = server.spec
    found = channels(spec)

    def init(model: Model) -> State:
        return State(round=0, phase="train", params=dense_params(model))

    def configure(state: State, devices: Sequence[Device]) -> list[ClientTask]:
        round = state.round + 1
        hparams = {
            **sgd.hparams(state.round),
            "penalty_ratio": penalty_ratio,
            "coefficient": state.coefficient,
        }
        return cohort_tasks(
            server,
            sgd.clients(server, devices, round),
            round=round,
            phase=state.phase,
            model=Model(spec, state.params, state.masks),
            hparams=hparams,
        )

    def server_update(state: State, updates: Iterable[ClientUpdate]) -> State:
        merged = fold(state.params, updates, variances=spec.variances)
        state = replace(state, round=state.round + 1, params=merged.params())
        first = merged.statistic("coefficient")
        if first and not state.coefficient:
            state = replace(state, coefficient=float(first["coefficient"][0]))
        due = state.round % reconfigure_every == 0 and state.round < server.rounds
        return _reconfigured(state) if due and penalty_ratio else state

    def _reconfigured(state: State) -> State:
        alive = living(found, state.params, threshold)
        masks = channel_masks(found, alive, spec)
        if all(mask.all() for mask in masks.values()):
            return state
        return replace(state, params=apply_mask(state.params, masks), masks=masks)

    def done(state: State) -> bool:
        return state.round >= server.rounds

    return FederatedAlgorithm(
        init, configure, client_update, server_update, done, statistics, only_sgd
    )


def unused(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings without effect beside the others, and why."""
    if settings["penalty_ratio"]:
        return {}
    return dict.fromkeys(("threshold", "reconfigure_every"), "penalty_ratio is 0: it is FedAvg")


def rehearsals(settings: Mapping[str, Any]) -> Sequence[Rehearsal]:
    """The shortest run in which clients do all that they do in a long one."""
    return [Rehearsal({"reconfigure_every": 2}, rounds=3, until=2, one_batch=True, bound=True)]


def statistics(task: ClientTask) -> dict[str, StatisticForm]:
    """λ as the first round's clients set it."""
    if not task.hparams["penalty_ratio"] or task.hparams["coefficient"]:
        return {}
    return {"coefficient": StatisticForm({"coefficient": (1,)}, non_negative=True)}


def client_update(
    task: ClientTask, batches: Batches, engine: Engine, client_state: ClientState
) -> tuple[ClientUpdate, ClientState]:
    """`local_steps` steps on loss + λ·Σ‖w_g‖."""
    h = task.hparams
    steps, batch_size = int(h["local_steps"]), int(h["batch_size"])
    session = engine.open(
        task.spec,
        task.params,
        task.sub_model,
        batch_size=batch_size,
        optimizer=SGD(float(h["lr"]), float(h["momentum"]), float(h["weight_decay"])),
        loss="bce" if h["loss"] == "bce" else "ce",
        seed=task.seed,
    )
    statistics = {}
    if h["penalty_ratio"]:
        train_loss, used = _regularised_sgd(session, task, batches)
        if not h["coefficient"]:
            statistics["coefficient"] = Statistic({"coefficient": np.array([used])}, "mean")
    else:
        train_loss = local_sgd(session, batches, steps=steps, batch_size=batch_size, seed=task.seed)
    update = ClientUpdate(
        client=task.client,
        num_examples=batches.num_examples,
        params=session.params(packed=True),
        sub_model=task.sub_model,
        statistics=statistics,
        metrics={"train_loss": train_loss},
        work=only_sgd(task),
    )
    return update, client_state


def _regularised_sgd(session: Session, task: ClientTask, batches: Batches) -> tuple[float, float]:
    """A step on the loss, then the proximal step of the penalty; (mean loss, λ)."""
    h = task.hparams
    used, lr, momentum = (float(h[key]) for key in ("coefficient", "lr", "momentum"))
    axes = group_axes(task.spec, channels(task.spec))
    drawn = batches.draw(
        steps=int(h["local_steps"]), batch_size=int(h["batch_size"]), seed=task.seed
    )
    losses, amount = [], 0.0
    for x, y in drawn:
        losses.append(session.step(x, y))
        if not used:  # the run's first batch here: the penalty's share of this loss
            used = coefficient(float(h["penalty_ratio"]), losses[0], penalty(task.params, axes))
        # how far a constant gradient of size λ moves a weight in this step
        amount = momentum * amount + lr * used
        held = session.params()
        session.load({**held, **shrunk(held, axes, amount)})
    return float(np.mean(losses)), used
