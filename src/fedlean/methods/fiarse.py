"""FIARSE: each device trains the largest weights, as many as it can hold, of one shared model.

Wu, Wang, Wang, Liu, Su and Gao, "FIARSE: Model-Heterogeneous Federated Learning via
Importance-Aware Submodel Extraction", NeurIPS 2024, arXiv 2407.19389, and the authors' code
(github.com/HarliWu/FIARSE).  The magnitude of a weight is its importance: a device of capacity γ
gets the share γ of largest |w|, chosen anew from the server's model in every round, and trains it
by the threshold-controlled biased gradient of eq. (3) (`fedlean.pruning.threshold_bias`).  The
server averages each weight over the devices that hold it (Algorithm 1).  The text of the paper was
not at hand: what is said of it here follows the code and public re-implementations.

**Deviations.**
- The memory of the device decides which of `densities` it gets; the authors give capacities by
  hand, as many devices of 1, 1/4, 1/16 and 1/64 each, which `assign` and `densities` also give.
- Biases and norms are held by all devices, whatever their level, and no density counts them.  The
  code takes the biases of linear layers among the largest weights; norms are whole there, too.
- `selection="layer"`, the default: the largest of each tensor.  The authors' main experiments take
  the largest of the whole model ("model"), and their layer-wise variant those of each stage of the
  network.  Where layers differ in how their weights are drawn, one threshold for all takes every
  weight of some of them.
- The authors' factor of eq. (3) comes with each local step ("step"), and needs two copies of the
  kept weights beside the engine.  `biased="round"`, the default, is OURS: the server applies it
  once, to what a round moved, with the factors of the weights that were sent; that costs a device
  nothing.  With it, a weight that falls below the threshold within a round is trained until its
  end; by step it counts as 0 from then on and stays where it is, as in the code.
- At density 1 the threshold is 0 and the round is FedAvg's; the code takes the smallest |w|.
- The code has neither momentum nor decay: with them the factor is on all that SGD moves.
- Means are weighted by examples, over the devices that hold a weight; the code's are plain, over
  those whose weight has moved.  A weight that nobody held keeps its value.
- Exactly the count is kept; of equal magnitudes the first.
- What is evaluated and saved is the largest sub-model that was trained; the authors evaluate one of
  each size, and their networks have BatchNorm without running statistics, ours GroupNorm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from math import fsum, prod
from typing import Any, Literal, get_args

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
    Work,
)
from fedlean.engine.protocol import Engine
from fedlean.patterns.shuffled import shuffled_masks
from fedlean.pruning import equal_density, global_top
from fedlean.pruning.density import full_masks
from fedlean.pruning.equal_density import kept_count
from fedlean.pruning.global_top import count_at
from fedlean.pruning.threshold_bias import bias, thresholds, without_fallen
from fedlean.spec import ModelSpec
from fedlean.submodels.levels import Assign, assigned, rates_from
from fedlean.submodels.needs import Needs, has_limits
from fedlean.train.cohort import cohort_tasks
from fedlean.train.hyperparameters import one_of
from fedlean.train.local_sgd import LocalSGD, open_session, train_kept_weights, with_local_sgd
from fedlean.train.rehearsal import Rehearsal
from fedlean.train.start import dense_params
from fedlean.train.work import sgd_work
from fedlean.tree import Fold, apply_mask, kept_counts, pack

Selection = Literal["layer", "model"]
Biased = Literal["step", "round", "never"]


@dataclass(frozen=True)
class State:
    """What survives a round."""

    round: int  # training rounds completed
    phase: str
    params: Params  # of the whole model
    masks: Masks = field(default_factory=dict)  # always empty: the devices' are their own
    density: float = 0.0  # the largest that any device has trained


@with_local_sgd
def fiarse(
    server: Server,
    sgd: LocalSGD,
    *,
    densities: str = "1 0.5 0.25 0.125 0.0625",
    assign: Assign = "memory",
    selection: Selection = "layer",
    biased: Biased = "round",
) -> FederatedAlgorithm:
    """Federated averaging of the largest weights.

    Args:
      sgd: local SGD, whose settings are this method's as well.
      densities: γ, kept shares of the prunable weights, from the largest to the smallest (authors:
        1, 1/4, 1/16 and 1/64).
      assign: which of them a device gets.  "memory": the largest that it can hold, the first where
        its memory is not known.  "fixed": client i, level i modulo their number.  "drawn": any
        level, anew each round.
      selection: the largest weights of each tensor ("layer") or of the whole model ("model").
      biased: when the factor of eq. (3) comes: with every local "step", as the authors', once for a
        "round", on the server, or "never".

    Raises ValueError naming the hyper-parameter that is out of range.
    """
    one_of("assign", assign, get_args(Assign))
    one_of("selection", selection, get_args(Selection))
    one_of("biased", biased, get_args(Biased))
    spec, rates = server.spec, rates_from(densities, "densities")
    for rate in rates:
        count_at(rate, spec)  # refuses one that keeps nothing
    of_all = selection == "model"

    def largest(params: Params, rate: float) -> Masks:
        """M: True at the share `rate` of largest |w|; {} where that is all."""
        if rate == 1:
            return {}
        if selection == "layer":
            return equal_density.keep_largest(params, {}, rate, spec.prunable)
        sizes = {name: np.abs(params[name]) for name in spec.prunable}
        return global_top.keep_largest(sizes, count_at(rate, spec), full_masks(spec))

    def extracted(params: Params) -> Callable[[int], Model]:
        """The sub-model of a level, made when it is first asked for."""

        @cache
        def level(at: int) -> Model:
            masks = largest(params, rates[at])
            return Model(spec, apply_mask(params, masks), masks)

        return level

    def needs(masks: Masks) -> Needs:
        """Of a round on the weights that `masks` keep."""
        work = replace(sgd.work, kept=kept_counts(masks))
        return Needs(spec, (_with_copies(spec, work) if biased == "step" else work,), masks)

    @cache
    def needs_by_layer() -> tuple[Needs, ...]:
        """By level: the counts are the same in all rounds, whichever weights are the largest."""
        sizes = {name: prod(spec.param_shapes[name]) for name in spec.prunable}
        counts = [{name: kept_count(size, rate) for name, size in sizes.items()} for rate in rates]
        return tuple(
            needs(shuffled_masks(spec, kept, server.seed) if rate < 1 else {})
            for rate, kept in zip(rates, counts, strict=True)
        )

    def levels(devices: Sequence[Device], level: Callable[[int], Model], round: int) -> list[int]:
        """Of each of `devices`."""
        limited = assign == "memory" and any(map(has_limits, devices))
        if not limited:
            needed = (Needs(spec, ()),) * len(rates)  # within every device
        elif selection == "layer":
            needed = needs_by_layer()
        else:
            needed = tuple(needs(level(at).masks) for at in range(len(rates)))
        return [
            assigned(assign, needed, d, profile=server.profile, seed=server.seed, round=round)
            for d in devices
        ]

    def init(model: Model) -> State:
        return State(0, "train", dense_params(model))

    def configure(state: State, devices: Sequence[Device]) -> list[ClientTask]:
        round, level = state.round + 1, extracted(state.params)
        cohort = set(sgd.clients(server, devices, round))
        chosen = sorted((d for d in devices if d.id in cohort), key=lambda device: device.id)
        given = list(zip(chosen, levels(chosen, level, round), strict=True))
        tasks = [
            task
            for at in sorted({at for _, at in given})
            for task in cohort_tasks(
                server,
                [device.id for device, own in given if own == at],
                round=round,
                phase=state.phase,
                model=level(at),
                hparams={
                    **sgd.hparams(state.round),
                    "density": rates[at],
                    "selection": selection,
                    "biased": biased,
                },
            )
        ]
        return sorted(tasks, key=lambda task: task.client)

    def server_update(state: State, updates: Iterable[ClientUpdate]) -> State:
        merged, density = Fold(state.params, variances=spec.variances), state.density
        for update in updates:
            assert update.task is not None
            density = max(density, float(update.task.hparams["density"]))
            merged.add(_biased(update, of_all) if biased == "round" else update)
        return replace(state, round=state.round + 1, params=merged.params(), density=density)

    def done(state: State) -> bool:
        return state.round >= server.rounds

    def model(state: State) -> Model:
        """The largest sub-model that was trained: smaller weights are as they were drawn."""
        masks = largest(state.params, state.density or rates[0])
        return Model(spec, apply_mask(state.params, masks), masks)

    return FederatedAlgorithm(
        init, configure, client_update, server_update, done, work=work, model=model
    )


def unused(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings without effect beside the others, and why."""
    rates, out = rates_from(settings["densities"], "densities"), {}
    if len(rates) == 1:
        out["assign"] = "densities names one density"
    if rates == (1.0,):
        out |= dict.fromkeys(("selection", "biased"), "densities is 1 alone")
    return out


