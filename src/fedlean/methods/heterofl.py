"""HeteroFL: each device trains the slice by width that it can hold, cut from one shared model.

Diao, Ding and Tarokh, "HeteroFL: Computation and Communication Efficient Federated Learning for
Heterogeneous Clients", ICLR 2021, arXiv 2010.01264, Section 3.  A device of level p holds the first
r^(p-1)·C of each layer's C channels; the server averages each element over the devices that hold
it.

**Deviations.**  Means are weighted by examples; the paper counts devices.  An element that nobody
held keeps its value.  Channels are rounded up.  The paper gives out levels by hand: here the memory
of the device decides, `assign` gives the paper's two ways.  Our models have GroupNorm unless told
otherwise.  The paper's BatchNorm has no running statistics while it trains, and the clients find
them once in the end; with `static_norm` the server finds them after each round, on inputs of its
own.  The masked cross-entropy for clients that lack classes is not there.
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
    generator,
)
from fedlean.engine.protocol import Engine
from fedlean.submodels.cut import whole
from fedlean.submodels.cut_round import Given, cut_tasks, fold_cuts
from fedlean.submodels.levels import levels, rates_from
from fedlean.submodels.static_norm import calibrated, check_norms
from fedlean.submodels.width import width
from fedlean.train.local_sgd import LocalSGD, train_kept_weights, with_local_sgd
from fedlean.train.start import dense_params
from fedlean.train.work import only_sgd

Assign = Literal["memory", "fixed", "drawn"]


@dataclass(frozen=True)
class State:
    """What survives a round."""

    round: int  # training rounds completed
    phase: str
    params: Params  # of the whole model
    masks: Masks = field(default_factory=dict)  # always empty


@with_local_sgd
def heterofl(
    server: Server,
    sgd: LocalSGD,
    *,
    widths: str = "1 0.5 0.25",
    assign: Assign = "memory",
    scaler: bool = True,
    static_norm: bool = False,
) -> FederatedAlgorithm:
    """Federated averaging of slices of one model.

    Args:
      sgd: local SGD, whose settings are this method's as well.
      widths: r^(p-1), shares of every layer's channels, from the largest to the smallest (paper: 1,
        1/2, 1/4, 1/8 and 1/16).
      assign: which slice a device gets.  "memory": the largest that it can hold, the first where
        its memory is not known.  "fixed": client i, level i modulo their number.  "drawn": any
        level, anew each round.  The last two are the paper's fixed and dynamic assignment.
      scaler: a slice multiplies what its layers give by 1/width in training.
      static_norm: the server finds the running statistics of BatchNorm after each round, on inputs
        of its own; without it a model with BatchNorm is refused.

    Raises ValueError naming the hyper-parameter that is out of range, the layer that cannot be
    sliced, or what `static_norm` lacks.
    """
    if assign not in get_args(Assign):
        raise ValueError(f"assign must be one of {', '.join(get_args(Assign))}, got {assign!r}")
    spec, rates = server.spec, rates_from(widths)
    check_norms(server, static_norm)
    cuts = [whole(spec) if rate == 1 else width(spec, rate, scaler=scaler) for rate in rates]
    choice = levels(
        [(str(rate), cut, sgd.work) for rate, cut in zip(rates, cuts, strict=True)], server.profile
    )

    def level(device: Device, round: int) -> int:
        if assign == "memory":
            return choice.fitting(device)
        if assign == "fixed":
            return device.id % len(rates)
        return int(generator(server.seed, round, device.id, "level").integers(len(rates)))

    def init(model: Model) -> State:
        return State(0, "train", dense_params(model))

    def configure(state: State, devices: Sequence[Device]) -> list[ClientTask]:
        round, by_id = state.round + 1, {device.id: device for device in devices}
        chosen = {c: level(by_id[c], round) for c in sgd.clients(server, devices, round)}
        return cut_tasks(
            server,
            [Given(c, choice.cuts[at], {"width": choice.names[at]}) for c, at in chosen.items()],
            round=round,
            phase=state.phase,
            model=Model(spec, state.params),
            hparams=sgd.hparams(state.round),
        )

    def server_update(state: State, updates: Iterable[ClientUpdate]) -> State:
        merged = fold_cuts(
            spec, state.params, updates, lambda task: choice.cut(str(task.hparams["width"]))
        )
        params = calibrated(server, static_norm, merged, merged.params())
        return replace(state, round=state.round + 1, params=params)

    def done(state: State) -> bool:
        return state.round >= server.rounds

    return FederatedAlgorithm(init, configure, client_update, server_update, done, work=only_sgd)


def unused(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings without effect beside the others, and why."""
    rates, out = rates_from(settings["widths"]), {}
    if len(rates) == 1:
        out["assign"] = "widths names one width"
    if rates == (1.0,):
        out["scaler"] = "widths is 1 alone"
    return out


def client_update(
    task: ClientTask, batches: Batches, engine: Engine, client_state: ClientState
) -> tuple[ClientUpdate, ClientState]:
    """w_n <- w - η·g for `local_steps` steps on the slice."""
    return train_kept_weights(task, batches, engine), client_state
