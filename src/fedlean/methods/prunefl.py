"""PruneFL: adaptive and distributed parameter pruning.

Jiang et al., "Model Pruning Enables Efficient Federated Learning on Edge Devices", TNNLS 2022,
arXiv 1909.12326: Algorithm 1 (the loop), eq. (2)-(7) (the objective), Algorithms 2 and 3 (its
maximisation, in `fedlean.pruning`), Sec. VI-E (size limit and target).

One client prunes alone first (phase "initial"); then all train the pruned model, exchanging the
values of kept weights only, and every `reconfigure_every` rounds send the accumulated g² of *all*
coordinates, from which the server decides what to drop and what to grow back (phase "train").

OURS: the first masks may come from a criterion of foresight (`initial`), by a step of the server's
own (phase "prune") or of the clients (phase "score"); reconfigurations move them as any others.

**Deviations**, each by a parameter where the paper's way is available:
- `importance_rounds=1`: g² is accumulated in the last round before a reconfiguration only, since
  the dense weight gradient costs more than the sparse step; 0 is the paper (all rounds).  So with
  initial pruning and its passes (`initial_importance_passes`).
- Of Σ g² each client sends the largest of a layer, 1.5 times as many as the layer keeps weights, as
  bfloat16; the server counts the others as 0 (`importance_multiple`, `importance_dtype`).
- `importance_budget_bytes` (0: the paper) sums g² of a part of the model a step, scaled from the n
  steps of a part to the I of its round, so that parts are comparable.  While gradients stay alike
  the estimate has the same mean and I/n times the variance.  It is of models some rounds apart,
  under client selection of other clients too, and the largest of noisier sums are overestimated
  more.  A part sends 1.5 times what it keeps, or would keep at the density of its layer.
- `initial_client` is the first that has the memory, where that is known; the paper: "selected".
  Where it is away, another starts again, three times at most; one that is named is waited for.
- Initial pruning draws 5 batches a pass from all data of its client, and reconfigures after every
  pass (`initial_batches`, `initial_examples`, `initial_passes`); the authors' code takes 10
  batches of the same 200 examples and 50 passes, which on an easy task costs more than the
  training that follows.
- Initial pruning can grow back weights, as the paper says; the authors' code can only shrink.
- Re-added weights start at N(0, (0.1·RMS of the layer's kept weights)²); the paper says "a small
  perturbation" and gives no size.
- Under a size limit a reconfiguration keeps the most important weight of every living unit, and
  the limit is that of the tightest round until the next one; where φ of a layer would not reach
  the limit, further pruning may drop more of it.
- Each client weighs p_n · Σ g_n², not (Σ p_n g_n)², which no client can compute.
- With `initial="snip"` clients send the gradient of the largest |g·w|, `importance_multiple` times
  as many as the server keeps, in `importance_dtype`; the server counts the others as 0.
- With client selection a client uploads g² of the rounds in which it was drawn since the last
  reconfiguration; the paper does not say.
- No reconfiguration after the last round: nothing would train it.  None either where nobody
  answers, unless the size limit has fallen below the size: then w² stands for the importance.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
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
    StatisticForm,
    SubModel,
    Work,
    derive_seed,
)
from fedlean.engine.protocol import Engine
from fedlean.pruning import connection_sensitivity, importance_round
from fedlean.pruning.connection_sensitivity import GRADIENT, sensitive
from fedlean.pruning.density import full_masks
from fedlean.pruning.further_pruning import FurtherPruning, Reconfigurations, unused_further
from fedlean.pruning.global_top import count_at
from fedlean.pruning.initial_client import first_that_fits
from fedlean.pruning.initial_pruning import alone, chosen, most_work, prune_alone
from fedlean.pruning.initial_settings import InitialPruning, unused_initial, walked_density
from fedlean.train.cohort import cohort_tasks
from fedlean.train.hyperparameters import at_least
from fedlean.train.local_sgd import LocalSGD, with_settings
from fedlean.train.rehearsal import Rehearsal
from fedlean.tree import fold, pack

MAX_LOST = 3  # times that the initial client may lose its model and start again
MAX_MOVED = 3  # times that another starts again for one that is away, which then is waited for


@dataclass(frozen=True)
class State:
    """What survives a round."""

    round: int  # training rounds completed
    phase: str  # "initial", "prune" or "score", then "train"
    params: Params
    masks: Masks = field(default_factory=dict)  # empty until initial pruning is done
    reconfigurations: int = 0  # of further pruning; names the span over which g² accumulates
    importance: Params = field(default_factory=dict)  # Σ g² since the last one, by piece
    initial_sent: bool = False  # the initial client holds the model and goes on from it
    initial_client: int = -1  # the one that does
    initial_lost: int = 0  # how often it has lost it
    initial_moved: int = 0  # how often another has begun in its place


@with_settings(LocalSGD, InitialPruning, FurtherPruning)
def prunefl(
    server: Server,
    sgd: LocalSGD,
    initial: InitialPruning,
    further: FurtherPruning,
    *,
    importance_budget_bytes: int = 0,
) -> FederatedAlgorithm:
    """Adaptive pruning during federated learning.

    Args:
      sgd: local SGD, whose settings are this method's as well; `cohort` is the paper's random
        client selection.  Where a client prunes alone, the momentum buffer starts at 0 with every
        task (a reconfiguration or 10 passes).
      initial, further: settings of this method as well.
      importance_budget_bytes: for Σ g² at a client at a time; 0: for all coordinates (paper).  Such
        parts of the model are taken one a step, in so many of the last rounds as whole sweeps over
        it take, at least one; each goes up after its round.

    Raises ValueError naming the hyper-parameter that is out of range.
    """
    at_least("importance_budget_bytes", importance_budget_bytes, 0)
    spec = server.spec
    moves = Reconfigurations(server, sgd, further, importance_budget_bytes)
    first_density = initial.density(server, moves.size.density(0))

    def init(model: Model) -> State:
        if model.masks:  # initial pruning is what somebody else has done
            return State(0, "train", model.params, {**full_masks(spec), **model.masks})
        if initial.phase == "train":
            return State(0, "train", model.params, full_masks(spec))
        return State(0, initial.phase, model.params)

    def begun(state: State, masks: Masks) -> State:
        params = initial.pruned(state.params, masks)
        return replace(state, phase="train", params=params, masks=masks)

    def initial_task(state: State, devices: Sequence[Device]) -> ClientTask:
        hparams = {**sgd.hparams(0), **moves.pruner(0).to_hparams(), **initial.hparams()}
        named = initial.initial_client
        client = state.initial_client if named is None else named
        params, here = {} if state.initial_sent else state.params, client in {d.id for d in devices}
        if named is None and not here and state.initial_moved < MAX_MOVED:
            client, params = first_that_fits(spec, hparams, devices), state.params
        seed = derive_seed(server.seed, 0, client, "initial")
        return ClientTask(0, "initial", client, seed, spec, params, SubModel(), hparams)

    def configure(state: State, devices: Sequence[Device]) -> list[ClientTask]:
        if state.phase == "prune":
            return []
        if state.phase == "initial":
            return [initial_task(state, devices)]
        round, model = state.round + 1, Model(spec, state.params)
        if state.phase == "score":
            round, most = 0, ceil(further.importance_multiple * count_at(first_density, spec))
            hparams = connection_sensitivity.orders(
                sgd, initial.initial_batches, most, further.importance_dtype
            )
        else:
            hparams = sgd.hparams(state.round) | moves.hparams(round, state.reconfigurations)
            model = Model(spec, pack(state.params, state.masks), state.masks)
        drawn = sgd.clients(server, devices, round)
        return cohort_tasks(
            server, drawn, round=round, phase=state.phase, model=model, hparams=hparams
        )

    def server_update(state: State, updates: Iterable[ClientUpdate]) -> State:
        if state.phase == "initial":
            return _after_initial(state, updates)
        if state.phase == "prune":
            return begun(state, initial.masks(server, state.params, first_density))
        merged = fold(state.params, updates, variances=spec.variances)  # w = Σ p_n w_n
        if state.phase == "score":
            gradient = merged.statistic(GRADIENT)  # Σ p_n g_n
            if not gradient:
                return state
            count = count_at(first_density, spec)
            return begun(state, sensitive(spec, gradient, state.params, count))
        round = state.round + 1
        collected = moves.rounds.collected(round, state.importance, merged)
        state = replace(state, round=round, params=merged.params(), importance=collected)
        if not moves.rounds.reconfigures(round):
            return state
        importance = moves.rounds.whole(collected, merged)
        state = replace(state, importance={})
        after = moves.after(round, state.params, state.masks, importance)
        if after is None:
            return state
        params, masks = after
        reconfigurations = state.reconfigurations + 1
        return replace(state, params=params, masks=masks, reconfigurations=reconfigurations)

    def done(state: State) -> bool:
        return state.phase == "train" and state.round >= server.rounds

    return FederatedAlgorithm(
        init,
        configure,
        client_update,
        server_update,
        done,
        statistics,
        work,
        sends_params=lambda task: task.phase != "score",
        own_masks=alone,
    )


def unused(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings without effect beside the others, and why."""
    pruned, initial = settings["initial_pruning"], settings["initial"]
    otherwise = "nothing is pruned"
    if pruned:
        once = f"initial is {initial!r}, and reconfigure_every is 0: no mask moves"
        otherwise = "" if initial == "client" else once
    found = unused_initial(settings) | unused_further(settings, otherwise)
    if pruned and initial == "snip":  # as its gradient goes up
        found.pop("importance_multiple", None)
        found.pop("importance_dtype", None)
    return found


