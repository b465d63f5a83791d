"""ProFL: the model shrinks part by part into small stand-ins, then grows back part by part.

ProFL, KDD 2025, arXiv 2404.13349.  The model is divided into parts 1 to T.

*Shrinking*, t = T to 2: part t, the convolutions that stand in for later parts and the linear layer
(FC) train on cross-entropy behind earlier parts, which are frozen.  Then part t is *mapped* into a
convolution of its own, which learns by the mean square between both branches' logits.
*Growing*, t = 1 to T: part t trains behind the frozen parts before it, with the output module that
shrinking left, from the weights that shrinking left.  In both halves a part ends once its effective
movement (`freezing.rules`) stops to fall.

**Deviations.**  Means are weighted by examples.
- When a part has converged is decided by the slope of its movement; in the authors' code a person
  decides.  Their configuration names a window of 20 and their code uses 6.
- Each part has a share of the rounds at most, and a map a number of rounds (ours).
- A frozen part is in evaluation mode: its BatchNorm statistics stay.
- The FC is the model's own where that is a linear layer after global average pooling.  Elsewhere
  the module has an FC of its own, and each part that ends in a vector one of its own shape, as
  linear layers differ from part to part.  A part without images has no convolution: it and what
  follows it is mapped into the FC that comes after the part before it.
- What of the student the teacher has, too (later stand-ins, the FC), the student has a frozen copy
  of.  What it alone has is the surrogate, which the map trains.
- Pruning before the first phase (`density`) is ours; stand-ins stay dense, the model's own FC not.
- While the model grows, the stand-ins go on from where the stage before left them (ours).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

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
    Work,
)
from fedlean.engine.protocol import Engine
from fedlean.freezing import foresight
from fedlean.freezing.client import open_stage, stage_update, stage_work, train_stage
from fedlean.freezing.eligible import Eligibility
from fedlean.freezing.foresight import Foresight
from fedlean.freezing.rules import RuleState, never, scalars, slope_of_movement
from fedlean.freezing.stages import (
    Stage,
    deadline,
    merge_stage,
    module_params,
    stage,
    stage_model,
)
from fedlean.freezing.staging import Staging, stage_tasks
from fedlean.layers import GlobalAvgPool, Linear
from fedlean.spec import ModelSpec
from fedlean.submodels.parts import Part
from fedlean.submodels.stages import after, graft
from fedlean.train.cohort import devices_of
from fedlean.train.descent import local_descent
from fedlean.train.hyperparameters import at_least, in_range, one_of
from fedlean.train.local_sgd import LocalSGD, with_settings
from fedlean.train.losses import logits_mse
from fedlean.train.rehearsal import Rehearsal

Freezing = Literal["movement", "never"]
COPY = "student_"  # before the name of what the student holds a copy of
MAP = "map"


class Phase(NamedTuple):
    """A stretch of rounds in which the same tensors train."""

    name: str  # "shrink", "map" or "grow"
    stage: Stage
    until: int  # the round after which it ends at the latest
    student: str = ""  # of a map: the layer that gives the student's logits


@dataclass(frozen=True)
class State:
    """What survives a round."""

    round: int  # training rounds completed, maps among them
    phase: str
    params: Params
    extra: Params  # of the stand-ins, and of linear layers beside the model's own
    rule: RuleState  # of the part that trains; {} in a map
    at: int = 0  # of the phases, the one that comes next
    began: int = 0  # rounds before it
    shown: int = 0  # of the phases, the last that has been trained
    measured: Mapping[str, float] = field(default_factory=dict)  # of the part in that
    masks: Masks = field(default_factory=dict)  # of the whole model; empty: dense


@with_settings(LocalSGD, Staging, Foresight)
def profl(
    server: Server,
    sgd: LocalSGD,
    staging: Staging,
    pruning: Foresight,
    *,
    shrink: bool = True,
    shrink_share: float = 0.4,
    map_rounds: int = 2,
    map_steps: int = 20,
    map_lr: float = 0.01,
    map_momentum: float = 0.9,
    map_weight_decay: float = 0.0,
    freezing: Freezing = "movement",
    window: int = 6,
    values: int = 5,
    threshold: float = 0.05,
    patience: int = 3,
    smoothing: float = 0.5,
    below: float = 1.25,
) -> FederatedAlgorithm:
    """Federated averaging of one part of the model at a time, backwards and then forwards.

    Args:
      sgd: local SGD, whose settings are this method's as well.
      staging, pruning: how the model is divided and how clients run what is frozen, and what is
        pruned before the first stage; their settings too.
      shrink: whether the model shrinks before it grows; otherwise it grows from its first weights
        with stand-ins as drawn.
      shrink_share: of the rounds, what shrinking takes at most, maps included (ours).  Each phase
        has at least one round.
      map_rounds: rounds of each map (ours).
      map_steps: local steps in a round of a map (released: 5 local epochs).
      map_lr, map_momentum, map_weight_decay: of its SGD (released: 1e-5, 0.9, 5e-4; our rate is for
        a map of few steps).
      freezing: "movement": a part ends when its effective movement stops to fall.  "never": each
        takes its whole share of the rounds.
      window: H, rounds of the effective movement (released code: 6, its configuration: 20).
      values, threshold, patience, smoothing, below: of `rules.slope_of_movement`, on
        its scale (released configuration: 15 evaluations, 0.2; the others are ours).

    Raises ValueError naming the hyper-parameter that is out of range, for a model that cannot be
    divided, and for a run with fewer rounds than phases need.
    """
    spec = server.spec
    in_range("shrink_share", shrink_share, 0.0, 1.0)
    for name, count in (("map_rounds", map_rounds), ("map_steps", map_steps)):
        at_least(name, count, 1)
    in_range("map_lr", map_lr, 0.0, 100.0, open_low=True)
    in_range("map_momentum", map_momentum, 0.0, 0.9999)
    in_range("map_weight_decay", map_weight_decay, 0.0, 10.0)
    one_of("freezing", freezing, get_args(Freezing))
    movement = slope_of_movement(
        window=window,
        smoothing=smoothing,
        below=below,
        values=values,
        threshold=threshold,
        patience=patience,
    )
    rule = movement if freezing == "movement" else never()
    stages = _stages(spec, staging)
    phases = _phases(stages, staging.parts(spec), server.rounds, shrink_share, map_rounds, shrink)
    together = replace(staging, beginning="together")
    eligible = Eligibility(work, server.profile)

    def staged(phase: Phase) -> Staging:
        """The student reads what is frozen in the middle: nothing can run apart in a map."""
        return together if phase.name == MAP else staging

    def hparams(phase: Phase, rounds_done: int) -> dict[str, Scalar]:
        told = sgd.hparams(rounds_done)
        if phase.name != MAP:
            return told
        return told | {
            "lr": map_lr,
            "local_steps": map_steps,
            "momentum": map_momentum,
            "weight_decay": map_weight_decay,
            "student": phase.student,
        }

    def begun(phase: Phase, params: Params, masks: Masks) -> RuleState:
        return {} if phase.name == MAP else rule.init(held(phase.stage, params, masks))

    def held(one: Stage, params: Params, masks: Masks) -> np.ndarray:
        return scalars(params, one.own_params, seed=server.seed, masks=masks)

    def init(model: Model) -> State:
        params, masks = model.params, model.masks
        extra: dict[str, np.ndarray] = {}
        for one in stages:
            drawn = module_params(one, server.seed, server.init)
            extra |= {name: value for name, value in drawn.items() if name not in params}
        began = begun(phases[0], params, masks)
        return State(0, phases[0].name, params, extra, began, masks=masks)

    def configure(state: State, devices: Sequence[Device]) -> list[ClientTask]:
        phase, round = phases[state.at], state.round + 1
        told, sent = hparams(phase, state.round), _sent(phase, state)
        present = eligible(staged(phase), devices, phase.name, phase.stage, told, sent.masks)
        return stage_tasks(
            server,
            staged(phase),
            devices_of(present, sgd.clients(server, present, round)),
            round=round,
            phase=phase.name,
            one=phase.stage,
            model=sent,
            hparams=told,
        )

    def server_update(state: State, updates: Iterable[ClientUpdate]) -> State:
        phase = phases[state.at]
        params, extra = merge_stage(spec, state.params, state.extra, updates)
        moved, measured = state.rule, {}
        if phase.name != MAP:
            moved = rule.update(moved, held(phase.stage, params, state.masks))
            froze = moved["frozen"] and state.at + 1 < len(phases)  # the last part goes on
            measured = {**moved["measured"], "frozen": float(froze)}
        state = replace(state, params=params, extra=extra, rule=moved, measured=measured)
        state = replace(state, round=state.round + 1, shown=state.at)
        return _next(state) if _is_over(state) else state

    def _is_over(state: State) -> bool:
        phase = phases[state.at]
        if phase.name == MAP:
            return state.round - state.began >= map_rounds
        return state.rule["frozen"] or state.round >= phase.until

    def _next(state: State) -> State:
        """The last phase goes on until the rounds are over."""
        if state.at + 1 == len(phases):
            return state
        phase = phases[state.at + 1]
        return replace(
            state,
            at=state.at + 1,
            phase=phase.name,
            began=state.round,
            rule=begun(phase, state.params, state.masks),
        )

    def done(state: State) -> bool:
        return state.round >= server.rounds

    def model(state: State) -> Model:
        """Of the phase that was trained last; after a map that is the teacher's."""
        one = stages[phases[state.shown].stage.number]
        return stage_model(one, state.params, state.extra, state.masks)

    def report(state: State) -> Mapping[str, float]:
        return state.measured

    algorithm = FederatedAlgorithm(
        init, configure, client_update, server_update, done, work=work, model=model, report=report
    )
    return pruning.ahead_of(algorithm, server, staging.parts(spec))


