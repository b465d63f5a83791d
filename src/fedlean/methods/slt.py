"""SLT: parts are trained and frozen one after the other, before a head that is as narrow as needed.

Pfeiffer, Khalili and Henkel, "Aggregating Capacity in FL through Successive Layer Training for
Computationally-Constrained Devices", NeurIPS 2023; the authors' code is github.com/k1l1/SLT.  At
step t the parts before part t are frozen, part t has all of its channels, and the parts after it,
the head, the first s_t of theirs; part t and the head are trained.  s_t is the largest with which
training takes no more memory than training the whole model at the width `constraint` does.  Before
the first step the whole model is trained at the width s_1.  From the step on at which s_t = 1 all
that is not frozen is trained to the end.

As in the code, the first of these takes s_1 of the rounds, each step a share of the others
proportional to the parameters that it trains, and what is evaluated is the model of the step.

**Deviations.**  A step fills a part of the model (`ends`) where the authors fill one convolution.
Memory is the peak that the native engine plans, optimiser and frozen beginning included; theirs is
a sum of gradients at outputs, values and gradients.  s_t is found in steps of 1/1000, as theirs,
and counts are rounded up to the groups of GroupNorms.  Channels that a head shares with what comes
before it stay whole; the authors' shortcuts drop those that the head lacks.  Norms are those of the
model, frozen ones in evaluation mode; theirs is BatchNorm with the statistics of each batch.  All
devices take the same step; the training depth of stronger devices is not there.  `constraint=0`,
and constraints beyond 0.125, 0.25 and 0.5, are ours, and so is `shares="equal"`.  The first weights
are those of the whole model.  Decay of the learning rate is that of `LocalSGD`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from math import prod
from typing import Any, Literal, NamedTuple, get_args

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
from fedlean.cost.way import peak_memory_bytes
from fedlean.engine.protocol import Engine
from fedlean.freezing.stages import deadline, settled
from fedlean.printable import megabytes
from fedlean.spec import ModelSpec
from fedlean.submodels.cut import Cut, whole
from fedlean.submodels.cut_round import fold_cuts
from fedlean.submodels.narrow import narrow_after
from fedlean.submodels.parts import Part, parts
from fedlean.train.cohort import cohort_tasks
from fedlean.train.hyperparameters import in_range, one_of
from fedlean.train.local_sgd import LocalSGD, train_kept_weights, with_local_sgd
from fedlean.train.rehearsal import Rehearsal
from fedlean.train.start import dense_params
from fedlean.train.work import only_sgd

Shares = Literal["parameters", "equal"]

CONSTRAINTS = (0.125, 0.25, 0.5, 0.75, 0.875)  # that `constraint=0` tries; the authors' end at 0.5
RATES = 1000  # s is one of so many
LONGEST = 40  # rounds of a rehearsal: steps of a model that all are walked


@dataclass(frozen=True)
class State:
    """What survives a round."""

    round: int  # training rounds completed
    phase: str
    params: Params  # of the whole model
    masks: Masks = field(default_factory=dict)  # always empty


class Step(NamedTuple):
    """What clients hold and train for some rounds."""

    name: str  # of the part that is filled; "all" before the first
    rate: float  # s, the share of the head's channels
    cut: Cut
    frozen: frozenset[str]  # parameters and buffers

    @property
    def num_trained(self) -> int:
        shapes = self.cut.spec.param_shapes
        return sum(prod(shape) for name, shape in shapes.items() if name not in self.frozen)


@with_local_sgd
def slt(
    server: Server,
    sgd: LocalSGD,
    *,
    constraint: float = 0.0,
    ends: str = "",
    shares: Shares = "parameters",
) -> FederatedAlgorithm:
    """Successive layer training in the memory that a narrower model takes.

    Args:
      sgd: local SGD, whose settings are this method's as well.
      constraint: in (0, 1]; no step takes more memory than training the whole model at this width
        (paper: 0.125, 0.25 and 0.5); 1: FedAvg.  0: the smallest of 0.125, 0.25, 0.5, 0.75 and
        0.875 in which all steps have room, else the least memory in which they have.
      ends: blocks or layers after which the model is divided, as "stage1 stage3"; "" is after its
        own blocks.
      shares: of the rounds.  "parameters": of a step by what it trains, as published.  "equal".

    Raises ValueError naming the hyper-parameter that is out of range, for a model that cannot be
    divided, where a step has no room, with what it needs, and where one would have no round.
    """
    in_range("constraint", constraint, 0.0, 1.0)
    one_of("shares", shares, get_args(Shares))
    steps = _steps(server.spec, parts(server.spec, ends), sgd.work, constraint)
    ending = _endings(steps, server.rounds, shares)
    _check_endings(steps, ending, server.rounds)

    def step(round: int) -> Step:
        """That of a round, counted from 1."""
        at = next((at for at, last in enumerate(ending) if round <= last), len(steps) - 1)
        return steps[at]

    def init(model: Model) -> State:
        return State(0, "train", dense_params(model))

    def configure(state: State, devices: Sequence[Device]) -> list[ClientTask]:
        round = state.round + 1
        now = step(round)
        hparams = {**sgd.hparams(state.round), "stage": now.name, "width": now.rate}
        return cohort_tasks(
            server,
            sgd.clients(server, devices, round),
            round=round,
            phase=state.phase,
            model=Model(now.cut.spec, now.cut.take(state.params)),
            hparams=hparams,
            frozen=now.frozen,
        )

    def server_update(state: State, updates: Iterable[ClientUpdate]) -> State:
        now = step(state.round + 1)
        merged = fold_cuts(server.spec, state.params, updates, lambda task: now.cut)
        return replace(state, round=state.round + 1, params=settled(state.params, merged))

    def done(state: State) -> bool:
        return state.round >= server.rounds

    def model(state: State) -> Model:
        cut = step(max(1, state.round)).cut
        return Model(cut.spec, cut.take(state.params))

    def report(state: State) -> dict[str, float]:
        return {"head_width": step(max(1, state.round)).rate}

    return FederatedAlgorithm(
        init, configure, client_update, server_update, done, work=only_sgd, model=model,
        report=report,
    )  # fmt: skip


def rehearsals(settings: Mapping[str, Any]) -> Sequence[Rehearsal]:
    """A run in which every step has a round or more."""
    return [Rehearsal({"shares": "equal"}, rounds=LONGEST, until=LONGEST)]


def client_update(
    task: ClientTask, batches: Batches, engine: Engine, client_state: ClientState
) -> tuple[ClientUpdate, ClientState]:
    """w_n <- w - η·g for `local_steps` steps of what is not frozen."""
    return train_kept_weights(task, batches, engine), client_state


def _endings(steps: Sequence[Step], rounds: int, shares: Shares) -> list[int]:
    """The last round of each step.

    The first takes int(s_1 R) rounds, and step t int((R - s_1 R) Σ_{i<=t} n_i / Σ n) and those, n_i
    being the parameters that step i trains.
    """
    if shares == "equal":
        return [deadline(at, len(steps), rounds) for at in range(len(steps))]
    before = int(steps[0].rate * rounds)
    sums = list(accumulate(step.num_trained for step in steps[1:]))
    return [before, *(before + (rounds - before) * one // sums[-1] for one in sums)]


def _check_endings(steps: Sequence[Step], ending: Sequence[int], rounds: int) -> None:
    """Raises ValueError naming a step without a round: its part would be frozen as it began.

    Where the first step is the whole model, no other is needed.
    """
    begins = [0, *ending]
    skipped = [
        step.name for step, begin, end in zip(steps, begins, ending, strict=False) if begin >= end
    ]
    if skipped and steps[0].rate < 1.0:
        raise ValueError(
            f"{len(steps)} steps share {rounds} rounds, and {skipped[0]!r} has none: take more "
            f"rounds, shares=equal with {len(steps)} rounds or more, or divide the model into "
            "fewer parts with ends"
        )


def _steps(spec: ModelSpec, own: Sequence[Part], work: Work, constraint: float) -> tuple[Step, ...]:
    """What is trained one after the other.  Raises ValueError where a step has no room."""

    def needs(number: int, rate: int) -> int:
        cut = _cut(spec, own, number, rate / RATES)
        return peak_memory_bytes(cut.spec, [work], frozen=_frozen(own, number))

    numbers = range(len(own))
    least = {number: needs(number, 1) for number in numbers}
    room = _room(spec, own, work, constraint, least)
    steps, most = [], RATES
    # from the last part backwards, so that s_t <= s_{t+1}, as the authors' search has it
    for number in reversed(numbers):
        most = _largest(lambda rate, number=number: needs(number, rate) <= room, most)
        cut = _cut(spec, own, number, most / RATES)
        rate = 1.0 if cut.spec.hash == spec.hash else most / RATES
        steps.append(Step(own[number].name, rate, cut, _frozen(own, number)))
    steps.reverse()
    full = next(at for at, step in enumerate(steps) if step.rate == 1.0)
    first = _cut(spec, own, -1, steps[0].rate)
    return (Step("all", steps[0].rate, first, frozenset()), *steps[: full + 1])


def _room(
    spec: ModelSpec,
    own: Sequence[Part],
    work: Work,
    constraint: float,
    least: Mapping[int, int],
) -> int:
    """Bytes that a step may take; `least` is what each takes with the narrowest head."""
    neediest = max(least, key=least.__getitem__)
    needed = least[neediest]
    for one in (constraint,) if constraint else CONSTRAINTS:
        room = peak_memory_bytes(_cut(spec, own, -1, one).spec, [work])
        if room >= needed:
            return room
        if constraint:
            raise ValueError(
                f"training part {own[neediest].name!r} takes {megabytes(needed)} with the "
                f"narrowest head, and the whole model at the width {one:g} takes "
                f"{megabytes(room)}: take a larger constraint, 0 for the smallest in which all "
                "steps have room, or divide the model after more layers with --set ends"
            )
    return needed


def _largest(has_room: Callable[[int], bool], most: int) -> int:
    """The largest rate up to `most` that has room, as 1 has, by halving."""
    if has_room(most):
        return most
    low, high = 1, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if has_room(middle) else (low, middle)
    return low


def _frozen(own: Sequence[Part], number: int) -> frozenset[str]:
    return frozenset[str]().union(*(part.tensors for part in own[:number]))


def _cut(spec: ModelSpec, own: Sequence[Part], number: int, rate: float) -> Cut:
    """With all channels up to part `number` (-1: of none), after it `rate` of them."""
    full = [name for part in own[: number + 1] for name in part.layers]
    return whole(spec) if rate == 1 else narrow_after(spec, full, rate)
