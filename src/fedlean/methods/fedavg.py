"""FedAvg: local SGD, then the example-weighted mean of the models.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
AISTATS 2017, arXiv 1602.05629, Algorithm 1, counted in local steps instead of epochs as PruneFL
(arXiv 1909.12326, Algorithm 1 without pruning) does.

**Deviations.**  `warmup_steps` lets one client train alone before the first round; it is a control
for methods that do so (PruneFL's initial pruning) and 0 by default.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

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
from fedlean.engine.protocol import SGD, Engine, Loss
from fedlean.train.hyperparameters import at_least, check_sgd, learning_rate
from fedlean.train.sampling import sample_cohort
from fedlean.train.sgd import local_sgd
from fedlean.train.work import only_sgd
from fedlean.tree import fold


@dataclass(frozen=True)
class State:
    """What survives a round."""

    round: int  # training rounds completed
    phase: str  # "warmup", then "train"
    params: Params
    masks: Masks = field(default_factory=dict)  # always empty: FedAvg is dense


def fedavg(
    server: Server,
    *,
    lr: float = 0.1,
    local_steps: int = 5,
    batch_size: int = 20,
    cohort: int | None = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    loss: Loss = "ce",
    lr_half_life_rounds: float = 0.0,
    warmup_steps: int = 0,
    warmup_client: int = 0,
    warmup_examples: int = 200,
) -> FederatedAlgorithm:
    """Dense federated averaging.

    Args:
      lr: η, learning rate of local SGD; halves every `lr_half_life_rounds` rounds (0: constant).
      local_steps: I, local steps a round.
      batch_size: B, examples a step.
      cohort: clients a round, drawn anew each round; None: all.
      momentum, weight_decay: of local SGD; the momentum buffer starts at 0 each round.
      loss: "ce" or "bce" (BCE-with-logits on one-hot labels).
      warmup_steps: local steps of `warmup_client` before the first round, on `warmup_examples` of
        its examples (0: all).

    Raises ValueError naming the hyper-parameter that is out of range.
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
    at_least("warmup_client", warmup_client, 0)
    at_least("warmup_steps", warmup_steps, 0)
    at_least("warmup_examples", warmup_examples, 0)

    def init(params: Params) -> State:
        return State(round=0, phase="warmup" if warmup_steps else "train", params=params)

    def task(state: State, client: int, round: int, steps: int, examples: int) -> ClientTask:
        hparams = {
            "lr": learning_rate(lr, state.round, lr_half_life_rounds),
            "local_steps": steps,
            "batch_size": batch_size,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "loss": loss,
            "examples": examples,  # 0: all
        }
        seed = derive_seed(server.seed, round, client, state.phase)
        return ClientTask(
            round, state.phase, client, seed, server.spec, state.params, SubModel(), hparams
        )

    def configure(state: State, devices: Sequence[Device]) -> list[ClientTask]:
        if state.phase == "warmup":
            return [task(state, warmup_client, 0, warmup_steps, warmup_examples)]
        round = state.round + 1
        clients = sample_cohort(devices, cohort, seed=server.seed, round=round)
        return [task(state, client, round, local_steps, 0) for client in clients]

    def server_update(state: State, updates: Iterable[ClientUpdate]) -> State:
        merged = fold(state.params, updates, variances=server.spec.variances)
        if state.phase == "warmup":
            # without an answer it is asked again
            return replace(state, phase="train", params=merged.params()) if merged.count else state
        return replace(state, round=state.round + 1, params=merged.params())

    def done(state: State) -> bool:
        return state.round >= server.rounds

    return FederatedAlgorithm(init, configure, client_update, server_update, done, work=only_sgd)


def unused(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings without effect beside the others, and why."""
    if settings["warmup_steps"]:
        return {}
    return dict.fromkeys(("warmup_client", "warmup_examples"), "warmup_steps is 0")


def client_update(
    task: ClientTask, batches: Batches, engine: Engine, client_state: ClientState
) -> tuple[ClientUpdate, ClientState]:
    """w_n <- w - η·g for `local_steps` steps."""
    h = task.hparams
    steps, batch_size = int(h["local_steps"]), int(h["batch_size"])
    session = engine.open(
        task.spec,
        task.params,
        task.sub_model,
        batch_size=batch_size,
        optimizer=SGD(float(h["lr"]), float(h["momentum"]), float(h["weight_decay"])),
        loss="bce" if h["loss"] == "bce" else "ce",
    )
    train_loss = local_sgd(
        session,
        batches,
        steps=steps,
        batch_size=batch_size,
        seed=task.seed,
        examples=int(h["examples"]) or None,
    )
    update = ClientUpdate(
        client=task.client,
        num_examples=batches.num_examples,
        params=session.params(),
        sub_model=task.sub_model,
        metrics={"train_loss": train_loss},
        work=only_sgd(task),
    )
    return update, client_state
