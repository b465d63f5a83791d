"""AllSmall: every device trains the same narrow model, which the smallest of them can hold.

A control for methods that give each device what it can hold (HeteroFL, FedRolex, ProFL and others
are compared with it): it wastes the memory of large devices and no data.  FedAvg (arXiv 1602.05629,
Algorithm 1) on a slice of the model by width.

**Deviations.**  The papers set the width by hand.  `width=0` takes the largest of `widths` that all
devices of the first round can hold; it then stays.  The narrow model draws its own first weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
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
)
from fedlean.engine.protocol import Engine
from fedlean.submodels.levels import levels, rates_from
from fedlean.submodels.narrow import first_params, narrow
from fedlean.train.cohort import cohort_tasks
from fedlean.train.hyperparameters import in_range
from fedlean.train.local_sgd import LocalSGD, train_kept_weights, with_local_sgd
from fedlean.train.start import dense_params
from fedlean.train.work import only_sgd
from fedlean.tree import fold


@dataclass(frozen=True)
class State:
    """What survives a round."""

    round: int  # training rounds completed
    phase: str
    params: Params  # of the narrow model; of the whole one until its width is known
    masks: Masks = field(default_factory=dict)  # always empty
    width: float = 0.0  # 0: not chosen yet


@with_local_sgd
def allsmall(
    server: Server, sgd: LocalSGD, *, width: float = 0.0, widths: str = "1 0.5 0.25"
) -> FederatedAlgorithm:
    """Federated averaging of a narrow model on all devices.

    Args:
      sgd: local SGD, whose settings are this method's as well.
      width: share of every layer's channels, in (0, 1]; 0: the largest of `widths` within memory
        and budgets of every device of the first round, or the smallest of them.
      widths: what may be chosen, from the largest to the smallest.

    Raises ValueError naming the hyper-parameter that is out of range.
    """
    in_range("width", width, 0.0, 1.0)
    cuts = {rate: narrow(server.spec, rate) for rate in ((width,) if width else rates_from(widths))}
    choice = levels([(str(rate), cut, [sgd.work]) for rate, cut in cuts.items()], server.profile)
    rates = tuple(cuts)

    def begun(state: State, width: float) -> State:
        """With the narrow model's first weights."""
        params = first_params(cuts[width], state.params, server)
        return replace(state, params=params, width=width)

    def init(model: Model) -> State:
        state = State(0, "train", dense_params(model))
        return begun(state, width) if width else state

    def configure(state: State, devices: Sequence[Device]) -> list[ClientTask]:
        if not state.width:
            state = begun(state, rates[choice.common(devices)])
        round = state.round + 1
        return cohort_tasks(
            server,
            sgd.clients(server, devices, round),
            round=round,
            phase=state.phase,
            model=Model(cuts[state.width].spec, state.params),
            hparams={**sgd.hparams(state.round), "width": state.width},
        )

    def server_update(state: State, updates: Iterable[ClientUpdate]) -> State:
        answers = iter(updates)
        if not state.width and (first := next(answers, None)) is not None:
            assert first.task is not None
            state = begun(state, float(first.task.hparams["width"]))
            answers = chain((first,), answers)
        merged = fold(state.params, answers, variances=server.spec.variances)
        return replace(state, round=state.round + 1, params=merged.params())

    def done(state: State) -> bool:
        return state.round >= server.rounds

    def model(state: State) -> Model:
        spec = cuts[state.width].spec if state.width else server.spec
        return Model(spec, state.params)

    return FederatedAlgorithm(
        init, configure, client_update, server_update, done, work=only_sgd, model=model
    )


def unused(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings without effect beside the others, and why."""
    return {"widths": "width says which one"} if settings["width"] else {}


def client_update(
    task: ClientTask, batches: Batches, engine: Engine, client_state: ClientState
) -> tuple[ClientUpdate, ClientState]:
    """w_n <- w - η·g for `local_steps` steps."""
    return train_kept_weights(task, batches, engine), client_state
