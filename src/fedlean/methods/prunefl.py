"""PruneFL: adaptive and distributed parameter pruning.

Jiang et al., "Model Pruning Enables Efficient Federated Learning on Edge Devices", TNNLS 2022,
arXiv 1909.12326: Algorithm 1 (the loop), eq. (2)-(7) (the objective), Algorithms 2 and 3 (its
maximisation, in `fedlean.pruning`), Sec. VI-E (size limit and target).

One client prunes alone first (phase "initial"); then all train the pruned model, exchanging the
values of kept weights only, and every `reconfigure_every` rounds send the accumulated g² of *all*
coordinates, from which the server decides what to drop and what to grow back (phase "train").

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
- With client selection a client uploads g² of the rounds in which it was drawn since the last
  reconfiguration; the paper does not say.
- No reconfiguration after the last round: nothing would train it.  None either where nobody
  answers, unless the size limit has fallen below the size: then w² stands for the importance.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

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
    SubModel,
    Work,
    derive_seed,
)
from fedlean.engine.protocol import Engine
from fedlean.pruning.budget import fraction_to
from fedlean.pruning.density import full_masks
from fedlean.pruning.importance_pieces import SentPieces, ordered, sent_form, statistic_name
from fedlean.pruning.initial_client import first_that_fits
from fedlean.pruning.initial_pruning import most_work, prune_alone
from fedlean.pruning.prunable_set import fraction_at
from fedlean.pruning.reconfiguration_rounds import Rounds, SizeLimit
from fedlean.pruning.reconfigure import Pruner
from fedlean.pruning.sent_importance import accumulated, kept_sums, largest_sums
from fedlean.train.cohort import check_client, cohort_tasks
from fedlean.train.hyperparameters import at_least, in_range, one_of
from fedlean.train.local_sgd import LocalSGD, open_session, with_local_sgd
from fedlean.train.rehearsal import Rehearsal
from fedlean.train.sgd import local_sgd
from fedlean.train.sgd_in_pieces import sgd_in_pieces
from fedlean.train.work import sgd_work
from fedlean.tree import fold, num_kept, pack, unpack

MAX_LOST = 3  # times that the initial client may lose its model and start again
MAX_MOVED = 3  # times that another starts again for one that is away, which then is waited for


@dataclass(frozen=True)
class State:
    """What survives a round."""

    round: int  # training rounds completed
    phase: str  # "initial", then "train"
    params: Params
    masks: Masks = field(default_factory=dict)  # empty until initial pruning is done
    reconfigurations: int = 0  # of further pruning; names the span over which g² accumulates
    importance: Params = field(default_factory=dict)  # Σ g² since the last one, by piece
    initial_sent: bool = False  # the initial client holds the model and goes on from it
    initial_client: int = -1  # the one that does
    initial_lost: int = 0  # how often it has lost it
    initial_moved: int = 0  # how often another has begun in its place


@with_local_sgd
def prunefl(
    server: Server,
    sgd: LocalSGD,
    *,
    initial_pruning: bool = True,
    initial_client: int | None = None,
    initial_batches: int = 5,
    initial_examples: int = 0,
    initial_passes: int = 1,
    initial_importance_passes: int = 1,
    initial_max_passes: int = 1000,
    initial_stable: int = 5,
    reconfigure_every: int = 50,
    importance_rounds: int = 1,
    importance_budget_bytes: int = 0,
    importance_multiple: float = 1.5,
    importance_dtype: Literal["bf16", "fp32"] = "bf16",
    prunable_fraction: float = 0.3,
    prunable_half_life_rounds: float = 10000.0,
    size_limit: float | None = None,
    size_target: float | None = None,
    readd_scale: float = 0.1,
    time_model: Literal["linear", "device"] = "linear",
) -> FederatedAlgorithm:
    """Adaptive pruning during federated learning.

    Args:
      sgd: local SGD, whose settings are this method's as well; `cohort` is the paper's random
        client selection.  In initial pruning the momentum buffer starts at 0 with every task (a
        reconfiguration or 10 passes).
      initial_pruning: prune at `initial_client` first (one that has examples of all classes: with
        few it keeps too little; None: the first that has the memory), in passes of
        `initial_batches` batches from `initial_examples` of its examples, 0: from all it has
        (paper: 10 batches of 200 examples).
      initial_passes: passes between two initial reconfigurations (paper's code: 50);
        initial_importance_passes: passes before one in which g² accumulates; 0: all (paper);
        initial_stable: initial pruning ends after so many reconfigurations in a row that change
        the size by at most 10% (paper's code: 5); initial_max_passes: passes after which it ends
        whatever happens (1000).
      reconfigure_every: rounds between reconfigurations (paper: 50); 0: no further pruning.
      importance_rounds: rounds before a reconfiguration in which g² accumulates; 0: all (paper).
      importance_budget_bytes: for Σ g² at a client at a time; 0: for all coordinates (paper).  Such
        parts of the model are taken one a step, in so many of the last rounds as whole sweeps over
        it take, at least one; each goes up after its round.
      importance_multiple: so many times the kept weights of a layer are the sums that go up, the
        largest ones; 0: all (paper).
      importance_dtype: in which the sums go up, "bf16" (two bytes each) or "fp32" (four).
      prunable_fraction: φ, share of a layer's smallest weights that may be dropped at once, halved
        every `prunable_half_life_rounds` rounds (paper's code: 0.3, 10000).
      size_limit, size_target: D_lim and D_tgt of Sec. VI-E, densities in (0, 1]; None: no limit;
        the target defaults to the limit.  The limit acts at reconfigurations, which never drop a
        unit's last weight: far below what the units need it is not reached.  Initial pruning
        approaches it by φ of each layer at a time and, where its passes are over, at once; without
        initial pruning it is exceeded until the first reconfiguration.
      readd_scale: standard deviation of re-added weights over the RMS of the layer's kept ones.
      time_model: "linear", T(M) = c + Σ t_j with Algorithm 2; "device", the device's whole round
        time with its dense fall-back (monotone, not linear) with Algorithm 3.

    Raises ValueError naming the hyper-parameter that is out of range.
    """
    if initial_client is not None:
        check_client("initial_client", initial_client, server)
    at_least("initial_batches", initial_batches, 1)
    at_least("initial_examples", initial_examples, 0)
    at_least("initial_passes", initial_passes, 1)
    at_least("initial_importance_passes", initial_importance_passes, 0)
    at_least("initial_max_passes", initial_max_passes, 1)
    at_least("initial_stable", initial_stable, 1)
    if initial_passes > initial_max_passes:
        raise ValueError(
            f"initial_passes must be at most initial_max_passes ({initial_max_passes}), got "
            f"{initial_passes}: nothing would be pruned"
        )
    at_least("reconfigure_every", reconfigure_every, 0)
    at_least("importance_rounds", importance_rounds, 0)
    at_least("importance_budget_bytes", importance_budget_bytes, 0)
    in_range("prunable_fraction", prunable_fraction, 0.0, 1.0)
    in_range("prunable_half_life_rounds", prunable_half_life_rounds, 0.0, 1e12, open_low=True)
    in_range("readd_scale", readd_scale, 0.0, 10.0)
    for name, value in (("size_limit", size_limit), ("size_target", size_target)):
        if value is not None:
            in_range(name, value, 0.0, 1.0, open_low=True)
    in_range("importance_multiple", importance_multiple, 0.0, 1e9)
    one_of("importance_dtype", importance_dtype, ("bf16", "fp32"))
    one_of("time_model", time_model, ("linear", "device"))

    spec = server.spec
    rounds = Rounds(
        *(spec, server.rounds, reconfigure_every, importance_rounds),
        *(sgd.local_steps, importance_budget_bytes),
    )
    size = SizeLimit(rounds, size_limit, size_target)

    def pruner(round: int, masks: Masks | None = None) -> Pruner:
        """For the reconfiguration after `round`, of `masks` if it is to reach the limit at once."""
        fraction = fraction_at(
            round, initial=prunable_fraction, half_life_rounds=prunable_half_life_rounds
        )
        limit = size.kept(round)
        if masks and limit is not None:
            fraction = max(fraction, fraction_to(limit, masks))
        steps = sgd.local_steps
        return Pruner(
            time_model, server.profile, sgd.batch_size, steps, fraction, limit, readd_scale
        )

    def init(model: Model) -> State:
        if model.masks:  # initial pruning is what somebody else has done
            return State(0, "train", model.params, {**full_masks(spec), **model.masks})
        if initial_pruning:
            return State(round=0, phase="initial", params=model.params)
        return State(round=0, phase="train", params=model.params, masks=full_masks(spec))

    def initial_task(state: State, devices: Sequence[Device]) -> ClientTask:
        hparams = {
            **sgd.hparams(0),
            **pruner(0).to_hparams(),
            "initial_batches": initial_batches,
            "initial_examples": initial_examples,
            "initial_passes": initial_passes,
            "initial_importance_passes": initial_importance_passes or initial_passes,
            "initial_max_passes": initial_max_passes,
            "initial_stable": initial_stable,
        }
        client = state.initial_client if initial_client is None else initial_client
        params, here = {} if state.initial_sent else state.params, client in {d.id for d in devices}
        if initial_client is None and not here and state.initial_moved < MAX_MOVED:
            client, params = first_that_fits(spec, hparams, devices), state.params
        seed = derive_seed(server.seed, 0, client, "initial")
        return ClientTask(0, "initial", client, seed, spec, params, SubModel(), hparams)

    def configure(state: State, devices: Sequence[Device]) -> list[ClientTask]:
        if state.phase == "initial":
            return [initial_task(state, devices)]
        round = state.round + 1
        hparams = {
            **sgd.hparams(state.round),
            **rounds.orders(round),
            "importance_multiple": importance_multiple,
            "importance_dtype": importance_dtype,
            "reconfigurations": state.reconfigurations,
        }
        model = Model(spec, pack(state.params, state.masks), state.masks)
        drawn = sgd.clients(server, devices, round)
        return cohort_tasks(server, drawn, round=round, phase="train", model=model, hparams=hparams)

    def server_update(state: State, updates: Iterable[ClientUpdate]) -> State:
        if state.phase == "initial":
            return _after_initial(state, updates)
        merged = fold(state.params, updates, variances=spec.variances)  # w = Σ p_n w_n
        round = state.round + 1
        collected = rounds.collected(round, state.importance, merged)
        state = replace(state, round=round, params=merged.params(), importance=collected)
        if not rounds.reconfigures(round):
            return state
        state = replace(state, importance={})
        due, importance = pruner(round, state.masks), rounds.whole(collected, merged)
        if not importance:  # nobody answered
            if due.limit is None or num_kept(state.masks) <= due.limit:
                return state
            importance = {name: np.square(state.params[name]) for name in spec.prunable}
        seed = derive_seed(server.seed, round, 0, "prune")
        params, masks = due.reconfigure(spec, state.params, state.masks, importance, seed)  # (7)
        reconfigurations = state.reconfigurations + 1
        return replace(state, params=params, masks=masks, reconfigurations=reconfigurations)

    def done(state: State) -> bool:
        return state.phase == "train" and state.round >= server.rounds

    return FederatedAlgorithm(init, configure, client_update, server_update, done, statistics, work)


def unused(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings without effect beside the others, and why."""
    found = {}
    if not settings["initial_pruning"]:
        initial = {name for name in settings if name.startswith("initial_")} - {"initial_pruning"}
        found |= dict.fromkeys(initial, "initial_pruning is false")
    if not settings["reconfigure_every"]:
        importance = {name for name in settings if name.startswith("importance_")}
        found |= dict.fromkeys((*importance, "prunable_half_life_rounds"), "reconfigure_every is 0")
    if not settings["initial_pruning"] and not settings["reconfigure_every"]:
        pruning = ("prunable_fraction", "size_limit", "size_target", "readd_scale", "time_model")
        found |= dict.fromkeys(pruning, "nothing is pruned")
    return found


def rehearsals(settings: Mapping[str, Any]) -> Sequence[Rehearsal]:
    """The shortest runs in which clients do all that they do in a long one.

    Each ends before a reconfiguration, whose masks depend on the data.
    """
    every, limit = settings["reconfigure_every"], settings["size_limit"]
    if not settings["importance_budget_bytes"]:  # pieces take as many rounds as they take
        every = min(every, 3)
    found = []
    if settings["initial_pruning"]:
        alone = {"initial_client": settings["initial_client"] or 0}  # whether it fits or not
        last = {**alone, "initial_max_passes": settings["initial_passes"]}  # for its last answer
        found += [Rehearsal(alone, rounds=4, steps=2), Rehearsal(last, rounds=4, steps=1)]
    train = Rehearsal(
        {"initial_pruning": False, "reconfigure_every": every},
        rounds=(every or 3) + 1,
        until=every or 3,
        bound=limit is None,
    )
    if limit is None or not settings["initial_pruning"]:
        found.append(train)
    return found if limit is None else [*found, replace(train, density=limit)]


def statistics(task: ClientTask) -> dict[str, StatisticForm]:
    """Σ g² of every trainable coordinate or of pieces, where a task asks for it."""
    if task.hparams.get("piece_bytes", 0):
        return sent_form(task)
    if not task.hparams.get("upload_importance", False):
        return {}
    return {"importance": StatisticForm(task.spec.param_shapes, non_negative=True)}


def work(task: ClientTask) -> tuple[Work, ...]:
    """Of a round; of initial pruning, the most that a chunk of passes and the last one take."""
    if task.phase == "initial":
        return (most_work(task.hparams),)
    h = task.hparams
    budget, first = (int(h.get(name, 0)) for name in ("piece_bytes", "first_piece"))
    importance = bool(h["importance"])
    return (sgd_work(task, importance=importance, piece_bytes=budget, first_piece=first),)


def _after_initial(state: State, updates: Iterable[ClientUpdate]) -> State:
    """The initial client either goes on, has lost its model, or has finished."""
    for update in updates:
        if update.params:
            masks = update.sub_model.masks
            params = {  # dense, in whichever form they came
                name: unpack(value, masks[name]) if name in masks else value
                for name, value in update.params.items()
            }
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
    """One client's half of Algorithm 1, or a stretch of initial pruning."""
    if task.phase == "initial":
        opened = partial(open_session, task, engine)
        return prune_alone(task, batches, client_state, open=opened, train=local_sgd)
    return _train(task, batches, engine, client_state)


def _train(
    task: ClientTask, batches: Batches, engine: Engine, client_state: ClientState
) -> tuple[ClientUpdate, ClientState]:
    """Eq. (2) for `local_steps` steps; g² of eq. (6) accumulates where the task says so."""
    h, masks, state, statistics = task.hparams, task.sub_model.masks, {}, {}
    session = open_session(task, engine)
    drawn = {"batch_size": int(h["batch_size"]), "seed": task.seed}
    importance = bool(h["importance"])
    form = float(h["importance_multiple"]), str(h["importance_dtype"])
    if parts := ordered(task):
        sent = SentPieces(masks, *form)
        train_loss = sgd_in_pieces(session, batches, parts=parts, take=sent.take, **drawn)
        statistics[statistic_name(int(h["first_piece"]))] = sent.statistic()
    else:
        steps = int(h["local_steps"])
        train_loss = local_sgd(session, batches, steps=steps, importance=importance, **drawn)
    if importance and not parts:
        span = int(h["reconfigurations"])
        sums = accumulated(session.importance(), client_state, span)
        if h["upload_importance"]:
            statistics["importance"] = Statistic(largest_sums(sums, masks, *form), "mean")
        else:
            state = kept_sums(sums, span)
    update = ClientUpdate(
        client=task.client,
        num_examples=batches.num_examples,
        params=session.params(packed=True),
        sub_model=task.sub_model,
        statistics=statistics,
        metrics={"train_loss": train_loss},
        work=work(task),
    )
    return update, state
