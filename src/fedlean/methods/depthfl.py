"""DepthFL: each device trains the beginning of the model that it can hold, with an exit at its end.

Kim, Yu, Kim and Moon, "DepthFL: Depthwise Federated Learning for Heterogeneous Clients", ICLR 2023.
A device of depth d has the first d parts of the model and an exit after each; it trains

    L = Σ_i CE_i + 1/(d-1) Σ_i Σ_{j≠i} KL(p_j || p_i)    over its exits, p_j being a target

(mutual self-distillation), and the server averages each part over the devices that have it.

**Deviations.**  Means are weighted by examples.  Depth follows from the memory of the device; the
paper gives it out by hand, as `assign="fixed"` does.  An exit is global average pooling and a
linear layer (ours); the authors' have separable convolutions and attention, whose widths are of
their ResNet.  The paper adds FedDyn's regularisation, which is not there.  As in the authors' code
the logits of all exits together decide in evaluation (they are added; the code takes their mean),
and the weight of the distillation may rise over the first rounds (over 300 there; none by default).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import exp
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
    Scalar,
    Work,
)
from fedlean.engine.protocol import Engine
from fedlean.models.initialise import init_params
from fedlean.submodels.cut_round import Given, cut_tasks, fold_cuts
from fedlean.submodels.exits import ending_at, with_exits
from fedlean.submodels.levels import levels
from fedlean.train.cohort import devices_of
from fedlean.train.descent import local_descent
from fedlean.train.hyperparameters import at_least, in_range
from fedlean.train.local_sgd import LocalSGD, open_session, with_local_sgd
from fedlean.train.losses import mutual_distillation
from fedlean.train.start import dense_params
from fedlean.train.work import sgd_work

Assign = Literal["memory", "fixed"]


@dataclass(frozen=True)
class State:
    """What survives a round."""

    round: int  # training rounds completed
    phase: str
    params: Params  # of the whole model and of every exit
    masks: Masks = field(default_factory=dict)  # always empty


@with_local_sgd
def depthfl(
    server: Server,
    sgd: LocalSGD,
    *,
    assign: Assign = "memory",
    distillation: float = 1.0,
    distillation_rounds: int = 0,
    ensemble: bool = True,
) -> FederatedAlgorithm:
    """Federated averaging of beginnings of one model, each with its exits.

    Args:
      sgd: local SGD, whose settings are this method's as well; its loss must be "ce".
      assign: which depth a device gets.  "memory": the largest within its memory and its budgets
        of a round, the whole model where none is known.  "fixed": client i, depth i modulo
        their number, beginning with the whole.
      distillation: weight of the KL terms (paper: 1); 0: cross-entropy alone.
      distillation_rounds: rounds R over which that weight rises as exp(-5 (1 - r/R)²), r being the
        rounds done (0: it is there from the start).
      ensemble: the model is evaluated and saved with the sum of all exits' logits as its output;
        otherwise with its last exit, the others beside it.

    Raises ValueError naming the hyper-parameter that is out of range, and for a model that has no
    block after which it could end.
    """
    if assign not in get_args(Assign):
        raise ValueError(f"assign must be one of {', '.join(get_args(Assign))}, got {assign!r}")
    if sgd.loss != "ce":
        raise ValueError(f"loss must be 'ce', the loss of every exit, got {sgd.loss!r}")
    in_range("distillation", distillation, 0.0, 1e3)
    at_least("distillation_rounds", distillation_rounds, 0)
    exits = with_exits(server.spec)
    depths = range(len(exits.names), 0, -1)  # as `levels` has them, the largest first
    choice = levels(
        [(str(d), ending_at(exits, d), [replace(sgd.work, taps=exits.names[:d])]) for d in depths],
        server.profile,
    )
    evaluated = choice.cuts[0].spec if ensemble else exits.spec

    def init(model: Model) -> State:
        drawn = init_params(exits.spec, server.seed, server.init)
        return State(0, "train", {**drawn, **dense_params(model)})

    def configure(state: State, devices: Sequence[Device]) -> list[ClientTask]:
        round = state.round + 1
        weight = distillation * _rise(state.round, distillation_rounds)
        cohort = devices_of(devices, sgd.clients(server, devices, round))
        chosen = {d.id: choice.given(assign, d, seed=server.seed, round=round) for d in cohort}
        return cut_tasks(
            server,
            [Given(c, choice.cuts[at], depth_said(choice.names[at])) for c, at in chosen.items()],
            round=round,
            phase=state.phase,
            model=Model(exits.spec, state.params),
            hparams={**sgd.hparams(state.round), "distillation": weight},
        )

    def depth_said(name: str) -> dict[str, Scalar]:
        """What a task says of its depth; no name of an exit has a dot."""
        return {"depth": name, "exits": ".".join(exits.names[: int(name)])}

    def server_update(state: State, updates: Iterable[ClientUpdate]) -> State:
        merged = fold_cuts(
            exits.spec, state.params, updates, lambda task: choice.cut(str(task.hparams["depth"]))
        )
        return replace(state, round=state.round + 1, params=merged.params())

    def done(state: State) -> bool:
        return state.round >= server.rounds

    def model(state: State) -> Model:
        return Model(evaluated, state.params)

    return FederatedAlgorithm(
        init, configure, client_update, server_update, done, work=work, model=model
    )


def work(task: ClientTask) -> tuple[Work, ...]:
    """Steps on a loss over the task's exits."""
    return (sgd_work(task, taps=_exits(task)),)


def unused(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings without effect beside the others, and why."""
    return {} if settings["distillation"] else {"distillation_rounds": "distillation is 0"}


def client_update(
    task: ClientTask, batches: Batches, engine: Engine, client_state: ClientState
) -> tuple[ClientUpdate, ClientState]:
    """`local_steps` steps on the loss over the exits of the device's depth."""
    h = task.hparams
    names = _exits(task)
    loss = partial(mutual_distillation, exits=names, weight=float(h["distillation"]))
    session = open_session(task, engine)
    train_loss = local_descent(
        session,
        batches,
        loss,
        taps=names,
        steps=int(h["local_steps"]),
        batch_size=int(h["batch_size"]),
        seed=task.seed,
    )
    update = ClientUpdate(
        client=task.client,
        num_examples=batches.num_examples,
        params=session.params(),
        sub_model=task.sub_model,
        metrics={"train_loss": train_loss},
        work=work(task),
    )
    return update, client_state


def _exits(task: ClientTask) -> tuple[str, ...]:
    return tuple(str(task.hparams["exits"]).split("."))


def _rise(rounds_done: int, over: int) -> float:
    """exp(-5 (1 - t)²) with t going from 0 to 1 over so many rounds; 0: at once."""
    t = min(1.0, rounds_done / over) if over else 1.0
    return exp(-5.0 * (1.0 - t) ** 2)