def work(task: ClientTask) -> tuple[Work, ...]:
    """Steps of the part that trains, or of the surrogate into which one is mapped."""
    return stage_work(task, taps=_logits(task) if task.phase == MAP else ())


def unused(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings without effect beside the others, and why."""
    maps = ("shrink_share", "map_rounds", "map_steps", "map_lr", "map_momentum", "map_weight_decay")
    rule = ("window", "values", "threshold", "patience", "smoothing", "below")
    found = foresight.unused(settings)
    if not settings["shrink"]:
        found |= dict.fromkeys(maps, "shrink is false: nothing is mapped")
    if settings["freezing"] == "never":
        found |= dict.fromkeys(rule, "freezing is never: no movement is measured")
    return found


def rehearsals(settings: Mapping[str, Any]) -> Sequence[Rehearsal]:
    """A run with a round or more for every phase of 33 parts; more parts are walked in 1,000."""
    short = {"shrink_share": 0.66, "map_rounds": 1, "freezing": "never"}
    short |= foresight.walked(settings)
    return [Rehearsal(short, rounds=100, until=100, steps=1000)]


def client_update(
    task: ClientTask, batches: Batches, engine: Engine, client_state: ClientState
) -> tuple[ClientUpdate, ClientState]:
    """`local_steps` steps on cross-entropy, or of a map on the square between two logits."""
    if task.phase != MAP:
        return train_stage(task, batches, engine), client_state
    student, teacher = _logits(task)
    session, drawn = open_stage(task, batches, engine)
    loss = local_descent(
        session,
        drawn,
        partial(logits_mse, student=student, teacher=teacher),
        taps=(student,),
        steps=int(task.hparams["local_steps"]),
        batch_size=int(task.hparams["batch_size"]),
        seed=task.seed,
    )
    return stage_update(task, batches, session, {"train_loss": loss}, work), client_state


def _logits(task: ClientTask) -> tuple[str, str]:
    """The layers that give the student's and the teacher's."""
    return str(task.hparams["student"]), task.spec.nodes[-1].name


def _stages(spec: ModelSpec, staging: Staging) -> tuple[Stage, ...]:
    own = staging.parts(spec)
    return tuple(_stage(spec, own, number, staging.module_norm) for number in range(len(own)))


def _stage(spec: ModelSpec, parts: Sequence[Part], number: int, norm: bool) -> Stage:
    """With the model's own FC where it has the same shape behind global average pooling."""
    last = spec.nodes[-1]
    source = spec.by_name.get(last.inputs[0])
    if source and source.layer == GlobalAvgPool() and last.layer == Linear(spec.output_shape[0]):
        one, weight = stage(spec, parts, number, fc=last.name, norm=norm), f"{last.name}.weight"
        if one.spec.param_shapes[weight] == spec.param_shapes[weight]:
            return one
    image = len(spec.shapes[parts[number].end]) > 1
    fc = "surrogate_fc" if image else f"surrogate_fc_{parts[number].name}"
    return stage(spec, parts, number, fc=fc, norm=norm)


def _phases(
    stages: Sequence[Stage],
    parts: Sequence[Part],
    rounds: int,
    share: float,
    map_rounds: int,
    shrink: bool,
) -> tuple[Phase, ...]:
    """In their order.  A part that is nothing beside its stand-in is not mapped.

    Raises ValueError where the rounds are too few.
    """
    count = len(stages)
    fewest = (count - 1) * (1 + map_rounds) if shrink else 0
    if rounds < fewest + count:
        remedy = "fewer parts (--set ends=...)" + (", or shrink=false" if shrink else "")
        raise ValueError(
            f"{count} parts need at least {fewest + count} rounds, got {rounds}: give more "
            f"--rounds, {remedy}"
        )
    shrinking = min(max(round(share * rounds), fewest), rounds - count) if shrink else 0
    found = []
    for place, number in enumerate(range(count - 1, 0, -1) if shrink else ()):
        end = deadline(place, count - 1, shrinking)
        mapped, student = _mapped(stages[number], stages[number - 1], parts[number - 1].end)
        within = map_rounds if mapped.module else 0
        found.append(Phase("shrink", stages[number], end - within))
        if mapped.module:
            found.append(Phase(MAP, mapped, end, student))
    for number, one in enumerate(stages):
        found.append(Phase("grow", one, shrinking + deadline(number, count, rounds - shrinking)))
    return tuple(found)


def _mapped(teacher: Stage, before: Stage, at: str) -> tuple[Stage, str]:
    """The teacher's model with the student beside it, the output module after `at`, the end of the
    part before; and the layer that gives the student's logits.

    What the teacher has too the student has under a name of its own, frozen.
    """
    nodes = after(before.spec, at).nodes
    named = {node.name: f"{COPY}{node.name}" for node in nodes if node.name in teacher.spec.by_name}
    branch = [
        replace(
            node,
            name=named.get(node.name, node.name),
            inputs=tuple(named.get(source, source) for source in node.inputs),
        )
        for node in nodes
    ]
    spec = graft(teacher.spec, branch, at=at)
    module = before.module.difference(teacher.spec.tensor_shapes)
    frozen = frozenset(spec.tensor_shapes).difference(module)
    return Stage(teacher.number, teacher.name, spec, frozen, frozenset(), module), branch[-1].name


def _sent(phase: Phase, state: State) -> Model:
    """What clients get; of a map with the student's copies of what the teacher has."""
    held, masks = {**state.params, **state.extra}, state.masks
    copied = {
        name: name.removeprefix(COPY) for name in phase.stage.spec.tensor_shapes if name not in held
    }
    extra = {**state.extra, **{name: held[of] for name, of in copied.items()}}
    own = {name: masks[of] for name, of in copied.items() if of in masks}
    return stage_model(phase.stage, state.params, extra, {**masks, **own})
