"""Local SGD as the first-order methods share it: its settings, its session, a client's round."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, get_type_hints

from fedlean.algorithm import Device, FederatedAlgorithm, Server
from fedlean.core import (
    Batches,
    ClientTask,
    ClientUpdate,
    Masks,
    Params,
    Scalar,
    SubModel,
    Work,
)
from fedlean.engine.protocol import SGD, Engine, Loss, Session
from fedlean.train.cohort import check_cohort, sample_cohort
from fedlean.train.hyperparameters import check_sgd
from fedlean.train.schedule import Schedule
from fedlean.train.sgd import local_sgd
from fedlean.train.work import only_sgd


@dataclass(frozen=True)
class LocalSGD:
    """The settings of local SGD and of its cohort, by the same names in every method.

    lr: η, learning rate.
    lr_half_life_rounds: rounds in which it halves; 0: it does not.
    lr_schedule: constant, cosine:ROUNDS or step:ROUNDS:FACTOR (`train.schedule`).
    lr_warmup_rounds: the first rounds, in which it rises evenly to lr.
    local_steps: I, local steps a round.
    batch_size: B, examples a step.
    cohort: clients a round, drawn anew each round; None: all.
    momentum, weight_decay: of SGD; the momentum buffer starts at 0 each round.
    loss: "ce" or "bce" (BCE-with-logits on one-hot labels).
    """

    lr: float = 0.1
    local_steps: int = 5
    batch_size: int = 20
    cohort: int | None = None
    momentum: float = 0.0
    weight_decay: float = 0.0
    loss: Loss = "ce"
    lr_half_life_rounds: float = 0.0
    lr_schedule: str = "constant"
    lr_warmup_rounds: int = 0

    def check(self, server: Server) -> None:
        """Raises ValueError naming what is out of range, or fits neither model nor clients."""
        check_sgd(
            server.spec,
            lr=self.lr,
            local_steps=self.local_steps,
            batch_size=self.batch_size,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            loss=self.loss,
        )
        self.schedule.check()
        check_cohort(self.cohort, server)

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.lr, self.lr_half_life_rounds, self.lr_schedule, self.lr_warmup_rounds)

    def rate(self, rounds_done: int) -> float:
        """The learning rate in the round after so many."""
        return self.schedule.rate(rounds_done)

    def clients(self, server: Server, devices: Sequence[Device], round: int) -> list[int]:
        """Ids of the cohort of `round`, ascending."""
        return sample_cohort(devices, self.cohort, seed=server.seed, round=round)

    @property
    def work(self) -> Work:
        """A client's round on all weights of whatever model it is given."""
        floats = 1 if self.momentum else 0
        return Work(self.local_steps, self.batch_size, optimizer_floats=floats)

    def hparams(self, rounds_done: int) -> dict[str, Scalar]:
        """What a client is told in the round after so many."""
        return {
            "lr": self.rate(rounds_done),
            "local_steps": self.local_steps,
            "batch_size": self.batch_size,
            "momentum": self.momentum,
            "weight_decay": self.weight_decay,
            "loss": self.loss,
        }


class SettingsRecord(Protocol):
    """A frozen dataclass of settings that several methods share."""

    def check(self, server: Server) -> None: ...


def with_settings(
    *records: type[SettingsRecord],
) -> Callable[[Callable[..., FederatedAlgorithm]], Callable[..., FederatedAlgorithm]]:
    """`method(server, record, ..., *, own=1, ...)` as `method(server, *, lr=0.1, ..., own=1, ...)`.

    The fields of the records become keyword arguments of the method, before its own; each record is
    checked before the method is called with it.
    """

    def changed(method: Callable[..., FederatedAlgorithm]) -> Callable[..., FederatedAlgorithm]:
        @functools.wraps(method)
        def built(server: Server, **settings: Any) -> FederatedAlgorithm:
            made = []
            for record in records:
                names = [field.name for field in fields(record)]  # type: ignore[arg-type]
                given = {name: settings.pop(name) for name in names if name in settings}
                made.append(record(**given))
                made[-1].check(server)
            return method(server, *made, **settings)

        built.settings_records = records  # type: ignore[attr-defined]  # whose docstrings count
        signature = inspect.signature(method, eval_str=True)
        first, *others = signature.parameters.values()
        shared = [parameter for record in records for parameter in _keywords(record)]
        built.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[first, *shared, *others[len(records) :]]
        )
        return built

    return changed


def _keywords(record: type[SettingsRecord]) -> list[inspect.Parameter]:
    types = get_type_hints(record)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=types[field.name],
        )
        for field in fields(record)  # type: ignore[arg-type]
    ]


with_local_sgd = with_settings(LocalSGD)


def open_session(
    task: ClientTask, engine: Engine, params: Params | None = None, masks: Masks | None = None
) -> Session:
    """A session of the task's SGD, at its model or at another one of the same spec, then dense or
    under `masks`.
    """
    h = task.hparams
    return engine.open(
        task.spec,
        task.params if params is None else params,
        task.sub_model if params is None else SubModel(masks=masks or {}),
        batch_size=int(h["batch_size"]),
        optimizer=SGD(float(h["lr"]), float(h["momentum"]), float(h["weight_decay"])),
        loss=loss_of(task),
        seed=task.seed,
    )


def loss_of(task: ClientTask) -> Loss:
    """The loss that the task is trained on; what a task says is text."""
    return "bce" if task.hparams["loss"] == "bce" else "ce"


def train_kept_weights(task: ClientTask, batches: Batches, engine: Engine) -> ClientUpdate:
    """w_n <- w - η·g ⊙ m for `local_steps` steps, where nothing else is trained and sent.

    On the first `examples` of a shuffle of the client's, where the task names them (0: all).
    """
    h = task.hparams
    session = open_session(task, engine)
    train_loss = local_sgd(
        session,
        batches,
        steps=int(h["local_steps"]),
        batch_size=int(h["batch_size"]),
        seed=task.seed,
        examples=int(h.get("examples", 0)) or None,
    )
    return ClientUpdate(
        client=task.client,
        num_examples=batches.num_examples,
        params=session.params(packed=True),
        sub_model=task.sub_model,
        metrics={"train_loss": train_loss},
        work=only_sgd(task),
    )
