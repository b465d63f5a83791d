"""Rounds in which each device trains a slice of one model by width, whichever channels those are.

The server half of HeteroFL, FedRolex, Federated Dropout and FjORD, which differ in the channels,
and in what a client does with its slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from fedlean.algorithm import Device, FederatedAlgorithm, Server
from fedlean.core import Batches, ClientTask, ClientUpdate, Masks, Model, Params, Scalar, Work
from fedlean.engine.protocol import Engine
from fedlean.spec import ModelSpec
from fedlean.submodels.cut import Cut, whole
from fedlean.submodels.cut_round import Given, cut_tasks, fold_cuts
from fedlean.submodels.levels import Assign, levels, rates_from
from fedlean.submodels.static_norm import calibrated, check_norms
from fedlean.train.cohort import devices_of
from fedlean.train.hyperparameters import one_of
from fedlean.train.local_sgd import LocalSGD, train_kept_weights
from fedlean.train.start import dense_params
from fedlean.train.work import only_sgd

CutOf = Callable[[float, int, int], Cut]  # of a rate below 1, a round and a client


@dataclass(frozen=True)
class State:
    """What survives a round."""

    round: int  # training rounds completed
    phase: str
    params: Params  # of the whole model
    masks: Masks = field(default_factory=dict)  # always empty


@dataclass(frozen=True)
class Slices:
    """The settings of slices by width, by the same names in every method.

    widths: shares of every layer's channels that devices may get, from the largest to the smallest.
    assign: which of them a device gets.  "memory": the largest within its memory and its budgets
    of a round, the first where none is known.  "fixed": client i, width i modulo their number.
    "drawn": any of them, anew each round.
    static_norm: the server finds the running statistics of BatchNorm after each round, on inputs of
    its own; without it a model with BatchNorm is refused.
    """

    widths: str = "1 0.5 0.25"
    assign: Assign = "memory"
    static_norm: bool = False

    def check(self, server: Server) -> None:
        """Raises ValueError naming what is out of range, or does not fit the model."""
        one_of("assign", self.assign, get_args(Assign))
        rates_from(self.widths)
        check_norms(server, self.static_norm)


def sliced(
    server: Server,
    sgd: LocalSGD,
    slices: Slices,
    cut_of: CutOf,
    client_update: Callable[..., Any],
    *,
    work: Callable[[ClientTask], tuple[Work, ...]] = only_sgd,
    most: Callable[[ModelSpec, int], Sequence[Work]] | None = None,
    told: Callable[[int], Mapping[str, Scalar]] = lambda at: {},
) -> FederatedAlgorithm:
    """Federated averaging of slices: each element is the mean over the clients that have it, and
    one that no client has keeps its value.

    cut_of: the slice, from what a task says; the map back to the whole model never travels.  Its
    size follows from the rate alone.
    work: what a task takes.  most: the same of the widths' number `at`, before there is a task; the
    most that it may be; None: local SGD.  told: what a task of that one says beside its width.

    Raises ValueError naming the layer that cannot be sliced.
    """
    spec, rates = server.spec, rates_from(slices.widths)
    full = whole(spec)

    def cut(rate: float, round: int, client: int) -> Cut:
        return full if rate == 1 else cut_of(rate, round, client)

    found = [(str(rate), cut(rate, 1, 0)) for rate in rates]
    takes = most or (lambda spec, at: [sgd.work])
    choice = levels(
        [(name, one, takes(one.spec, at)) for at, (name, one) in enumerate(found)], server.profile
    )

    def init(model: Model) -> State:
        return State(0, "train", dense_params(model))

    def given(device: Device, round: int) -> Given:
        at = choice.given(slices.assign, device, seed=server.seed, round=round)
        own = {"width": choice.names[at], **told(at)}
        return Given(device.id, cut(rates[at], round, device.id), own)

    def configure(state: State, devices: Sequence[Device]) -> list[ClientTask]:
        round = state.round + 1
        cohort = devices_of(devices, sgd.clients(server, devices, round))
        return cut_tasks(
            server,
            [given(device, round) for device in cohort],
            round=round,
            phase=state.phase,
            model=Model(spec, state.params),
            hparams=sgd.hparams(state.round),
        )

    def cut_again(task: ClientTask) -> Cut:
        return cut(rates[choice.names.index(str(task.hparams["width"]))], task.round, task.client)

    def server_update(state: State, updates: Iterable[ClientUpdate]) -> State:
        merged = fold_cuts(spec, state.params, updates, cut_again)
        params = calibrated(server, slices.static_norm, merged, merged.params())
        return replace(state, round=state.round + 1, params=params)

    def done(state: State) -> bool:
        return state.round >= server.rounds

    return FederatedAlgorithm(init, configure, client_update, server_update, done, work=work)


def train_slice(task: ClientTask, batches: Batches, engine: Engine) -> ClientUpdate:
    """w_n <- w - η·g for `local_steps` steps on the slice."""
    return without_statistics(task, train_kept_weights(task, batches, engine))


def without_statistics(task: ClientTask, update: ClientUpdate) -> ClientUpdate:
    """Running statistics go back as they came: no mean of slices of several widths would be that
    of the model, and the server finds its own (`static_norm`).
    """
    given = {name: task.params[name] for name in task.spec.buffer_shapes}
    return replace(update, params={**update.params, **given})


def without_effect(settings: Mapping[str, Any], *of_narrower: str) -> dict[str, str]:
    """Settings without effect beside the others, and why; of_narrower: those of narrower slices."""
    rates, out = rates_from(settings["widths"]), {}
    if len(rates) == 1:
        out["assign"] = "widths names one width"
    if rates == (1.0,):
        out |= dict.fromkeys(of_narrower, "widths is 1 alone")
    return out
