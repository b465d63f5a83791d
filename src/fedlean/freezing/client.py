"""A client's half of a stage: what is frozen runs in one of the ways of `staging`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from fedlean.core import Batches, ClientTask, ClientUpdate, Work
from fedlean.engine.protocol import SGD, Engine, Session
from fedlean.freezing.beginning import frozen_beginning, split_alone
from fedlean.freezing.cached import cache
from fedlean.freezing.session import BeginningSession, open_rest
from fedlean.train.local_sgd import loss_of
from fedlean.train.sgd import local_sgd
from fedlean.train.work import behind_cached, behind_frozen, sgd_work


def stage_work(task: ClientTask, *, taps: tuple[str, ...] = ()) -> tuple[Work, ...]:
    """Of `local_steps` steps behind the task's frozen beginning.

    taps: as in `sgd_work`.
    """
    h = task.hparams
    if h["beginning"] == "together" or not _begins_frozen(task):
        return (sgd_work(task, taps=taps),)
    cut, micro_batch = split_alone(task.spec, task.sub_model.frozen).name, int(h["micro_batch"])
    if h["beginning"] == "pieces":
        return behind_frozen(task, cut, micro_batch=micro_batch, taps=taps)
    return behind_cached(
        task,
        cut,
        micro_batch=micro_batch,
        examples=int(h["held"]),
        on_disk=h["beginning"] == "disk",
        taps=taps,
    )


def open_stage(
    task: ClientTask, batches: Batches, engine: Engine, *, proximal: float = 0.0
) -> tuple[Session, Batches]:
    """A session in which the task's stage trains, and the batches for it.

    Raises ValueError as the engine does, and where the client has other examples than the task says
    it holds.
    """
    h = task.hparams
    optimizer = SGD(
        float(h["lr"]), float(h["momentum"]), float(h["weight_decay"]), proximal=proximal
    )
    size, loss = int(h["batch_size"]), loss_of(task)
    if h["beginning"] == "together" or not _begins_frozen(task):
        session = engine.open(
            task.spec,
            task.params,
            task.sub_model,
            batch_size=size,
            optimizer=optimizer,
            loss=loss,
            seed=task.seed,
        )
        return session, batches
    micro_batch = int(h["micro_batch"])
    cut = split_alone(task.spec, task.sub_model.frozen)
    if h["beginning"] == "pieces":
        session = BeginningSession(
            engine,
            task.spec,
            task.params,
            task.sub_model,
            batch_size=size,
            micro_batch=micro_batch,
            optimizer=optimizer,
            loss=loss,
            at=cut.name,
        )
        return session, batches
    if batches.num_examples != int(h["held"]):
        raise ValueError(
            f"the client has {batches.num_examples} examples, and joined with {h['held']}: let it "
            "join anew"
        )
    folder = Path(tempfile.gettempdir()) if h["beginning"] == "disk" else None
    held = cache(
        engine, cut, task.params, task.sub_model, batches, micro_batch=micro_batch, folder=folder
    )
    session = open_rest(
        engine,
        cut,
        task.params,
        task.sub_model,
        batch_size=size,
        optimizer=optimizer,
        loss=loss,
    )
    return session, held


def train_stage(task: ClientTask, batches: Batches, engine: Engine) -> ClientUpdate:
    """`local_steps` steps of what the task does not freeze, on the engine's loss."""
    h = task.hparams
    session, drawn = open_stage(task, batches, engine)
    train_loss = local_sgd(
        session,
        drawn,
        steps=int(h["local_steps"]),
        batch_size=int(h["batch_size"]),
        seed=task.seed,
    )
    return stage_update(task, batches, session, {"train_loss": train_loss}, stage_work)


def stage_update(
    task: ClientTask,
    batches: Batches,
    session: Session,
    metrics: Mapping[str, float],
    work: Callable[[ClientTask], tuple[Work, ...]],
) -> ClientUpdate:
    """What a client sends after a stage's round: the tensors that are not frozen."""
    held = session.params(packed=True)
    return ClientUpdate(
        client=task.client,
        num_examples=batches.num_examples,
        params={name: held[name] for name in held if name not in task.sub_model.frozen},
        sub_model=task.sub_model,
        metrics=metrics,
        work=work(task),
    )


def _begins_frozen(task: ClientTask) -> bool:
    return bool(frozen_beginning(task.spec, task.sub_model.frozen))