def rehearsals(settings: Mapping[str, Any]) -> Sequence[Rehearsal]:
    """The shortest runs in which clients do all that they do in a long one.

    Each ends before a reconfiguration, whose masks depend on the data.
    """
    every, limit = settings["reconfigure_every"], settings["size_limit"]
    if not settings["importance_budget_bytes"]:  # pieces take as many rounds as they take
        every = min(every, 3)
    until = every or 3
    train = Rehearsal(
        {"initial_pruning": False, "reconfigure_every": every},
        rounds=until + 1,
        until=until,
        bound=limit is None,
    )
    if settings["initial_pruning"] and settings["initial"] == "snip":
        short = {"reconfigure_every": every, "initial_density": walked_density(settings)}
        return [replace(train, settings=short, one_batch=True)]
    if settings["initial_pruning"] and settings["initial"] != "client":
        return [replace(train, density=walked_density(settings))]
    found = []
    if settings["initial_pruning"]:
        alone = {"initial_client": settings["initial_client"] or 0}  # whether it fits or not
        last = {**alone, "initial_max_passes": settings["initial_passes"]}  # for its last answer
        found += [Rehearsal(alone, rounds=4, steps=2), Rehearsal(last, rounds=4, steps=1)]
    if limit is None or not settings["initial_pruning"]:
        found.append(train)
    return found if limit is None else [*found, replace(train, density=limit)]


