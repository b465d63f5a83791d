"""ExclusiveFL: the whole model, trained by the devices that can hold it; the others are left out.

A control for methods that give each device what it can hold (DepthFL, Kim et al., ICLR 2023, and
progressive training are compared with it): what is gained by taking weak devices along is what
exceeds this.  FedAvg (arXiv 1602.05629, Algorithm 1) among the devices whose memory suffices.

**Deviations.**  None is known: the papers describe it in a sentence.  `width` < 1 gives the same
exclusive training of a narrower model, as DepthFL's tables have it; narrower models are slices.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

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
from fedlean.submodels.narrow import first_params, narrow
from fedlean.submodels.needs import Needs
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
    params: Params  # of the model that is trained, which `width` makes narrower
    masks: Masks = field(default_factory=dict)  # always empty


@with_local_sgd
def exclusivefl(server: Server, sgd: LocalSGD, *, width: float = 1.0) -> FederatedAlgorithm:
    """Federated averaging among the devices that can train the model.

    Args:
      sgd: local SGD, whose settings are this method's as well; a cohort is drawn from the devices
        whose memory and budgets of a round are enough for it.
      width: share of every layer's channels, in (0, 1].

    Raises ValueError naming the hyper-parameter that is out of range.
    """
    in_range("width", width, 0.0, 1.0, open_low=True)
    cut = narrow(server.spec, width)
    needs = Needs(cut.spec, (sgd.work,))

    def init(model: Model) -> State:
        return State(0, "train", first_params(cut, dense_params(model), server))

    def configure(state: State, devices: Sequence[Device]) -> list[ClientTask]:
        able = [device for device in devices if needs.within(device, server.profile)]
        round = state.round + 1
        return cohort_tasks(
            server,
            # where nobody is able, a cohort of all is asked, and the runtime says what each lacks
            sgd.clients(server, able or devices, round),
            round=round,
            phase=state.phase,
            model=Model(cut.spec, state.params),
            hparams=sgd.hparams(state.round),
        )

    def server_update(state: State, updates: Iterable[ClientUpdate]) -> State:
        merged = fold(state.params, updates, variances=cut.spec.variances)
        return replace(state, round=state.round + 1, params=merged.params())

    def done(state: State) -> bool:
        return state.round >= server.rounds

    def model(state: State) -> Model:
        return Model(cut.spec, state.params)

    return FederatedAlgorithm(
        init, configure, client_update, server_update, done, work=only_sgd, model=model
    )


def client_update(
    task: ClientTask, batches: Batches, engine: Engine, client_state: ClientState
) -> tuple[ClientUpdate, ClientState]:
    """w_n <- w - η·g for `local_steps` steps."""
    return train_kept_weights(task, batches, engine), client_state
