"""One part of the model after the other, trained by forward passes alone behind frozen ones.

Progressive training as in SmartFreeze (arXiv 2408.09101) and ProFL (arXiv 2404.13349): the first
part trains with an output module in place of the rest, is frozen, and the next one trains behind
it.  A round is that of Feng et al., "Does Federated Learning Really Need Backpropagation?"
(BAFFLE), arXiv 2301.12195: each client evaluates the loss at K points θ + σ z_k and sends K slopes

    c_{n,k} = (L_n(θ + σ z_k) - L_n(θ)) / σ,                                                   (1)

and the server takes a step of its optimiser along

    ĝ = (1/K) Σ_k (Σ_n p_n c_{n,k}) z_k.                                                       (2)

The z_k are of what trains, the part and its module, so that the error of ĝ grows with the weights
of one part, not of the model; and what is frozen runs once over a batch, not once for each of the
K + 1 points.  The numbers of the equations are ours.

**Deviations.**  Nobody has published this combination; all that goes beyond either half is ours.
Each part has an equal share of the rounds.  The optimiser begins anew with each part.  The output
module is that of ProFL's and NeuLite's authors.  The stage's values go down in every round, and no
client replays what it missed.  What is ours of the training is in `methods.ntk_zo`.  BatchNorm has
the running statistics that the run begins with, which no forward pass moves.
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
    derive_seed,
)
from fedlean.engine.protocol import Engine
from fedlean.freezing.eligible import Eligibility
from fedlean.freezing.forward import forward_answer, forward_work
from fedlean.freezing.stages import Stage, check_rounds, deadline, module_params, stage_model
from fedlean.freezing.staging import Staging, stage_tasks
from fedlean.train import forward_round, forward_training
from fedlean.train.cohort import devices_of
from fedlean.train.forward_training import ForwardTraining, run_seed
from fedlean.train.forward_updates import Entry, Held, Space, round_seed
from fedlean.train.local_sgd import with_settings
from fedlean.train.rehearsal import Rehearsal
from fedlean.train.slope_fold import SlopeFold
from fedlean.train.start import dense_params
from fedlean.tree import read_only

LONGEST = 64  # stages of a plan's walk, a round each: more than models have parts


@dataclass(frozen=True)
class State:
    """What survives a round."""

    round: int  # training rounds completed
    phase: str
    params: Params  # of the whole model
    stage: int  # from 0
    over: bool  # whether the next round begins another stage; until then this one is evaluated
    extra: Params  # of the stage's output module
    moments: Mapping[str, Params] = field(default_factory=dict)  # of the optimiser in this stage
    steps: int = 0  # of the optimiser in this stage
    masks: Masks = field(default_factory=dict)  # always empty


@with_settings(ForwardTraining)
def zo_stages(
    server: Server, forward: ForwardTraining, *, ends: str = "", module_norm: bool = False
) -> FederatedAlgorithm:
    """Zeroth-order training of one part of the model after the other.

    Args:
      forward: training by forward passes, whose settings are this method's as well; a cohort is
        drawn from the devices that have the memory for the stage.  `micro_batch` is that of what
        is frozen, too.
      ends, module_norm: how the model is divided, as in `freezing.staging.Staging`.

    Raises ValueError naming the hyper-parameter that is out of range, for a model that cannot be
    divided, and for fewer rounds than stages.
    """
    asked, seed = forward.asked, run_seed(server)
    # what is frozen runs in a session of its own, as many examples at a time as the rest
    staging = Staging(ends, module_norm, "pieces", asked.at_once)
    staging.check(server)
    stages = staging.stages(server.spec)
    check_rounds(len(stages), server.rounds)
    eligible = Eligibility(forward_work, server.profile)

    def begin(state: State, number: int) -> State:
        """The state at the start of a stage."""
        draws = derive_seed(server.seed, 0, number, "output module")
        extra = module_params(stages[number], draws, server.init)
        return replace(state, stage=number, over=False, extra=extra, moments={}, steps=0)

    def init(model: Model) -> State:
        return begin(State(0, "train", dense_params(model), 0, False, {}), 0)

    def present(state: State) -> State:
        return begin(state, state.stage + 1) if state.over else state

    def configure(state: State, devices: Sequence[Device]) -> list[ClientTask]:
        state, round = present(state), state.round + 1
        one = stages[state.stage]
        told = {**asked.to_hparams(), "direction_seed": round_seed(seed, round)}
        able = eligible(staging, devices, state.phase, one, told)
        return stage_tasks(
            server,
            staging,
            devices_of(able, forward.clients(server, able, round)),
            round=round,
            phase=state.phase,
            one=one,
            model=stage_model(one, state.params, state.extra),
            hparams=told,
        )

    def server_update(state: State, updates: Iterable[ClientUpdate]) -> State:
        state, round = present(state), state.round + 1
        one, last = stages[state.stage], state.stage == len(stages) - 1
        before = Held({**state.params, **state.extra}, state.moments, state.steps)
        space = Space(_trained(one), {}, asked.kind)
        folded = SlopeFold(before.params, seed, round, space, shared=True)
        for update in updates:
            folded.add(update)
        slopes, after = folded.slopes(), before
        if slopes is not None:
            entry = Entry(round, float(np.float32(forward.rate(state.round))), slopes)
            after = folded.step(before, entry, forward.rule)  # (2)
            read_only({name: after.params[name] for name in space.shapes})
        return replace(
            state,
            round=round,
            params={name: after.params[name] for name in state.params},
            over=not last and round >= deadline(state.stage, len(stages), server.rounds),
            extra={name: after.params[name] for name in state.extra},
            moments=after.moments,
            steps=after.steps,
        )

    def done(state: State) -> bool:
        return state.round >= server.rounds

    def model(state: State) -> Model:
        return stage_model(stages[state.stage], state.params, state.extra)

    return FederatedAlgorithm(
        init,
        configure,
        client_update,
        server_update,
        done,
        statistics=forward_round.forms,
        work=forward_work,
        model=model,
    )


def _trained(one: Stage) -> dict[str, tuple[int, ...]]:
    """Shapes of the part and its module, whose coordinates the directions span."""
    return {n: shape for n, shape in one.spec.param_shapes.items() if n not in one.frozen}


def unused(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings without effect beside the others, and why."""
    return forward_training.unused(settings)


def rehearsals(settings: Mapping[str, Any]) -> Sequence[Rehearsal]:
    """A run in which every stage has a round, without the estimates, of which nothing is sent."""
    return [Rehearsal(rounds=LONGEST, until=LONGEST, merged=False)]


def client_update(
    task: ClientTask, batches: Batches, engine: Engine, client_state: ClientState
) -> tuple[ClientUpdate, ClientState]:
    """The slopes (1) of the stage's loss on one batch, along what it does not freeze."""
    return forward_answer(task, batches, engine), client_state
