"""Dynamic model selection: in every round each device gets the sub-network that fits it then.

Yao, "Federated Model Heterogeneous ... dynamic model selection", arXiv 2409.08858.  The model is a
supernet; a sub-network is a prefix of the units of each stage and a prefix of the channels of each
layer, with HeteroFL's scaler.  In every round the server searches one for each device within the
device's limits of that round, merges the answers per element, and lets sub-networks learn from the
supernet on noise (data-free distillation), the smallest first.

**Deviations.**  The released search limits parameters and multiply-adds, and leaves out what
activations take: here the limits are the modelled peak of memory, the bytes of both ways, and the
seconds, each where the device has one.  An element that nobody held keeps its value, and what is
distilled is merged; the released code sets the one to zero and loses the other.  Means are weighted
by examples; the paper counts clients.  Ours: `known` sub-networks are in the data base before the
first round (released: 0); of those drawn for clients that do not answer none is kept; how often
and how long is distilled, since we know of no figures; Adam's β2 is 0.99 (default there: 0.999).
Models have GroupNorm unless told otherwise, where the paper's have BatchNorm (`static_norm`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

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
from fedlean.submodels.cut_round import Given, cut_tasks, fold_cuts
from fedlean.submodels.distil import Distillation, distil
from fedlean.submodels.levels import rates_from
from fedlean.submodels.search import Search
from fedlean.submodels.sliced import train_slice
from fedlean.submodels.static_norm import calibrated, check_norms
from fedlean.submodels.supernet import supernet
from fedlean.train.cohort import devices_of
from fedlean.train.hyperparameters import at_least, in_range
from fedlean.train.local_sgd import LocalSGD, with_local_sgd
from fedlean.train.start import dense_params
from fedlean.train.work import only_sgd


@dataclass(frozen=True)
class State:
    """What survives a round."""

    round: int  # training rounds completed
    phase: str
    params: Params  # of the supernet
    base: tuple[str, ...]  # the sub-networks that the search knows, the largest first
    measured: Mapping[str, float] = field(default_factory=dict)  # for the log, of the last round
    masks: Masks = field(default_factory=dict)  # always empty


@with_local_sgd
def model_selection(
    server: Server,
    sgd: LocalSGD,
    *,
    widths: str = "1 0.5",
    scaler: bool = True,
    explore: float = 0.2,
    tries: int = 5,
    known: int = 16,
    distill_every: int = 1,
    distill_networks: int = 2,
    distill_steps: int = 1,
    distill_lr: float = 0.001,
    distill_batch: int = 16,
    static_norm: bool = False,
) -> FederatedAlgorithm:
    """Federated averaging of sub-networks that are searched for each device and round.

    Args:
      sgd: local SGD, whose settings are this method's as well.
      widths: rates that the channels of each stage may have (released: 1 and 0.5).
      scaler: a sub-network multiplies what its layers give by 1/width in training.
      explore: the probability of drawing another sub-network before each look (paper: 0.2).
      tries: the most that are drawn so for one client (paper: 5).
      known: random sub-networks in the data base from the start.
      distill_every: rounds from one distillation to the next; 0: none.
      distill_networks: how many sub-networks learn then, the smallest and random ones.
      distill_steps: of Adam for each of them.
      distill_lr: its rate (released: 0.001).
      distill_batch: noise inputs a step.
      static_norm: the server finds the running statistics of BatchNorm after each round, on inputs
        of its own; without it a model with BatchNorm is refused.

    A model whose blocks are units (`--model resnet18,blocks=unit`) has sub-networks of all depths;
    another one has those of all widths.

    Raises ValueError naming the hyper-parameter that is out of range, and where the model has one
    sub-network only.
    """
    spec = server.spec
    in_range("explore", explore, 0.0, 0.99)
    in_range("distill_lr", distill_lr, 0.0, 1.0, open_low=True)
    for name, count in (("tries", tries), ("known", known), ("distill_every", distill_every)):
        at_least(name, count, 0, most=100_000)
    for name, count in (("distill_networks", distill_networks), ("distill_steps", distill_steps)):
        at_least(name, count, 1, most=100_000)
    at_least("distill_batch", distill_batch, 2, most=100_000)
    check_norms(server, static_norm)
    nets = supernet(spec, rates_from(widths), scaler=scaler)
    search = Search(nets, sgd.work, explore, tries, server.seed)
    how = Distillation(distill_steps, distill_lr, distill_batch)

    def init(model: Model) -> State:
        return State(0, "train", dense_params(model), search.begun(known))

    def configure(state: State, devices: Sequence[Device]) -> list[ClientTask]:
        round, given = state.round + 1, []
        for device in devices_of(devices, sgd.clients(server, devices, round)):
            base = search.with_more(state.base, search.drawn(round, device.id))
            net = search.fitting(base, device, server.profile)
            given.append(Given(device.id, nets.cut(net), nets.said(net)))
        return cut_tasks(
            server,
            given,
            round=round,
            phase=state.phase,
            model=Model(spec, state.params),
            hparams=sgd.hparams(state.round),
        )

    def server_update(state: State, updates: Iterable[ClientUpdate]) -> State:
        answered: list[int] = []

        def noted(updates: Iterable[ClientUpdate]) -> Iterable[ClientUpdate]:
            for update in updates:
                answered.append(update.client)
                yield update

        merged = fold_cuts(
            spec, state.params, noted(updates), lambda task: nets.cut(nets.heard(task.hparams))
        )
        round = state.round + 1
        drawn = [net for client in answered for net in search.drawn(round, client)]
        base = search.with_more(state.base, drawn)
        state = replace(state, round=round, params=merged.params(), base=base)
        state = replace(state, measured={"sub_networks": len(base)})
        if distill_every and round % distill_every == 0 and merged.count:
            state = _distilled(state)
        return replace(state, params=calibrated(server, static_norm, merged, state.params))

    def _distilled(state: State) -> State:
        random = generator(server.seed, state.round, 0, "distilled")
        others = [nets.draw(random) for _ in range(distill_networks - 1)]
        done = distil(
            [nets.cut(net) for net in (nets.smallest, *others)],
            state.params,
            how,
            engine=server.engine,
            seed=server.seed,
            round=state.round,
        )
        told = {"divergence": done.divergence, "server_flops": done.flops}
        return replace(state, params=done.params, measured={**state.measured, **told})

    def done(state: State) -> bool:
        return state.round >= server.rounds

    def report(state: State) -> Mapping[str, float]:
        return state.measured

    return FederatedAlgorithm(
        init, configure, client_update, server_update, done, work=only_sgd, report=report
    )


def unused(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings without effect beside the others, and why."""
    out = {}
    if rates_from(settings["widths"]) == (1.0,):
        out["scaler"] = "widths is 1 alone"
    if not settings["explore"]:
        out["tries"] = "explore is 0"
    if not settings["distill_every"]:
        names = ("distill_networks", "distill_steps", "distill_lr", "distill_batch")
        out |= dict.fromkeys(names, "distill_every is 0")
    return out


def client_update(
    task: ClientTask, batches: Batches, engine: Engine, client_state: ClientState
) -> tuple[ClientUpdate, ClientState]:
    """w_n <- w - η·g for `local_steps` steps on the sub-network."""
    return train_slice(task, batches, engine), client_state
