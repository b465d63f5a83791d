"""DPF: dynamic pruning with feedback, in the federated form that PruneFL compares its costs with.

Lin, Stich, Barba, Dmitriev, Jaggi, "Dynamic Model Pruning with Feedback", ICLR 2020,
arXiv 2006.07253: w(t+1) = w(t) - γ·g(m(t) ⊙ w(t)).  Gradients are taken at the pruned model and
move the *dense* weights, so a weight that was pruned too early grows until it is among the largest
again.  PruneFL (arXiv 1909.12326) charges it 1 + d of the model's size per round: the pruned model
down, a dense update up.  That is what travels here.

Within a round the mask does not change, so a client needs no pruned weight's value: it trains the
kept ones, and adds up for the pruned ones by how much they would have moved.  The server, which
alone keeps the dense model, adds the mean of that: exactly the dense step above.

**Deviations.**
- The mask changes between rounds, every `reconfigure_every` of them; the paper counts iterations
  (16; here 3 rounds of 5 local steps).
- The schedule of the density is the cubic one of gradual pruning, from dense, as in the public
  re-implementations of DPF; it ends at `target_share` of the rounds (ours).  The last layer may be
  pruned too; what is never pruned is the spec's choice.
- No new mask after the last round: nothing would train it.
PruneFL uses DPF for the comparison of costs only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
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
    Work,
)
from fedlean.engine.protocol import Engine, Session
from fedlean.pruning.density import full_masks
from fedlean.pruning.global_top import count_at, keep_largest
from fedlean.pruning.gradual import gradual_density
from fedlean.train.cohort import cohort_tasks
from fedlean.train.hyperparameters import at_least, in_range
from fedlean.train.local_sgd import LocalSGD, loss_of, open_session, with_local_sgd
from fedlean.train.loss_gradient import loss_and_gradient
from fedlean.train.rehearsal import Rehearsal
from fedlean.train.sgd import local_sgd
from fedlean.train.start import dense_params
from fedlean.train.work import only_sgd, sgd_work
from fedlean.tree import apply_mask, fold

PRUNED = "pruned/"  # before a tensor's name: its pruned weights alone


@dataclass(frozen=True)
class State:
    """What survives a round.  The dense model w is `params` + `hidden`."""

    round: int  # training rounds completed
    phase: str
    params: Params  # m ⊙ w, what clients get and what is evaluated
    masks: Masks = field(default_factory=dict)  # m; empty: dense
    hidden: Params = field(default_factory=dict)  # w where the mask is False, 0 elsewhere


@with_local_sgd
def dpf(
    server: Server,
    sgd: LocalSGD,
    *,
    density: float = 0.2,
    reconfigure_every: int = 3,
    target_share: float = 0.5,
) -> FederatedAlgorithm:
    """Pruned forward and backward, dense update.

    Args:
      sgd: local SGD, whose settings are this method's as well.
      density: kept fraction of the prunable weights at the end of the schedule, in (0, 1]; the
        largest of all tensors together stay; 1: FedAvg.
      reconfigure_every: rounds between new masks (paper: 16 iterations).
      target_share: share of the rounds after which `density` is reached, in (0, 1].

    Raises ValueError naming the hyper-parameter that is out of range.
    """
    in_range("density", density, 0.0, 1.0, open_low=True)
    at_least("reconfigure_every", reconfigure_every, 1)
    in_range("target_share", target_share, 0.0, 1.0, open_low=True)

    spec = server.spec
    count_at(density, spec)  # refuses one that keeps nothing
    last = (server.rounds - 1) // reconfigure_every * reconfigure_every  # round of the last mask
    if density < 1 and not last:
        raise ValueError(
            f"reconfigure_every must be below the number of rounds ({server.rounds}), got "
            f"{reconfigure_every}: nothing would be pruned"
        )
    pruning_rounds = max(1, min(last, round(target_share * server.rounds)))

    def init(model: Model) -> State:
        return State(round=0, phase="train", params=dense_params(model))

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
        hidden = state.hidden
        if merged.count:
            kept_of_old = decayed(sgd, state.round)
            hidden = _moved(hidden, state.masks, merged.statistic("pruned"), kept_of_old)
        state = replace(state, round=state.round + 1, params=merged.params(), hidden=hidden)
        due = state.round % reconfigure_every == 0 and state.round < server.rounds
        return _reconfigured(state) if due and density < 1 else state

    def _reconfigured(state: State) -> State:
        """The mask of the largest weights of the dense model."""
        dense = {**state.params, **{n: state.params[n] + w for n, w in state.hidden.items()}}
        now = gradual_density(state.round, pruning_rounds, density)
        sizes = {name: np.abs(dense[name]) for name in spec.prunable}
        masks = keep_largest(sizes, count_at(now, spec), full_masks(spec))
        outside = {name: ~mask for name, mask in masks.items()}
        hidden = apply_mask({name: dense[name] for name in masks}, outside)
        return replace(state, params=apply_mask(dense, masks), masks=masks, hidden=hidden)

    def done(state: State) -> bool:
        return state.round >= server.rounds

    return FederatedAlgorithm(init, configure, client_update, server_update, done, statistics, work)


def unused(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings without effect beside the others, and why."""
    if settings["density"] < 1:
        return {}
    return dict.fromkeys(("reconfigure_every", "target_share"), "density is 1: nothing is pruned")


