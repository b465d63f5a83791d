"""Trains the mask of a finished run from the start: the lottery-ticket studies.

Frankle & Carbin, "The Lottery Ticket Hypothesis", ICLR 2019, arXiv 1803.03635: a sparse network
that is found by training learns as well as the dense one when it starts from its *original* initial
weights, and worse from new ones.  PruneFL (arXiv 1909.12326, Sec. VI-C) asks that of its final
mask.  After the choice of mask and weights this is FedAvg on the pruned model.

**Deviations.**  `initial="trained"`, which goes on from the run's final weights, is ours.  The new
random weights are drawn from a seed derived from this run's; PruneFL's code takes the next seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from fedlean.core import (
    Batches,
    ClientState,
    ClientTask,
    ClientUpdate,
    Device,
    FederatedAlgorithm,
    Masks,
    Params,
    Server,
    SubModel,
    derive_seed,
)
from fedlean.engine.protocol import Engine, Loss
from fedlean.models.initialise import init_params
from fedlean.pruning.finished_run import read_finished_run
from fedlean.train.hyperparameters import at_least, check_sgd, learning_rate
from fedlean.train.kept_weights import train_kept_weights
from fedlean.train.sampling import sample_cohort
from fedlean.train.work import only_sgd
from fedlean.tree import apply_mask, fold

Initial = Literal["original", "random", "trained"]


@dataclass(frozen=True)
class State:
    """What survives a round."""

    round: int  # training rounds completed
    phase: str
    params: Params
    masks: Masks = field(default_factory=dict)  # never changes; empty: dense


def fixed_mask(
    server: Server,
    *,
    masks_from: str = "",
    initial: Initial = "original",
    lr: float = 0.1,
    local_steps: int = 5,
    batch_size: int = 20,
    cohort: int | None = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    loss: Loss = "ce",
    lr_half_life_rounds: float = 0.0,
) -> FederatedAlgorithm:
    """Federated averaging of the model that another run has pruned.

    Args:
      masks_from: folder of a finished run on the same model; "": no mask, which is FedAvg.
      initial: where the kept weights start: "original", at that run's own initial weights;
        "random", at new ones; "trained", at its final ones.  Without masks_from: "original" only.
      lr, local_steps, batch_size, cohort, momentum, weight_decay, loss, lr_half_life_rounds: as in
        `fedavg`.

    Raises ValueError naming the hyper-parameter that is out of range, or what is wrong with the
    run: not there, not finished, of another model, not pruned.
    """
    check_sgd(
        server.spec,
        lr=lr,
        local_steps=local_steps,
        batch_size=batch_size,
        momentum=momentum,
        weight_decay=weight_decay,
        loss=loss,
        lr_half_life_rounds=lr_half_life_rounds,
    )
    if cohort is not None:
        at_least("cohort", cohort, 1)
    if initial not in get_args(Initial):
        raise ValueError(f"initial must be one of {', '.join(get_args(Initial))}, got {initial!r}")
    if not masks_from and initial != "original":
        raise ValueError(f"initial={initial!r} needs masks_from, the folder of a finished run")
    spec = server.spec
    ticket = read_finished_run(Path(masks_from), spec) if masks_from else None

    def init(params: Params) -> State:
        if ticket is None:
            return State(round=0, phase="train", params=params)
        if initial == "original":
            start = init_params(spec, ticket.seed, ticket.init)
        elif initial == "random":
            seed = derive_seed(server.seed, 0, 0, "initialise anew")
            start = init_params(spec, seed, server.init)
        else:
            start = ticket.params
        return State(0, "train", apply_mask(start, ticket.masks), ticket.masks)

    def configure(state: State, devices: Sequence[Device]) -> list[ClientTask]:
        round = state.round + 1
        sub_model = SubModel(masks=state.masks)
        hparams = {
            "lr": learning_rate(lr, state.round, lr_half_life_rounds),
            "local_steps": local_steps,
            "batch_size": batch_size,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "loss": loss,
        }
        return [
            ClientTask(
                round,
                state.phase,
                client,
                derive_seed(server.seed, round, client, state.phase),
                spec,
                state.params,
                sub_model,
                hparams,
            )
            for client in sample_cohort(devices, cohort, seed=server.seed, round=round)
        ]

    def server_update(state: State, updates: Iterable[ClientUpdate]) -> State:
        merged = fold(state.params, updates, variances=spec.variances)
        return replace(state, round=state.round + 1, params=merged.params())

    def done(state: State) -> bool:
        return state.round >= server.rounds

    return FederatedAlgorithm(init, configure, client_update, server_update, done, work=only_sgd)


def client_update(
    task: ClientTask, batches: Batches, engine: Engine, client_state: ClientState
) -> tuple[ClientUpdate, ClientState]:
    """w_n <- w - η·g ⊙ m for `local_steps` steps."""
    return train_kept_weights(task, batches, engine), client_state
