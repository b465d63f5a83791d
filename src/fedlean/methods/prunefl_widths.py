"""PruneFL's masks on slices by width: each device trains what it can hold of one pruned model.

OURS: we know of no publication.  From HeteroFL (Diao, Ding and Tarokh, ICLR 2021, arXiv 2010.01264,
Section 3) it has who holds which channels and the mean of an element over those who hold it; from
PruneFL (Jiang et al., TNNLS 2022, arXiv 1909.12326, eq. (2), (6) and (7), Algorithms 2 and 3) which
weights of them are there.

One mask of the whole model is restricted to each width, so that all devices of a width train one
pattern.  In the round before a reconfiguration each device sums g² over its slice, the sums are
gathered into the shapes of the whole model, and PruneFL's rule moves the one mask.

**What is decided in going together**:
- What a device can hold is planned with the masks and with the round's g², so that devices hold
  wider slices of a sparser model, and may hold narrower ones in a round that takes g².
- Σ g² of a coordinate is the mean over those who hold it, weighted by examples, as its value is:
  the outer channels, which few devices train, count no less than the inner ones.
- A coordinate that nobody held in that round has no sum: it keeps value and mask.
- T(M) is that of the whole model on the server's profile.
- A client that keeps sums between rounds (`importance_rounds`) drops them when its width changes.
- The first masks are the server's, without data, or all weights.  PruneFL's initial pruning and
  SNIP's gradient need devices that hold the whole model, which none here has to.
- BatchNorm is refused: its running statistics differ between widths and masks alike.
The other deviations are those of `heterofl` and `prunefl`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

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
    Work,
)
from fedlean.engine.protocol import Engine
from fedlean.pruning import importance_round
from fedlean.pruning.density import full_masks
from fedlean.pruning.further_pruning import FurtherPruning, Reconfigurations, unused_further
from fedlean.pruning.importance_round import IMPORTANCE
from fedlean.pruning.initial_settings import InitialPruning, walked_density
from fedlean.submodels.cut import whole
from fedlean.submodels.cut_round import Given, cut_tasks, fold_cuts
from fedlean.submodels.levels import Assign, assigned, rates_from
from fedlean.submodels.needs import Needs
from fedlean.submodels.width import width
from fedlean.train.cohort import devices_of
from fedlean.train.hyperparameters import one_of
from fedlean.train.local_sgd import LocalSGD, with_settings
from fedlean.train.rehearsal import Rehearsal
from fedlean.tree import kept_counts

Initial = Literal["all", "synflow", "ntk"]


@dataclass(frozen=True)
class State:
    """What survives a round."""

    round: int  # training rounds completed
    phase: str  # "prune", a step of the server alone, then "train"
    params: Params  # of the whole model
    masks: Masks = field(default_factory=dict)  # of the whole model; empty until it is pruned
    reconfigurations: int = 0  # names the span over which g² accumulates


@with_settings(LocalSGD, FurtherPruning)
def prunefl_widths(
    server: Server,
    sgd: LocalSGD,
    further: FurtherPruning,
    *,
    widths: str = "1 0.5 0.25",
    assign: Assign = "memory",
    scaler: bool = True,
    initial: Initial = "synflow",
    initial_density: float | None = None,
    initial_rescale: bool = False,
) -> FederatedAlgorithm:
    """Adaptive pruning of one model whose slices by width are trained.

    Args:
      sgd, further: local SGD and further pruning, whose settings are this method's as well.
      widths: shares of every layer's channels, from the largest to the smallest.
      assign: which slice a device gets.  "memory": the largest that it can hold in this round, the
        first where its memory is not known.  "fixed": client i, level i modulo their number.
        "drawn": any level, anew each round.
      scaler: a slice multiplies what its layers give by 1/width in training.
      initial: which weights the run begins with.  "all", or what the server keeps of the whole
        model by "synflow" or "ntk" (`pruning.foresight`).
      initial_density: of those masks, of all prunable weights together; None: what the size limit
        allows, 0.1 without one.
      initial_rescale: what they keep grows by 1/√(the kept share of its layer).

    Raises ValueError naming the hyper-parameter that is out of range, or the layer that cannot be
    sliced.
    """
    _check_initial(initial)
    one_of("assign", assign, get_args(Assign))
    spec, rates = server.spec, rates_from(widths)
    if spec.variances:
        norm = next(iter(spec.variances)).removesuffix(".running_var")
        raise ValueError(
            f"layer {norm!r} is a BatchNorm, whose running statistics differ between widths: take "
            "a model with GroupNorm"
        )
    cuts = {
        str(rate): whole(spec) if rate == 1 else width(spec, rate, scaler=scaler) for rate in rates
    }
    moves = Reconfigurations(server, sgd, further)
    first = InitialPruning(initial != "all", _criterion(initial), initial_density, initial_rescale)
    first.check(server)
    first_density = first.density(server, moves.size.density(0))

    def init(model: Model) -> State:
        if model.masks:
            return State(0, "train", model.params, {**full_masks(spec), **model.masks})
        if first.by_criterion:
            return State(0, "prune", model.params)
        return State(0, "train", model.params, full_masks(spec))

    def needs(masks: Masks, takes_importance: bool) -> list[Needs]:
        """Of a round on each of the slices; the bytes of g² are not in it."""
        steps = sgd.local_steps if takes_importance else 0
        found = []
        for cut in cuts.values():
            taken = cut.take_masks(masks)
            work = replace(sgd.work, kept=kept_counts(taken), importance_steps=steps)
            found.append(Needs(cut.spec, (work,), taken))
        return found

    def configure(state: State, devices: Sequence[Device]) -> list[ClientTask]:
        if state.phase == "prune":
            return []
        round, names, given = state.round + 1, list(cuts), []
        levels = needs(state.masks, moves.rounds.takes_importance(round))
        for device in devices_of(devices, sgd.clients(server, devices, round)):
            at = assigned(
                assign, levels, device, profile=server.profile, seed=server.seed, round=round
            )
            name = names[at]
            given.append(Given(device.id, cuts[name], {"width": name}))
        return cut_tasks(
            server,
            given,
            round=round,
            phase="train",
            model=Model(spec, state.params, state.masks),
            hparams=sgd.hparams(state.round) | moves.hparams(round, state.reconfigurations),
        )

    def server_update(state: State, updates: Iterable[ClientUpdate]) -> State:
        if state.phase == "prune":
            masks = first.masks(server, state.params, first_density)
            return replace(
                state, phase="train", params=first.pruned(state.params, masks), masks=masks
            )
        merged = fold_cuts(
            spec, state.params, updates, lambda task: cuts[str(task.hparams["width"])]
        )
        round = state.round + 1
        state = replace(state, round=round, params=merged.params())
        if not moves.rounds.reconfigures(round):
            return state
        after = moves.after(
            round,
            state.params,
            state.masks,
            merged.statistic(IMPORTANCE),
            known=merged.sent(IMPORTANCE),
        )
        if after is None:
            return state
        params, masks = after
        reconfigurations = state.reconfigurations + 1
        return replace(state, params=params, masks=masks, reconfigurations=reconfigurations)

    def done(state: State) -> bool:
        return state.phase == "train" and state.round >= server.rounds

    return FederatedAlgorithm(init, configure, client_update, server_update, done, statistics, work)


def unused(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings without effect beside the others, and why."""
    rates, initial = rates_from(settings["widths"]), settings["initial"]
    once = "nothing is pruned" if initial == "all" else "reconfigure_every is 0: no mask moves"
    found = unused_further(settings, once)
    if initial == "all":
        found |= dict.fromkeys(("initial_density", "initial_rescale"), "initial is 'all'")
    if len(rates) == 1:
        found["assign"] = "widths names one width"
    if rates == (1.0,):
        found["scaler"] = "widths is 1 alone"
    return found