def rehearsals(settings: Mapping[str, Any]) -> Sequence[Rehearsal]:
    """The shortest run in which clients do all that they do in a long one."""
    return [
        Rehearsal({"reconfigure_every": 1, "target_share": 0.01}, rounds=3, until=2, one_batch=True)
    ]


def statistics(task: ClientTask) -> dict[str, StatisticForm]:
    """The moves of the pruned coordinates, packed, of every tensor that has some."""
    hidden = {name: int(np.sum(~mask)) for name, mask in task.sub_model.masks.items()}
    shapes = {PRUNED + name: (count,) for name, count in hidden.items() if count}
    return {"pruned": StatisticForm(shapes)} if hidden else {}


def work(task: ClientTask) -> tuple[Work, ...]:
    """Steps; once there are masks, with the dense weight gradient of every one.

    The engine holds that and returns it as arrays; of pruned weights the client holds moves and
    velocities.
    """
    if not (masks := task.sub_model.masks):
        return only_sgd(task)
    returned = sum(prod(shape) for shape in task.spec.param_shapes.values())
    pruned = sum(int(np.sum(~mask)) for mask in masks.values())
    return (replace(sgd_work(task, importance=True), held_floats=returned + 2 * pruned),)


def decayed(sgd: LocalSGD, rounds_done: int) -> float:
    """What a round's steps of SGD without a gradient leave of a weight of 1.

    SGD is linear in the start and the gradients, so a client that starts a pruned weight at 0 and
    a server that multiplies its own value by this add up to SGD on the dense weight.
    """
    lr = sgd.rate(rounds_done)
    weight, velocity = 1.0, 0.0
    for _ in range(sgd.local_steps):
        velocity = sgd.momentum * velocity + sgd.weight_decay * weight
        weight -= lr * velocity
    return weight


def _moved(
    hidden: Params, masks: Masks, moves: Params, kept_of_old: float
) -> dict[str, np.ndarray]:
    """Hidden weights after a round; `moves` are the mean moves, packed (pruned,) in flat order."""
    result = {}
    for name, weights in hidden.items():
        result[name] = weights * kept_of_old
        if PRUNED + name in moves:  # not where the mask hides nothing
            result[name][~masks[name]] += moves[PRUNED + name]
    return result


def client_update(
    task: ClientTask, batches: Batches, engine: Engine, client_state: ClientState
) -> tuple[ClientUpdate, ClientState]:
    """`local_steps` steps at the pruned model; the update is dense."""
    h, masks = task.hparams, task.sub_model.masks
    steps, batch_size = int(h["local_steps"]), int(h["batch_size"])
    session = open_session(task, engine)
    statistics = {}
    if masks:
        train_loss, moves = _feedback_sgd(session, task, batches)
        # not under the tensors' own names, which would promise their shapes
        packed = {f"{PRUNED}{name}": move for name, move in moves.items()}
        statistics["pruned"] = Statistic(packed, "mean")
    else:  # still dense: nothing to keep apart
        train_loss = local_sgd(session, batches, steps=steps, batch_size=batch_size, seed=task.seed)
    update = ClientUpdate(
        client=task.client,
        num_examples=batches.num_examples,
        params=session.params(packed=True),
        sub_model=task.sub_model,
        statistics=statistics,
        metrics={"train_loss": train_loss},
        work=work(task),
    )
    return update, client_state


def _feedback_sgd(
    session: Session, task: ClientTask, batches: Batches
) -> tuple[float, dict[str, np.ndarray]]:
    """w <- w - γ·g(m ⊙ w): the session moves the kept weights, this the pruned ones.

    Gives the mean loss and the moves of the pruned weights from a start at 0, packed (pruned,).
    """
    h = task.hparams
    lr, momentum, decay = (float(h[key]) for key in ("lr", "momentum", "weight_decay"))
    pruned = {name: ~mask for name, mask in task.sub_model.masks.items() if not mask.all()}
    moves = {name: np.zeros(int(where.sum()), np.float32) for name, where in pruned.items()}
    velocity = {name: np.zeros_like(move) for name, move in moves.items()}
    drawn = batches.draw(
        steps=int(h["local_steps"]), batch_size=int(h["batch_size"]), seed=task.seed
    )
    output, losses = task.spec.nodes[-1].name, []
    for x, y in drawn:
        logits = session.forward(x, training=True)[output]
        value, at_logits = loss_and_gradient(logits, y, loss_of(task))
        gradients = session.backward({output: at_logits}, dense=True)
        session.apply(gradients)
        for name, where in pruned.items():
            velocity[name] *= momentum
            velocity[name] += gradients[name][where] + decay * moves[name]
            moves[name] -= lr * velocity[name]
        losses.append(value)
    return float(np.mean(losses)), moves
