"""A client's half of a stage without backpropagation.

What is frozen runs once over the batch, and then only what comes after it, at each of the points
around the model.  The slopes are those of the whole stage, on the native engine bit for bit.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedlean.core import Batches, ClientTask, ClientUpdate, Work
from fedlean.engine.protocol import Engine
from fedlean.freezing.beginning import Split, frozen_beginning, split_alone
from fedlean.freezing.session import features_of, held, part, tensors_of
from fedlean.train import forward_round
from fedlean.train.forward_round import SLOPES, ForwardRound


def forward_work(task: ClientTask) -> tuple[Work, ...]:
    """Of the batch through the frozen beginning, and of the evaluations of the rest on what came
    out, which stays in memory.
    """
    (along,) = forward_round.work(task)
    if not frozen_beginning(task.spec, task.sub_model.frozen):
        return (along,)
    cut, examples = split_alone(task.spec, task.sub_model.frozen).name, _batch_size(task)
    once = replace(along, forward_examples=examples, end=cut)
    return (
        replace(once, held_examples=examples + along.batch_size),  # and the part that arrives
        replace(along, begin=cut, held_examples=examples),
    )


def forward_answer(task: ClientTask, batches: Batches, engine: Engine) -> ClientUpdate:
    """The slopes that the task asks for, of what it does not freeze.

    Raises ValueError as the engine does.
    """
    if not frozen_beginning(task.spec, task.sub_model.frozen):
        return forward_round.answer(task, task.params, batches, engine)
    asked = ForwardRound.from_hparams(task.hparams)
    cut = split_alone(task.spec, task.sub_model.frozen)
    x, y = forward_round.drawn(task, batches)
    features = _features(task, cut, x, engine, asked.at_once)
    session = engine.open_forward(
        cut.rest,
        tensors_of(cut.rest, task.params),
        part(task.sub_model, cut.rest),
        batch_size=asked.at_once,
        loss=asked.loss,
    )
    sent = {SLOPES: forward_round.slopes(session, task, features, y)}
    return ClientUpdate(
        task.client, batches.num_examples, {}, task.sub_model, sent, work=forward_work(task)
    )


def _features(
    task: ClientTask, cut: Split, x: np.ndarray, engine: Engine, at_once: int
) -> np.ndarray:
    """What the beginning gives for x (B, *input_shape); its session is closed when it is there."""
    out = held((len(x), *cut.rest.input_shape))
    session = engine.open_forward(
        cut.beginning,
        tensors_of(cut.beginning, task.params),
        part(task.sub_model, cut.beginning),
        batch_size=at_once,
    )
    features_of(session, cut.name, x, out, at_once)
    return out


def _batch_size(task: ClientTask) -> int:
    return int(task.hparams["batch_size"])
