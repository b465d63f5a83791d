"""Slices by width, trained by forward passes alone: each device has the widest that it can so hold.

Diao, Ding and Tarokh, "HeteroFL", ICLR 2021, arXiv 2010.01264, for the slices: a device of level p
holds the first r^(p-1)·C of each layer's C channels.  Feng et al., "Does Federated Learning Really
Need Backpropagation?" (BAFFLE), arXiv 2301.12195, for the training: a client evaluates the loss at
K points around its slice and sends K slopes,

    c_{n,k} = (L_n(θ_w + σ z_k) - L_n(θ_w)) / σ,                                               (1)

z_k from a seed that all clients of the width w share.  The server draws the directions again and
has an estimate for each width that answered,

    ĝ_w = (1/K) Σ_k (Σ_{n∈w} p_n c_{n,k}) z_k,                                                  (2)

p_n being shares of the examples of that width.  Of a coordinate the estimate is the mean of those
widths that have it, weighted by their examples,

    ĝ_j = Σ_{w∋j} N_w ĝ_{w,j} / Σ_{w∋j} N_w,                                                    (3)

along which its optimiser takes a step.  The numbers of the equations are ours.  Without
backpropagation a device holds a wider slice in the same memory: what a level takes is weighed by
the plan of its forward passes.

**Deviations.**  Nobody has published this combination: (3), and one optimiser for the whole model,
are ours.  A coordinate that nobody held keeps its value and its moments bit for bit.  Widths draw
directions of their own.  The slice's values go down in every round, and no client replays what it
missed.  HeteroFL's scaler is for training mode; a forward pass is an evaluation, which has none,
and in which BatchNorm takes its running statistics: those that the server finds with `static_norm`.
What is ours of the training is in `methods.ntk_zo`.
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
    SubModel,
)
from fedlean.engine.protocol import Engine
from fedlean.submodels.cut import whole
from fedlean.submodels.cut_round import Given, cut_tasks
from fedlean.submodels.levels import levels, rates_from
from fedlean.submodels.sliced import Slices, without_effect
from fedlean.submodels.static_norm import calibrated
from fedlean.submodels.width import width
from fedlean.train import forward_round, forward_training
from fedlean.train.cohort import devices_of
from fedlean.train.forward_round import SLOPES
from fedlean.train.forward_training import ForwardTraining, run_seed
from fedlean.train.forward_updates import Held, Space, advance, estimate, only_where, round_seed
from fedlean.train.local_sgd import with_settings
from fedlean.train.rehearsal import Rehearsal
from fedlean.train.start import dense_params
from fedlean.tree import Fold

ESTIMATE = "estimate"


@dataclass(frozen=True)
class State:
    """What survives a round."""

    round: int  # training rounds completed
    phase: str
    params: Params  # of the whole model
    moments: Mapping[str, Params] = field(default_factory=dict)  # of the optimiser
    steps: int = 0  # of the optimiser
    masks: Masks = field(default_factory=dict)  # always empty


@with_settings(ForwardTraining, Slices)
def zo_slices(server: Server, forward: ForwardTraining, slices: Slices) -> FederatedAlgorithm:
    """Zeroth-order training of slices of one model.

    Args:
      forward: training by forward passes, whose settings are this method's as well.
      slices: the same; the memory that decides is that of the slice's forward passes.

    Raises ValueError naming the hyper-parameter that is out of range, or the layer that cannot be
    sliced.
    """
    spec, rates, asked = server.spec, rates_from(slices.widths), forward.asked
    cuts = [whole(spec) if rate == 1 else width(spec, rate) for rate in rates]
    named = zip(map(str, rates), cuts, strict=True)
    choice = levels([(name, cut, [asked.work()]) for name, cut in named], server.profile)
    seed = run_seed(server)

    def init(model: Model) -> State:
        return State(0, "train", dense_params(model))

    def given(device: Device, round: int) -> Given:
        at = choice.given(slices.assign, device, seed=server.seed, round=round)
        own = {"width": choice.names[at], "direction_seed": round_seed(seed, round, at)}
        return Given(device.id, choice.cuts[at], own)

    def configure(state: State, devices: Sequence[Device]) -> list[ClientTask]:
        round = state.round + 1
        cohort = devices_of(devices, forward.clients(server, devices, round))
        return cut_tasks(
            server,
            [given(device, round) for device in cohort],
            round=round,
            phase=state.phase,
            model=Model(spec, state.params),
            hparams=asked.to_hparams(),
        )

    def server_update(state: State, updates: Iterable[ClientUpdate]) -> State:
        round, heard = state.round + 1, _by_width(updates)
        merged, slopes = Fold(state.params), []
        for at, (name, cut) in enumerate(zip(choice.names, choice.cuts, strict=True)):
            if name not in heard:
                continue
            folded, examples = heard[name]
            slopes.append(folded.statistic(SLOPES)[SLOPES])
            space = Space(cut.spec.param_shapes, {}, asked.kind)
            of_width = estimate(round_seed(seed, round, at), slopes[-1], space)  # (2)
            merged.add(_estimated(at, examples, of_width), index=cut.index)
        gradient = merged.statistic(ESTIMATE)  # (3)
        if not gradient:
            return replace(state, round=round)
        before = Held(state.params, state.moments, state.steps)
        rate = forward.rate(state.round)
        after = advance(before, gradient, forward.rule, rate, np.concatenate(slopes))
        after = only_where(before, after, merged.sent(ESTIMATE))
        params = calibrated(server, slices.static_norm, merged, after.params)
        return replace(state, round=round, params=params, moments=after.moments, steps=after.steps)

    def done(state: State) -> bool:
        return state.round >= server.rounds

    return FederatedAlgorithm(
        init, configure, client_update, server_update, done, forward_round.forms, forward_round.work
    )


def _by_width(updates: Iterable[ClientUpdate]) -> dict[str, tuple[Fold, int]]:
    """The slopes of each width that answered, and its examples N_w."""
    heard: dict[str, tuple[Fold, int]] = {}
    for update in updates:
        if update.task is None:
            raise ValueError("an update without its task cannot be merged: which width is it of?")
        name = str(update.task.hparams["width"])
        folded, examples = heard.get(name, (Fold({}), 0))
        folded.add(update)
        heard[name] = folded, examples + update.num_examples
    return heard


def _estimated(at: int, examples: int, gradient: Params) -> ClientUpdate:
    """The estimate of a width, as of one client with all of its examples."""
    return ClientUpdate(at, examples, {}, SubModel(), {ESTIMATE: Statistic(gradient, "mean")})


def unused(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings without effect beside the others, and why."""
    return forward_training.unused(settings) | without_effect(settings)


def rehearsals(settings: Mapping[str, Any]) -> Sequence[Rehearsal]:
    """A few rounds, without the estimates, of which nothing is sent."""
    return [Rehearsal(merged=False)]


def client_update(
    task: ClientTask, batches: Batches, engine: Engine, client_state: ClientState
) -> tuple[ClientUpdate, ClientState]:
    """The slopes (1) of the slice's loss on one batch."""
    return forward_round.answer(task, task.params, batches, engine), client_state
