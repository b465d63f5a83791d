"""Online learning of the model size: the sign of dτ/dk moves the density, equal in every layer.

Han, Wang, Leung, "Adaptive Gradient Sparsification for Efficient Federated Learning: An Online
Learning Approach", ICDCS 2020, arXiv 2001.04756, learns how many gradient elements to send; Jiang
et al. (PruneFL), TNNLS 2022, arXiv 1909.12326, apply it to the number of weights as a baseline.
The search is `fedlean.pruning.size_search`; the sign comes from the loss before a round, after it
at density k, and after it at a smaller density k', against the round times T(k) and T(k').

From the code of both papers: δ_m = B/√(2m) counts from the first round on, though nothing moves at
the beginning; K = [0.002, 1] at first; k' is smaller than k; losses that did not fall give no
estimate, and after 11 of those in a row the next lets k grow; K is refitted after 20 moves.  From
PruneFL's: training begins dense, and the model of size k' is the trained one of size k without its
smallest |w|.

**Deviations**, all ours:
- The server has no data (PruneFL's code uploads five examples of every client each round), so
  clients compute the losses, on the model that they are sent: L₀ in the first round of a stretch of
  `adapt_every` rounds, L and L' in the last, before they train.  A size therefore holds for at
  least two rounds, where the papers' code decides after every one, and the decrease is that of all
  rounds of the stretch but the last.  The three losses are of the same clients and examples: with
  client selection the cohort is drawn for a stretch, and a client that missed its beginning sends
  none.  Clients weigh p_n, as in Han et al.'s code.
- k' = k - δ_m/2 with the δ_m of the same decision; the code takes that of the one before, and 0.9 k
  at first.
- The losses are of `probe_batches` batches of a client's data, not of those that it trains on.
- Weights that come back are drawn at random among the pruned and start at
  N(0, (0.1·RMS of the layer's kept weights)²), as in our PruneFL.  PruneFL's code keeps the stale
  values of pruned weights and lets the largest of them return.
- T is that of our cost model (`time_model`), without the work of the losses, which is charged.
- No decision after the last round: nothing would train it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import prod
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
    SubModel,
    Work,
    derive_seed,
    generator,
)
from fedlean.cost.price import round_seconds
from fedlean.cost.time import linear_round_time
from fedlean.engine.protocol import SGD, Engine, Session
from fedlean.pruning.equal_density import add_random, keep_largest, kept_count, without_smallest
from fedlean.pruning.regrow import apply_masks
from fedlean.pruning.size_search import (
    SizeSearch,
    derivative_sign,
    next_size,
    probe_size,
    search_within,
)
from fedlean.train.hyperparameters import at_least, in_range
from fedlean.train.local_sgd import LocalSGD, with_local_sgd
from fedlean.train.rehearsal import Rehearsal
from fedlean.train.sgd import local_sgd
from fedlean.train.start import dense_params
from fedlean.train.work import sgd_work
from fedlean.tree import fold

LOSSES = ("start_loss", "end_loss", "probe_loss")  # L₀, L, L', among the metrics of an update


@dataclass(frozen=True)
class State:
    """What survives a round."""

    round: int  # training rounds completed
    phase: str  # always "train"
    params: Params
    masks: Masks = field(default_factory=dict)  # empty while the size is 1: dense
    size: float = 1.0  # k as a density
    search: Mapping[str, Any] = field(default_factory=dict)  # fields of a SizeSearch


@with_local_sgd
def online(
    server: Server,
    sgd: LocalSGD,
    *,
    adapt_every: int = 2,
    adapt_from: int = 10,
    min_density: float = 0.002,
    probe_batches: int = 1,
    readd_scale: float = 0.1,
    time_model: Literal["linear", "device"] = "linear",
) -> FederatedAlgorithm:
    """Online search of the density at which the loss falls fastest per second.

    Args:
      sgd: local SGD, whose settings are this method's as well; a cohort trains for
        `adapt_every` rounds.
      adapt_every: rounds of a stretch, after which the density moves, at least 2; 0: FedAvg.
      adapt_from: rounds of dense training before the first stretch that counts (PruneFL's code:
        10, Han et al.'s: 2).
      min_density: smallest density, in (0, 1] (both codes: 0.002).
      probe_batches: batches on which a client computes each of the three losses.
      readd_scale: standard deviation of re-added weights over the RMS of the layer's kept ones.
      time_model: T(k), "linear" or "device" as in `prunefl`.

    Raises ValueError naming the hyper-parameter that is out of range.
    """
    at_least("adapt_every", adapt_every, 0)
    if adapt_every == 1:
        raise ValueError(
            "adapt_every must be 0 (never) or at least 2, got 1: clients see what a round gave in "
            "the next one"
        )
    at_least("adapt_from", adapt_from, 0)
    in_range("min_density", min_density, 0.0, 1.0, open_low=True)
    at_least("probe_batches", probe_batches, 1)
    in_range("readd_scale", readd_scale, 0.0, 10.0)
    if time_model not in ("linear", "device"):
        raise ValueError(f"time_model must be 'linear' or 'device', got {time_model!r}")

    spec = server.spec
    linear = linear_round_time(
        spec, server.profile, batch_size=sgd.batch_size, local_steps=sgd.local_steps
    )

    def seconds(size: float) -> float:
        """T(k) of a model that keeps the share `size` of every prunable layer."""
        kept = {name: kept_count(prod(spec.param_shapes[name]), size) for name in spec.prunable}
        if time_model == "linear":
            per_weight = linear.seconds_per_weight
            return linear.constant_seconds + sum(per_weight[name] * kept[name] for name in kept)
        return round_seconds(
            spec, kept, server.profile, batch_size=sgd.batch_size, local_steps=sgd.local_steps
        )

    def stretch_of(round: int) -> _Stretch | None:
        """The stretch that `round` is in, if it is one that decides."""
        if not adapt_every:
            return None
        number = -(-round // adapt_every)
        stretch = _Stretch(number, (number - 1) * adapt_every + 1, number * adapt_every)
        decides = stretch.first > adapt_from and stretch.last < server.rounds
        return stretch if decides else None

    def init(model: Model) -> State:
        search = asdict(search_within(min_density, 1.0))
        return State(round=0, phase="train", params=dense_params(model), search=search)

    def measurement(state: State, round: int, client: int) -> dict[str, Scalar]:
        """Which of the three losses the client is asked for, and on what."""
        stretch = stretch_of(round)
        if stretch is None or round not in (stretch.first, stretch.last):
            return {"measure": ""}
        search = SizeSearch(**state.search)
        return {
            "measure": "start" if round == stretch.first else "end",
            "stretch": stretch.number,
            "probe_batches": probe_batches,
            "probe_seed": derive_seed(server.seed, stretch.number, client, "probe"),
            "probe_density": probe_size(search, state.size, stretch.number),
        }

    def task(state: State, round: int, client: int) -> ClientTask:
        hparams: dict[str, Scalar] = {
            **sgd.hparams(state.round),
            **measurement(state, round, client),
        }
        seed = derive_seed(server.seed, round, client, "train")
        sub_model = SubModel(masks=state.masks)
        return ClientTask(round, "train", client, seed, spec, state.params, sub_model, hparams)

    def configure(state: State, devices: Sequence[Device]) -> list[ClientTask]:
        round = state.round + 1
        stretch = stretch_of(round)
        drawn = round if stretch is None else stretch.first
        clients = sgd.clients(server, devices, drawn)
        return [task(state, round, client) for client in clients]

    def server_update(state: State, updates: Iterable[ClientUpdate]) -> State:
        losses = _Losses()
        merged = fold(state.params, losses.noted(updates), variances=spec.variances)
        state = replace(state, round=state.round + 1, params=merged.params())
        stretch = stretch_of(state.round)
        if stretch is None or state.round < stretch.last or not losses.weight:
            return state
        return decide(state, stretch.number, losses.means())

    def decide(state: State, number: int, losses: Mapping[str, float]) -> State:
        """k_{m+1} = P_K(k_m - δ_m · s_m), and the model of that size."""
        search = SizeSearch(**state.search)
        sign = derivative_sign(
            **losses,
            seconds=seconds(state.size),
            probe_seconds=seconds(probe_size(search, state.size, number)),
        )
        search, size = next_size(search, state.size, number, sign)
        state = replace(state, search=asdict(search))
        return state if size == state.size else resized(state, size)

    def resized(state: State, size: float) -> State:
        """The smallest weights go, or random ones come back."""
        masks = keep_largest(state.params, state.masks, size, spec.prunable)
        masks = add_random(masks, size, rng_for=lambda name: draws(state.round, f"grow/{name}"))
        if size == 1:
            masks = {}
        params = apply_masks(
            state.params,
            state.masks,
            masks,
            scale=readd_scale,
            rng_for=lambda name: draws(state.round, f"regrow/{name}"),
        )
        return replace(state, params=params, masks=masks, size=size)

    def draws(round: int, purpose: str) -> np.random.Generator:
        return generator(server.seed, round, 0, purpose)

    def done(state: State) -> bool:
        return state.round >= server.rounds

    return FederatedAlgorithm(init, configure, client_update, server_update, done, work=work)


def unused(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings without effect beside the others, and why."""
    if settings["adapt_every"]:
        return {}
    search = ("adapt_from", "min_density", "probe_batches", "readd_scale", "time_model")
    return dict.fromkeys(search, "adapt_every is 0")


def rehearsals(settings: Mapping[str, Any]) -> Sequence[Rehearsal]:
    """The shortest run in which clients do all that they do in a long one."""
    every = min(settings["adapt_every"], 2)
    return [Rehearsal({"adapt_every": every, "adapt_from": 1}, rounds=5, until=4, bound=True)]


@dataclass(frozen=True)
class _Stretch:
    """Rounds at one size, at the end of which it is decided anew; numbered from 1."""

    number: int  # m
    first: int
    last: int


class _Losses:
    """Σ p_n of the three losses over the clients that sent all of them."""

    def __init__(self) -> None:
        self.weight = 0.0
        self._totals = dict.fromkeys(LOSSES, 0.0)

    def noted(self, updates: Iterable[ClientUpdate]) -> Iterator[ClientUpdate]:
        """Hands the updates on."""
        for update in updates:
            if all(name in update.metrics for name in LOSSES):
                self.weight += update.num_examples
                for name in LOSSES:
                    self._totals[name] += update.num_examples * update.metrics[name]
            yield update

    def means(self) -> dict[str, float]:
        return {name: total / self.weight for name, total in self._totals.items()}


def work(task: ClientTask) -> tuple[Work, ...]:
    """Steps, and at the ends of a stretch at most two losses."""
    h = task.hparams
    most = 2 * int(h["probe_batches"]) * int(h["batch_size"]) if h["measure"] else 0
    return (sgd_work(task, forward_examples=most),)


def client_update(
    task: ClientTask, batches: Batches, engine: Engine, client_state: ClientState
) -> tuple[ClientUpdate, ClientState]:
    """The losses that the task asks for, then w_n <- w - η·g ⊙ m for `local_steps` steps."""
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
    losses, examples, held = _measure(task, batches, session, client_state)
    train_loss = local_sgd(session, batches, steps=steps, batch_size=batch_size, seed=task.seed)
    update = ClientUpdate(
        client=task.client,
        num_examples=batches.num_examples,
        params=session.params(packed=True),
        sub_model=task.sub_model,
        metrics={"train_loss": train_loss, **losses},
        work=(sgd_work(task, forward_examples=examples),),
    )
    return update, held


def _measure(
    task: ClientTask, batches: Batches, session: Session, client_state: ClientState
) -> tuple[dict[str, float], int, ClientState]:
    """(losses to send, examples that ran forward for them, client state to keep).

    L₀ waits in the client state for the end of its stretch.
    """
    h = task.hparams
    if h["measure"] == "start":
        loss, examples = _loss(task, batches, session)
        held = {"stretch": np.array(int(h["stretch"])), "start_loss": np.array(loss)}
        return {}, examples, held
    if h["measure"] != "end":
        return {}, 0, client_state
    if "stretch" not in client_state or int(client_state["stretch"]) != int(h["stretch"]):
        return {}, 0, {}  # it was not there at the beginning
    end_loss, examples = _loss(task, batches, session)
    held = session.params(packed=True)
    smaller = {
        name: without_smallest(held[name], prod(shape), float(h["probe_density"]))
        for name, shape in task.spec.param_shapes.items()
        if name in task.spec.prunable
    }
    session.load({**held, **smaller})
    probe_loss, again = _loss(task, batches, session)
    session.load(held)
    start_loss = float(client_state["start_loss"])
    return dict(zip(LOSSES, (start_loss, end_loss, probe_loss), strict=True)), examples + again, {}


def _loss(task: ClientTask, batches: Batches, session: Session) -> tuple[float, int]:
    """Mean loss over the stretch's examples, forward only, and how many they are."""
    batch_size, count = int(task.hparams["batch_size"]), int(task.hparams["probe_batches"])
    drawn = batches.draw(steps=count, batch_size=batch_size, seed=int(task.hparams["probe_seed"]))
    return float(np.mean([session.loss(x, y) for x, y in drawn])), count * batch_size
