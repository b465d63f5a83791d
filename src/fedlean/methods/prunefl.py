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
from math import ceil
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
    Scalar,
    Statistic,
    StatisticForm,
    SubModel,
    Work,
    derive_seed,
)
from fedlean.engine.protocol import SGD, Engine, Loss, Session
from fedlean.patterns.largest import largest
from fedlean.pruning.budget import density_limit, fraction_to, max_kept
from fedlean.pruning.density import density, full_masks
from fedlean.pruning.prunable_set import fraction_at
from fedlean.pruning.reconfigure import Pruner
from fedlean.train.cohort import check_client, check_cohort, sample_cohort
from fedlean.train.hyperparameters import at_least, check_sgd, in_range, learning_rate
from fedlean.train.sgd import local_sgd
from fedlean.train.work import sgd_work
from fedlean.tree import fold, kept_counts, num_kept, pack, unpack
from fedlean.wire import round_bfloat16

CHUNK_PASSES = 10  # passes of initial pruning per task, so that a lost task costs little
START_ACCURACY = 1.5  # initial pruning starts at this over the number of classes (authors' code)
MAX_LOST = 3  # times that the initial client may lose its model and start again
STABLE_CHANGE = 0.1  # a reconfiguration that changes the size by at most this share is stable


@dataclass(frozen=True)
class State:
    """What survives a round."""

    round: int  # training rounds completed
    phase: str  # "initial", then "train"
    params: Params
    masks: Masks = field(default_factory=dict)  # empty until initial pruning is done
    reconfigurations: int = 0  # of further pruning; names the span over which g² accumulates
    initial_sent: bool = False  # the initial client holds the model and goes on from it
    initial_lost: int = 0  # how often it has lost it