def rehearsals(settings: Mapping[str, Any]) -> Sequence[Rehearsal]:
    """Five rounds, in which every device's mask is another each time."""
    return [Rehearsal(one_batch=True, new_masks=True)]


def work(task: ClientTask) -> tuple[Work, ...]:
    """Steps on the kept weights; where each is biased, beside copies of them."""
    plain = sgd_work(task)
    return (_with_copies(task.spec, plain) if task.hparams["biased"] == "step" else plain,)


def _with_copies(spec: ModelSpec, work: Work) -> Work:
    """The kept weights before a step, and all tensors after it."""
    if not work.kept:
        return work
    values = sum(work.kept.get(name, prod(shape)) for name, shape in spec.tensor_shapes.items())
    return replace(work, held_floats=values + sum(work.kept.values()))


def client_update(
    task: ClientTask, batches: Batches, engine: Engine, client_state: ClientState
) -> tuple[ClientUpdate, ClientState]:
    """`local_steps` steps on the weights of the task, biased or plain."""
    by_step = task.hparams["biased"] == "step" and task.sub_model.masks
    half = _train_biased if by_step else train_kept_weights
    return half(task, batches, engine), client_state


def _train_biased(task: ClientTask, batches: Batches, engine: Engine) -> ClientUpdate:
    """x <- x - η·∇F(x ⊙ M(x)) ⊙ M(x) ⊙ (1 + 2·|x|·θ / (|x| + θ)²), eq. (3), θ of the round's start.

    The session holds x ⊙ M(x) and steps plainly; what it moved is then biased.
    """
    h, masks = task.hparams, task.sub_model.masks
    session = open_session(task, engine)
    values = {name: each.copy() for name, each in pack(_masked(task.params, masks), masks).items()}
    theta = thresholds(values, of_all=h["selection"] == "model")
    drawn = batches.draw(
        steps=int(h["local_steps"]), batch_size=int(h["batch_size"]), seed=task.seed
    )
    losses = []
    for x, y in drawn:
        losses.append(session.step(x, y))
        after = dict(session.params(packed=True))
        bias(values, after, theta)
        held, values = values, {name: after[name] for name in values}
        for name, each in values.items():
            without_fallen(each, theta[name], held[name])
        session.load({**after, **held})
    return ClientUpdate(
        client=task.client,
        num_examples=batches.num_examples,
        params={**session.params(packed=True), **values},
        sub_model=task.sub_model,
        metrics={"train_loss": fsum(losses) / len(losses)},
        work=work(task),
    )


def _biased(update: ClientUpdate, of_all: bool) -> ClientUpdate:
    """The same factor on all that a round moved, with the weights that were sent."""
    masks = update.sub_model.masks
    if not masks or not update.params:
        return update
    assert update.task is not None
    sent = dict(pack(_masked(update.task.params, masks), masks))
    moved = {name: each.copy() for name, each in pack(_masked(update.params, masks), masks).items()}
    bias(sent, moved, thresholds(sent, of_all=of_all))
    return replace(update, params={**update.params, **moved})


def _masked(params: Params, masks: Masks) -> dict[str, np.ndarray]:
    return {name: params[name] for name in masks if name in params}
