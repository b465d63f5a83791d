"""SmartFreeze: the model trains part by part, each frozen once it has settled.

"SmartFreeze", IWQoS 2024, arXiv 2408.09101.  The first part trains with an output module in place
of the rest; when the pace controller says that it has settled it is frozen, its module is dropped,
and the next part trains behind it.  Of the paper only the outline is known here: no code was
released, and neither the values of its thresholds nor the formula of its selector.

- Pace controller: the block perturbation P_b(r) = Σ_s |Σ_{i<H} Δ_s^{r-i}| / Σ_s Σ_{i<H} |Δ_s^{r-i}|
  over the part's last H merged updates is smoothed; the part is frozen once the slope of the line
  through the last W values stays small (`freezing.rules.slope_of_movement`).
- Participant selector: devices that have the memory for the stage, in communities of similar
  updates of the output module; in each of them by Oort's utility (`freezing.selection`).

**Deviations.**  Values of H, W, the threshold and the patience are ours, as are the scale on which
a random walk has 1 and the P_b to which a part must have come down; P_b is taken over at most
10,000 scalars of a part.  A part is frozen at the latest when its equal share of the rounds is
over, and the last one trains to the end (both ours).  The output module is that of ProFL's and
NeuLite's authors.  Communities are Louvain's instead of "RL-CD", of which no more than the name is
known; what else the selector does on its own is said in `freezing.selection`.  A client reports
the mean of the squares of its batches' losses: a batch's mean loss stands for that of each of its
examples (ours).  The last stage has no output module: the updates of the model's last layer with
weights stand for it (ours).  What is known of clients is of the present stage and begins anew with
each (ours).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np

from fedlean.algorithm import Device, FederatedAlgorithm, Server, profile_of
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
from fedlean.cost.price import cost
from fedlean.cost.profile import Profile
from fedlean.cost.time import VALUE_BYTES, link_seconds
from fedlean.engine.protocol import Engine
from fedlean.freezing import foresight, selection
from fedlean.freezing.client import open_stage, stage_update, stage_work
from fedlean.freezing.eligible import Eligibility, without_values
from fedlean.freezing.foresight import Foresight
from fedlean.freezing.rules import RuleState, never, scalars, slope_of_movement
from fedlean.freezing.stages import (
    Stage,
    check_rounds,
    deadline,
    merge_stage,
    module_params,
    stage_model,
)
from fedlean.freezing.staging import Staging, stage_tasks
from fedlean.spec import ModelSpec
from fedlean.train.cohort import devices_of
from fedlean.train.hyperparameters import in_range
from fedlean.train.local_sgd import LocalSGD, with_settings
from fedlean.train.rehearsal import Rehearsal
from fedlean.tree import kept_counts, pack

SQUARED_LOSS = "squared_loss"  # what a client says of its losses
OF_THE_PACE = ("window", "smoothing", "values", "threshold", "patience", "below")
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
    pace: RuleState  # of the part that trains
    known: selection.Known  # of the clients heard from in this stage
    measured: Mapping[str, float] = field(default_factory=dict)  # in the last round
    masks: Masks = field(default_factory=dict)  # of the whole model; empty: dense


@with_settings(LocalSGD, Staging, Foresight)
def smartfreeze(
    server: Server,
    sgd: LocalSGD,
    staging: Staging,
    pruning: Foresight,
    *,
    schedule: bool = True,
    pace: bool = True,
    window: int = 10,
    smoothing: float = 0.5,
    values: int = 5,
    threshold: float = 0.05,
    patience: int = 3,
    below: float = 1.25,
    select: bool = True,
    straggler_penalty: float = 2.0,
) -> FederatedAlgorithm:
    """Federated averaging of one part of the model after the other.

    Args:
      sgd, staging, pruning: local SGD, how the model is divided, and what is pruned before the
        first stage; their settings are this method's as well.  A cohort is drawn from the devices
        that have the memory for the stage.
      schedule: whether there are stages; otherwise the whole model trains in all rounds.
      pace: whether a part may be frozen before its equal share of the rounds is over.
      window, smoothing, values, threshold, patience: of the pace controller, H, the share of the
        smoothed value that stays, W, φ and n (`freezing.rules.slope_of_movement`).
      below: what the smoothed P_b must have come down to before a part may be frozen, in floors
        1/√H of a random walk (ours): at first every part goes straight on, which is level, too.
      select: whether a cohort is drawn by communities and utility; otherwise uniformly.
      straggler_penalty: α of Oort's utility; 0: slow devices are as likely as others.

    Raises ValueError naming the setting that is out of range, for fewer rounds than stages, and
    where communities are asked for and networkx is not installed.
    """
    in_range("straggler_penalty", straggler_penalty, 0.0, 100.0)
    settling = slope_of_movement(
        window=window,
        smoothing=smoothing,
        values=values,
        threshold=threshold,
        patience=patience,
        below=below,
    )
    rule = settling if pace else never()
    choosing = select and sgd.cohort is not None
    eligible = Eligibility(stage_work, server.profile)
    if choosing:
        selection.check_louvain()
    spec = server.spec
    stages = staging.stages(spec) if schedule else (_whole(spec),)
    check_rounds(len(stages), server.rounds)

    def held(one: Stage, params: Params, masks: Masks) -> np.ndarray:
        """The scalars whose movement is measured; nobody looks at them without `pace`."""
        if not pace:
            return np.zeros(0, np.float32)
        return scalars(params, one.own_params, seed=server.seed, masks=masks)

    def begin(state: State, number: int) -> State:
        """The state at the start of a stage."""
        one = stages[number]
        seed = derive_seed(server.seed, 0, number, "output module")
        return replace(
            state,
            stage=number,
            over=False,
            extra=module_params(one, seed, server.init),
            pace=rule.init(held(one, state.params, state.masks)),
            known=selection.nobody(),
        )

    def init(model: Model) -> State:
        return begin(State(0, "train", model.params, 0, False, {}, {}, {}, masks=model.masks), 0)

    def present(state: State) -> State:
        return begin(state, state.stage + 1) if state.over else state

    def configure(state: State, devices: Sequence[Device]) -> list[ClientTask]:
        state, round = present(state), state.round + 1
        one, hparams = stages[state.stage], sgd.hparams(state.round)
        sent = stage_model(one, state.params, state.extra, state.masks)
        there = eligible(staging, devices, state.phase, one, hparams, sent.masks)
        if choosing and sgd.cohort is not None:
            seconds = _Seconds(
                server.profile,
                lambda device: without_values(
                    staging, device, state.phase, one, hparams, sent.masks
                ),
            )
            chosen = selection.choose(
                there,
                sgd.cohort,
                state.known,
                map(seconds, there),
                penalty=straggler_penalty,
                seed=server.seed,
                round=round,
            )
        else:
            chosen = sgd.clients(server, there, round)
        return stage_tasks(
            server,
            staging,
            devices_of(there, chosen),
            round=round,
            phase=state.phase,
            one=one,
            model=sent,
            hparams=hparams,
        )

    def server_update(state: State, updates: Iterable[ClientUpdate]) -> State:
        state = present(state)
        one, heard = stages[state.stage], dict[int, selection.Heard]()
        if choosing:
            sent = stage_model(one, state.params, state.extra, state.masks)
            updates = _listening(one, sent, updates, server.seed, heard)
        params, extra = merge_stage(spec, state.params, state.extra, updates)
        paced, round = rule.update(state.pace, held(one, params, state.masks)), state.round + 1
        more = state.stage < len(stages) - 1
        froze = more and bool(paced["frozen"])
        known = selection.remember(state.known, heard, server.seed)
        measured = {**paced["measured"], "frozen": float(froze)}
        if choosing:
            measured["communities"] = float(len(set(known["communities"].tolist())))
        return replace(
            state,
            round=round,
            params=params,
            over=froze or (more and round >= deadline(state.stage, len(stages), server.rounds)),
            extra=extra,
            pace=paced,
            known=known,
            measured=measured,
        )

    def done(state: State) -> bool:
        return state.round >= server.rounds

    def model(state: State) -> Model:
        return stage_model(stages[state.stage], state.params, state.extra, state.masks)

    def report(state: State) -> Mapping[str, float]:
        return state.measured

    algorithm = FederatedAlgorithm(
        init,
        configure,
        client_update,
        server_update,
        done,
        work=stage_work,
        model=model,
        report=report,
    )
    return pruning.ahead_of(algorithm, server, staging.parts(spec) if schedule else ())


def _whole(spec: ModelSpec) -> Stage:
    """The only stage where there are no stages."""
    every = frozenset(spec.tensor_shapes)
    return Stage(0, "whole", spec, frozenset(), every, frozenset())


class _Seconds:
    """Of a round of the stage on each device; what is alike is priced once."""

    def __init__(self, fallback: Profile, priced: Callable[[Device], ClientTask]) -> None:
        self._fallback, self._priced = fallback, priced
        self._known: dict[Any, float] = {}

    def __call__(self, device: Device) -> float:
        """With what trains going down and up."""
        task = self._priced(device)
        kept = kept_counts(task.sub_model.masks)
        profile = device.profile or self._fallback
        if kept:  # memory decides in which form a layer is held
            profile = profile_of(device, self._fallback)
        key = (*task.hparams.items(), *_rates(profile))
        if key not in self._known:
            shapes = task.spec.tensor_shapes
            trained = shapes.keys() - task.sub_model.frozen
            sent = VALUE_BYTES * sum(kept.get(name, prod(shapes[name])) for name in trained)
            computing = cost(task, stage_work(task), profile).seconds
            self._known[key] = computing + link_seconds(sent, sent, profile)
        return self._known[key]


def _rates(profile: Profile) -> tuple[Any, ...]:
    """What seconds depend on; measured times by the object."""
    rates = (value for value in vars(profile).values() if isinstance(value, float | int))
    return id(profile.measured), *rates


def _listening(
    one: Stage,
    sent: Model,
    updates: Iterable[ClientUpdate],
    seed: int,
    heard: dict[int, selection.Heard],
) -> Iterator[ClientUpdate]:
    """The updates, of which `heard` keeps what the selector remembers as they pass."""
    read = one.module or _last_layer(one.spec)
    for update in updates:
        loss = update.metrics.get(SQUARED_LOSS, -1.0)
        if loss >= 0.0:  # what an honest client says
            got = {name: update.params[name] for name in read.intersection(update.params)}
            before = pack({name: sent.params[name] for name in got}, sent.masks)
            moves = {name: value - before[name] for name, value in pack(got, sent.masks).items()}
            sketch = selection.sketch(moves, seed)
            heard[update.client] = selection.Heard(sketch, update.num_examples, loss)
        yield update


def _last_layer(spec: ModelSpec) -> frozenset[str]:
    name = spec.weighted[-1].name
    return frozenset(tensor for tensor in spec.param_shapes if tensor.rsplit(".", 1)[0] == name)


def unused(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings without effect beside the others, and why."""
    found = foresight.unused(settings)
    if not settings["schedule"]:
        found |= dict.fromkeys(("pace", "ends", "module_norm"), "schedule is false")
        found |= dict.fromkeys(("beginning", "micro_batch"), "nothing is frozen")
    if not settings["schedule"] or not settings["pace"]:
        why = "pace is false" if settings["schedule"] else "schedule is false"
        found |= dict.fromkeys(OF_THE_PACE, why)
    if settings["cohort"] is None:
        found["select"] = "there is no cohort to draw: all who can hold the stage take part"
    if settings["cohort"] is None or not settings["select"]:
        found["straggler_penalty"] = "no cohort is drawn by utility"
    return found


def rehearsals(settings: Mapping[str, Any]) -> Sequence[Rehearsal]:
    """Each stage takes a round or more of the run that is walked through."""
    pruned = foresight.walked(settings)
    if not settings["schedule"]:
        return [Rehearsal(pruned)]
    return [Rehearsal({**pruned, "pace": False}, rounds=LONGEST, until=LONGEST)]


def client_update(
    task: ClientTask, batches: Batches, engine: Engine, client_state: ClientState
) -> tuple[ClientUpdate, ClientState]:
    """`local_steps` steps of the part and its output module, behind what is frozen."""
    h = task.hparams
    session, drawn = open_stage(task, batches, engine)
    steps, total, squares = int(h["local_steps"]), 0.0, 0.0
    for x, y in drawn.draw(steps=steps, batch_size=int(h["batch_size"]), seed=task.seed):
        loss = session.step(x, y)
        total, squares = total + loss, squares + loss * loss
    metrics = {"train_loss": total / steps, SQUARED_LOSS: squares / steps}
    return stage_update(task, batches, session, metrics, stage_work), client_state