def prunefl(
    server: Server,
    *,
    lr: float = 0.1,
    local_steps: int = 5,
    batch_size: int = 20,
    cohort: int | None = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    loss: Loss = "ce",
    lr_half_life_rounds: float = 0.0,
    initial_pruning: bool = True,
    initial_client: int = 0,
    initial_batches: int = 5,
    initial_examples: int = 0,
    initial_passes: int = 1,
    initial_importance_passes: int = 1,
    initial_max_passes: int = 1000,
    initial_stable: int = 5,
    reconfigure_every: int = 50,
    importance_rounds: int = 1,
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
      lr, local_steps, batch_size, cohort, momentum, weight_decay, loss, lr_half_life_rounds: as in
        `fedavg`; `cohort` is the paper's random client selection.  In initial pruning the momentum
        buffer starts at 0 with every task (a reconfiguration or 10 passes).
      initial_pruning: prune at `initial_client` first (one that has examples of all classes: with
        few it keeps too little), in passes of `initial_batches` batches from `initial_examples` of
        its examples, 0: from all it has (paper: 10 batches of 200 examples).
      initial_passes: passes between two initial reconfigurations (paper's code: 50);
        initial_importance_passes: passes before one in which g² accumulates; 0: all (paper);
        initial_stable: initial pruning ends after so many reconfigurations in a row that change
        the size by at most 10% (paper's code: 5); initial_max_passes: passes after which it ends
        whatever happens (1000).
      reconfigure_every: rounds between reconfigurations (paper: 50); 0: no further pruning.
      importance_rounds: rounds before a reconfiguration in which g² accumulates; 0: all (paper).
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
    check_sgd(
        server.spec,
        lr=lr,
        local_steps=local_steps,
        batch_size=batch_size,
        momentum=momentum,
        weight_decay=weight_decay,
        loss=loss,
        lr_half_life_rounds=lr_half_life_rounds,
    )
    check_cohort(cohort, server)
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
    in_range("prunable_fraction", prunable_fraction, 0.0, 1.0)
    in_range("prunable_half_life_rounds", prunable_half_life_rounds, 0.0, 1e12, open_low=True)
    in_range("readd_scale", readd_scale, 0.0, 10.0)
    if size_limit is None and size_target is not None:
        raise ValueError("size_target needs a size_limit to start from, got none")
    for name, value in (("size_limit", size_limit), ("size_target", size_target)):
        if value is not None:
            in_range(name, value, 0.0, 1.0, open_low=True)
    in_range("importance_multiple", importance_multiple, 0.0, 1e9)
    if importance_dtype not in ("bf16", "fp32"):
        raise ValueError(f"importance_dtype must be 'bf16' or 'fp32', got {importance_dtype!r}")
    if time_model not in ("linear", "device"):
        raise ValueError(f"time_model must be 'linear' or 'device', got {time_model!r}")

    spec = server.spec

    def limit_at(round: int) -> int | None:
        """Kept weights allowed from the end of `round` until the next reconfiguration."""
        if size_limit is None:
            return None
        target = size_limit if size_target is None else size_target
        until = min(server.rounds, round + (reconfigure_every or server.rounds))
        ends = (density_limit(r, server.rounds, size_limit, target) for r in (round, until))
        return max_kept(min(ends), spec.param_shapes, spec.prunable)

    def pruner(round: int, masks: Masks | None = None) -> Pruner:
        """For the reconfiguration after `round`, of `masks` if it is to reach the limit at once."""
        fraction = fraction_at(
            round, initial=prunable_fraction, half_life_rounds=prunable_half_life_rounds
        )
        limit = limit_at(round)
        if masks and limit is not None:
            fraction = max(fraction, fraction_to(limit, masks))
        return Pruner(
            time_model=time_model,
            profile=server.profile,
            batch_size=batch_size,
            local_steps=local_steps,
            fraction=fraction,
            limit=limit,
            readd_scale=readd_scale,
        )

    sgd: dict[str, Scalar] = {
        "local_steps": local_steps,
        "batch_size": batch_size,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "loss": loss,
    }

    def init(model: Model) -> State:
        if model.masks:  # initial pruning is what somebody else has done
            return State(0, "train", model.params, {**full_masks(spec), **model.masks})
        if initial_pruning:
            return State(round=0, phase="initial", params=model.params)
        return State(round=0, phase="train", params=model.params, masks=full_masks(spec))

    def initial_task(state: State) -> ClientTask:
        hparams = {
            **sgd,
            **pruner(0).to_hparams(),
            "lr": lr,
            "initial_batches": initial_batches,
            "initial_examples": initial_examples,
            "initial_passes": initial_passes,
            "initial_importance_passes": initial_importance_passes or initial_passes,
            "initial_max_passes": initial_max_passes,
            "initial_stable": initial_stable,
        }
        params = {} if state.initial_sent else state.params
        seed = derive_seed(server.seed, 0, initial_client, "initial")
        return ClientTask(0, "initial", initial_client, seed, spec, params, SubModel(), hparams)

    def reconfigures(round: int) -> bool:
        return bool(reconfigure_every) and round % reconfigure_every == 0 and round < server.rounds

    def accumulates(round: int) -> bool:
        """Whether g² is taken in this round."""
        if not reconfigure_every:
            return False
        ahead = -round % reconfigure_every
        return reconfigures(round + ahead) and (not importance_rounds or ahead < importance_rounds)

    def configure(state: State, devices: Sequence[Device]) -> list[ClientTask]:
        if state.phase == "initial":
            return [initial_task(state)]
        round = state.round + 1
        sub_model, params = SubModel(masks=state.masks), pack(state.params, state.masks)
        hparams = {
            **sgd,
            "lr": learning_rate(lr, state.round, lr_half_life_rounds),
            "importance": accumulates(round),
            "upload_importance": reconfigures(round),
            "importance_multiple": importance_multiple,
            "importance_dtype": importance_dtype,
            "reconfigurations": state.reconfigurations,
        }
        return [
            ClientTask(
                round,
                "train",
                client,
                derive_seed(server.seed, round, client, "train"),
                spec,
                params,
                sub_model,
                hparams,
            )
            for client in sample_cohort(devices, cohort, seed=server.seed, round=round)
        ]

    def server_update(state: State, updates: Iterable[ClientUpdate]) -> State:
        if state.phase == "initial":
            return _after_initial(state, updates)
        merged = fold(state.params, updates, variances=spec.variances)
        round = state.round + 1
        state = replace(state, round=round, params=merged.params())
        if not reconfigures(round):
            return state
        due, importance = pruner(round, state.masks), merged.statistic("importance")
        if not importance:  # nobody answered
            if due.limit is None or num_kept(state.masks) <= due.limit:
                return state
            importance = {name: np.square(state.params[name]) for name in spec.prunable}
        seed = derive_seed(server.seed, round, 0, "prune")
        params, masks = due.reconfigure(spec, state.params, state.masks, importance, seed)
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
        importance = ("importance_rounds", "importance_multiple", "importance_dtype")
        found |= dict.fromkeys((*importance, "prunable_half_life_rounds"), "reconfigure_every is 0")
    if not settings["initial_pruning"] and not settings["reconfigure_every"]:
        pruning = ("prunable_fraction", "size_limit", "size_target", "readd_scale", "time_model")
        found |= dict.fromkeys(pruning, "nothing is pruned")
    return found


def statistics(task: ClientTask) -> dict[str, StatisticForm]:
    """Σ g² of every trainable coordinate, where a task asks for it."""
    if not task.hparams.get("upload_importance", False):
        return {}
    return {"importance": StatisticForm(task.spec.param_shapes, non_negative=True)}


def work(task: ClientTask) -> tuple[Work, ...]:
    """Of a round; of initial pruning, the most that a chunk of passes and the last one take."""
    h = task.hparams
    if task.phase != "initial":
        return (sgd_work(task, importance=bool(h["importance"])),)
    steps, batch_size = int(h["initial_batches"]) * (CHUNK_PASSES + 1), int(h["batch_size"])
    forward_examples = steps * batch_size  # the training accuracy after every pass
    return (Work(steps, batch_size, steps, forward_examples, {}, 1 if h["momentum"] else 0),)


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
            return replace(state, initial_sent=True)
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
        return _initial(task, batches, engine, client_state)
    return _train(task, batches, engine, client_state)


def _open(task: ClientTask, engine: Engine, params: Params, masks: Masks) -> Session:
    h = task.hparams
    return engine.open(
        task.spec,
        params,
        SubModel(masks=masks),
        batch_size=int(h["batch_size"]),
        optimizer=SGD(float(h["lr"]), float(h["momentum"]), float(h["weight_decay"])),
        loss="bce" if h["loss"] == "bce" else "ce",
    )


def _train(
    task: ClientTask, batches: Batches, engine: Engine, client_state: ClientState
) -> tuple[ClientUpdate, ClientState]:
    """Eq. (2) for `local_steps` steps; g² accumulates where the task says so."""
    h, masks = task.hparams, task.sub_model.masks
    session = _open(task, engine, task.params, masks)
    steps, batch_size, importance = (
        int(h["local_steps"]),
        int(h["batch_size"]),
        bool(h["importance"]),
    )
    train_loss = local_sgd(
        session,
        batches,
        steps=steps,
        batch_size=batch_size,
        seed=task.seed,
        importance=importance,
    )
    sums, statistics = {}, {}
    if importance:
        sums = _accumulated(session.importance(), client_state, int(h["reconfigurations"]))
        if h["upload_importance"]:
            sent = _sent_importance(_strip(sums, "importance/"), task)
            statistics["importance"] = Statistic(sent, "mean")
            sums = {}
    update = ClientUpdate(
        client=task.client,
        num_examples=batches.num_examples,
        params=session.params(packed=True),
        sub_model=task.sub_model,
        statistics=statistics,
        metrics={"train_loss": train_loss},
        work=work(task),
    )
    return update, sums


def _sent_importance(sums: Params, task: ClientTask) -> dict[str, np.ndarray]:
    """What goes up of Σ g²: per masked tensor the largest, rounded; 0 stands for the others."""
    multiple, masks = float(task.hparams["importance_multiple"]), task.sub_model.masks
    sent = dict(sums)
    for name, mask in masks.items():
        count = ceil(multiple * np.count_nonzero(mask))
        if multiple and count < mask.size:
            chosen = largest(sums[name].ravel(), count).reshape(mask.shape)
            sent[name] = sums[name] * chosen
    if task.hparams["importance_dtype"] == "bf16":
        return {name: round_bfloat16(values) for name, values in sent.items()}
    return sent


def _accumulated(
    importance: Params, client_state: ClientState, reconfigurations: int
) -> dict[str, np.ndarray]:
    """This round's sums on top of those since the last reconfiguration; older ones are dropped."""
    sums = {f"importance/{name}": values for name, values in importance.items()}
    span = client_state.get("reconfigurations")
    if span is not None and int(span) == reconfigurations:
        sums = {key: values + client_state[key] for key, values in sums.items()}
    return {**sums, "reconfigurations": np.array(reconfigurations)}


def _strip(state: ClientState, prefix: str) -> dict[str, np.ndarray]:
    return {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }


@dataclass(frozen=True)
class _Local:
    """The initial client's model and counters, kept in its client state between tasks."""

    params: Params
    masks: Masks
    importance: Params  # Σ g² since the last reconfiguration; empty: none yet
    passes: int = 0
    since: int = 0  # passes since the last reconfiguration (or since the start)
    stable: int = 0  # reconfigurations in a row that changed the size by at most 10%
    reconfigurations: int = 0
    started: bool = False

    def to_state(self) -> dict[str, np.ndarray]:
        arrays = {
            f"{group}/{name}": value
            for group in ("params", "masks", "importance")
            for name, value in getattr(self, group).items()
        }
        counters = ("passes", "since", "stable", "reconfigurations", "started")
        return arrays | {name: np.array(int(getattr(self, name))) for name in counters}

    @staticmethod
    def from_state(state: ClientState) -> _Local:
        return _Local(
            params=_strip(state, "params/"),
            masks=_strip(state, "masks/"),
            importance=_strip(state, "importance/"),
            passes=int(state["passes"]),
            since=int(state["since"]),
            stable=int(state["stable"]),
            reconfigurations=int(state["reconfigurations"]),
            started=bool(state["started"]),
        )


def _initial(
    task: ClientTask, batches: Batches, engine: Engine, client_state: ClientState
) -> tuple[ClientUpdate, ClientState]:
    """Up to CHUNK_PASSES passes of initial pruning, ending early at a reconfiguration.

    The model stays at the client until initial pruning is done; a task without parameters says
    "go on from what you hold".
    """
    h = task.hparams
    if task.params:
        local = _Local(task.params, full_masks(task.spec), {})
    elif "passes" in client_state:
        local = _Local.from_state(client_state)
    else:
        lost = ClientUpdate(
            task.client, batches.num_examples, {}, SubModel(), metrics={"lost_state": 1.0}
        )
        return lost, {}
    local, work, train_loss = _passes(task, batches, engine, local)
    if local.started and local.since >= int(h["initial_passes"]):
        local = _reconfigure_initial(task, local)
    stopped = local.stable >= int(h["initial_stable"]) or local.passes >= int(
        h["initial_max_passes"]
    )
    works = [work]
    if stopped and 0 <= int(h["limit"]) < num_kept(local.masks):
        local, work = _down_to_limit(task, batches, engine, local)
        works.append(work)
    update = ClientUpdate(
        client=task.client,
        num_examples=batches.num_examples,
        params=local.params if stopped else {},
        sub_model=SubModel(masks=local.masks if stopped else {}),
        metrics={
            "train_loss": train_loss,
            "density": density(local.masks),
            "passes": float(local.passes),
            "reconfigurations": float(local.reconfigurations),
        },
        work=tuple(works),
    )
    return update, {} if stopped else local.to_state()


def _down_to_limit(
    task: ClientTask, batches: Batches, engine: Engine, local: _Local
) -> tuple[_Local, Work]:
    """Where the passes were too few for the size limit: one more, and a reconfiguration to it."""
    last = int(task.hparams["initial_passes"]) - 1
    local, work, _ = _passes(task, batches, engine, replace(local, started=True, since=last))
    least = fraction_to(int(task.hparams["limit"]), local.masks)
    return _reconfigure_initial(task, local, least_fraction=least), work


def _passes(
    task: ClientTask, batches: Batches, engine: Engine, local: _Local
) -> tuple[_Local, Work, float]:
    """Trains until a reconfiguration is due or the chunk is full; (local, work, mean loss)."""
    h = task.hparams
    batch_size = int(h["batch_size"])
    examples, steps = int(h["initial_examples"]) or None, int(h["initial_batches"])
    session = _open(task, engine, local.params, local.masks)
    losses: list[float] = []
    importance_steps = forward_examples = 0
    for _ in range(CHUNK_PASSES):
        ahead = int(h["initial_passes"]) - local.since  # passes until a reconfiguration
        importance = local.started and ahead <= int(h["initial_importance_passes"])
        seed = derive_seed(task.seed, local.passes, task.client, "pass")
        losses.append(
            local_sgd(
                session,
                batches,
                steps=steps,
                batch_size=batch_size,
                seed=seed,
                importance=importance,
                examples=examples,
            )
        )
        local = replace(local, passes=local.passes + 1)
        importance_steps += steps if importance else 0
        if local.started:
            local = replace(local, since=local.since + 1)
        else:
            accuracy = _accuracy(session, batches, batch_size, steps, seed, examples)
            forward_examples += steps * batch_size
            classes = task.spec.output_shape[0]
            local = replace(local, started=accuracy >= START_ACCURACY / classes)
        due = local.started and local.since >= int(h["initial_passes"])
        if due or local.passes >= int(h["initial_max_passes"]):
            break
    if importance_steps:
        sums = session.importance()
        if local.importance:
            sums = {name: values + local.importance[name] for name, values in sums.items()}
        local = replace(local, importance=sums)
    work = Work(
        steps * len(losses),
        batch_size,
        importance_steps,
        forward_examples,
        kept_counts(local.masks),
        1 if h["momentum"] else 0,
    )
    return replace(local, params=session.params()), work, float(np.mean(losses))


def _accuracy(
    session: Session, batches: Batches, batch_size: int, steps: int, seed: int, examples: int | None
) -> float:
    """Training accuracy on the examples of initial pruning."""
    hits = total = 0
    for x, y in batches.draw(steps=steps, batch_size=batch_size, seed=seed, examples=examples):
        (logits,) = session.forward(x).values()
        hits += int(np.count_nonzero(logits.argmax(1) == y))
        total += len(y)
    return hits / total


def _reconfigure_initial(task: ClientTask, local: _Local, *, least_fraction: float = 0.0) -> _Local:
    seed = derive_seed(task.seed, local.passes, task.client, "prune")
    pruner = Pruner.from_hparams(task.hparams)
    pruner = replace(pruner, fraction=max(pruner.fraction, least_fraction))
    params, masks = pruner.reconfigure(task.spec, local.params, local.masks, local.importance, seed)
    before, after = density(local.masks), density(masks)
    change = abs(after - before) / before if before else 0.0
    limit = int(task.hparams["limit"])
    on_its_way = 0 <= limit < num_kept(masks) and after < before  # to the size limit
    return replace(
        local,
        params=params,
        masks=masks,
        importance={},
        since=0,
        stable=local.stable + 1 if change <= STABLE_CHANGE and not on_its_way else 0,
        reconfigurations=local.reconfigurations + 1,
    )
