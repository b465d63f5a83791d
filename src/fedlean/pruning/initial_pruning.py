"""Initial pruning (PruneFL, arXiv 1909.12326, Sec. IV-A): one client prunes alone, task by task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fedlean.core import (
    Batches,
    ClientState,
    ClientTask,
    ClientUpdate,
    Masks,
    Scalar,
    SubModel,
    Work,
    derive_seed,
)
from fedlean.engine.protocol import Engine, Session
from fedlean.pruning.budget import fraction_to
from fedlean.pruning.density import density, full_masks
from fedlean.pruning.initial_model import InitialModel
from fedlean.train.local_sgd import open_session
from fedlean.train.sgd import local_sgd
from fedlean.tree import kept_counts, unpack

CHUNK_PASSES = 10  # passes per task, so that a lost task costs little


def prune_alone(
    task: ClientTask, batches: Batches, engine: Engine, client_state: ClientState
) -> tuple[ClientUpdate, ClientState]:
    """Up to CHUNK_PASSES passes, ending early at a reconfiguration.

    The model stays at the client until initial pruning is done; a task without parameters says
    "go on from what you hold".
    """
    h = task.hparams
    if task.params:
        local = InitialModel(task.params, full_masks(task.spec), {})
    else:
        local = InitialModel.from_state(client_state)
    if local is None:
        lost = {"lost_state": 1.0}
        return ClientUpdate(task.client, batches.num_examples, {}, SubModel(), metrics=lost), {}
    local, work, train_loss = _passes(task, batches, engine, local)
    if local.due(h):
        local = local.reconfigured(task)
    stopped, works = local.stopped(h), [work]
    if stopped and local.exceeds(h):  # too few passes: one more, and down to the limit
        local = replace(local, started=True, since=int(h["initial_passes"]) - 1)
        local, work, _ = _passes(task, batches, engine, local)
        least = fraction_to(int(h["limit"]), local.masks)
        local = local.reconfigured(task, least_fraction=least)
        works.append(work)
    update = ClientUpdate(
        client=task.client,
        num_examples=batches.num_examples,
        params=local.params if stopped else {},
        sub_model=SubModel(masks=local.masks if stopped else {}),
        metrics={
            "train_loss": train_loss,
            "density": density(local.masks),
            "passes": float(local.passes),
            "reconfigurations": float(local.reconfigurations),
        },
        work=tuple(works),
    )
    return update, {} if stopped else local.to_state()


def alone(task: ClientTask) -> bool:
    """Whether the task is one of initial pruning, in which the client chooses the masks."""
    return task.phase == "initial"


def chosen(update: ClientUpdate) -> tuple[dict[str, np.ndarray], Masks]:
    """The model that it ended with, dense in whichever form it came, and its masks."""
    masks = update.sub_model.masks
    params = {
        name: unpack(value, masks[name]) if name in masks else value
        for name, value in update.params.items()
    }
    return params, masks


def most_work(h: Mapping[str, Scalar]) -> Work:
    """What a chunk of passes and the last one take at most; h: of the task."""
    steps, batch_size = int(h["initial_batches"]) * (CHUNK_PASSES + 1), int(h["batch_size"])
    forward_examples = steps * batch_size  # the training accuracy after every pass
    return Work(steps, batch_size, steps, forward_examples, {}, 1 if h["momentum"] else 0)


def _passes(
    task: ClientTask, batches: Batches, engine: Engine, local: InitialModel
) -> tuple[InitialModel, Work, float]:
    """Trains until a reconfiguration is due or the chunk is full; (local, work, mean loss)."""
    h = task.hparams
    steps, batch_size = int(h["initial_batches"]), int(h["batch_size"])
    examples = int(h["initial_examples"]) or None
    session = open_session(task, engine, local.params, local.masks)
    losses: list[float] = []
    importance_steps = forward_examples = 0
    for _ in range(CHUNK_PASSES):
        importance, accuracy = local.importance_is_due(h), 0.0
        seed = derive_seed(task.seed, local.passes, task.client, "pass")
        drawn = {"steps": steps, "batch_size": batch_size, "seed": seed, "examples": examples}
        losses.append(local_sgd(session, batches, importance=importance, **drawn))
        importance_steps += steps if importance else 0
        if not local.started:
            accuracy = _accuracy(session, batches, drawn)
            forward_examples += steps * batch_size
        local = local.after_pass(accuracy, classes=task.spec.output_shape[0])
        if local.due(h) or local.passes >= int(h["initial_max_passes"]):
            break
    if importance_steps:
        local = local.with_sums(session.importance())
    work = Work(
        steps * len(losses),
        batch_size,
        importance_steps,
        forward_examples,
        kept_counts(local.masks),
        1 if h["momentum"] else 0,
    )
    return replace(local, params=session.params()), work, float(np.mean(losses))


def _accuracy(session: Session, batches: Batches, drawn: Mapping[str, Any]) -> float:
    """Training accuracy on the batches of a pass."""
    hits = total = 0
    for x, y in batches.draw(**drawn):
        (logits,) = session.forward(x).values()
        hits += int(np.count_nonzero(logits.argmax(1) == y))
        total += len(y)
    return hits / total