def statistics(task: ClientTask) -> dict[str, StatisticForm]:
    """SNIP's gradient; or Σ g² of every trainable coordinate or of pieces, where it is asked."""
    return (
        connection_sensitivity.forms(task)
        if task.phase == "score"
        else importance_round.forms(task)
    )


def work(task: ClientTask) -> tuple[Work, ...]:
    """Of a round; of initial pruning, the most that a chunk of passes and the last one take."""
    if task.phase == "initial":
        return (most_work(task.hparams),)
    half = connection_sensitivity if task.phase == "score" else importance_round
    return half.work(task)


def _after_initial(state: State, updates: Iterable[ClientUpdate]) -> State:
    """The initial client either goes on, has lost its model, or has finished."""
    for update in updates:
        if update.params:
            params, masks = chosen(update)
            return replace(state, phase="train", params=params, masks=masks)
        if not update.metrics.get("lost_state", 0.0):
            other = state.initial_sent and update.client != state.initial_client
            moved, at = state.initial_moved + other, update.client
            return replace(state, initial_sent=True, initial_client=at, initial_moved=moved)
        if state.initial_lost >= MAX_LOST:
            raise ValueError(
                f"client {update.client} lost its model {MAX_LOST + 1} times during initial "
                "pruning: choose another with initial_client"
            )
        return replace(state, initial_sent=False, initial_lost=state.initial_lost + 1)
    return state


def client_update(
    task: ClientTask, batches: Batches, engine: Engine, client_state: ClientState
) -> tuple[ClientUpdate, ClientState]:
    """One client's half of Algorithm 1, a stretch of initial pruning, or SNIP's gradient."""
    if task.phase == "initial":
        return prune_alone(task, batches, engine, client_state)
    if task.phase == "score":
        return connection_sensitivity.answer(task, batches, engine), client_state
    return importance_round.answer(task, batches, engine, client_state)