def rehearsals(settings: Mapping[str, Any]) -> Sequence[Rehearsal]:
    """The shortest run in which clients do all that they do in a long one.

    It ends before a reconfiguration, whose masks depend on the data.
    """
    every, limit = min(settings["reconfigure_every"], 3), settings["size_limit"]
    until = every or 3
    train = Rehearsal(
        {"initial": "all", "reconfigure_every": every},
        rounds=until + 1,
        until=until,
        bound=bool(every) and limit is None,
    )
    if settings["initial"] != "all":
        return [replace(train, density=walked_density(settings))]
    return [train] if limit is None else [train, replace(train, density=limit)]


def statistics(task: ClientTask) -> dict[str, StatisticForm]:
    """Σ g² of every trainable coordinate of the slice, where a task asks for it."""
    return importance_round.forms(task)


def work(task: ClientTask) -> tuple[Work, ...]:
    """Of a round on the slice."""
    return importance_round.work(task)


def client_update(
    task: ClientTask, batches: Batches, engine: Engine, client_state: ClientState
) -> tuple[ClientUpdate, ClientState]:
    """Eq. (2) on the slice under its masks; g² of eq. (6) accumulates where the task says so."""
    return importance_round.answer(task, batches, engine, client_state)


def _check_initial(initial: str) -> None:
    if initial in ("client", "snip"):
        raise ValueError(
            f"initial={initial!r} needs devices that hold the whole model: take 'synflow', 'ntk' "
            "or 'all', or start from the model of a prunefl run"
        )
    one_of("initial", initial, get_args(Initial))


def _criterion(initial: Initial) -> Literal["synflow", "ntk"]:
    return "ntk" if initial == "ntk" else "synflow"
