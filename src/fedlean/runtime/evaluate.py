"""Accuracy and loss of the global model on the held-out test set."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fedlean.core import Model, SubModel
from fedlean.data.batches import eval_batches
from fedlean.data.dataset import Dataset
from fedlean.engine.protocol import SGD, Engine

BATCH = 100  # small enough for the activations to stay in cache


class Score(NamedTuple):
    accuracy: float  # in [0, 1]
    loss: float  # mean cross-entropy, nats
    confusion: np.ndarray  # int64 (classes, classes): a row per true class


Evaluate = Callable[[Model, bool], Score]  # flag: after the last round


def evaluator(
    engine: Engine,
    dataset: Dataset,
    during: np.ndarray | None,
    final: np.ndarray | None = None,
) -> Evaluate:
    """`during` holds the test examples used during the run, `final` those of its end; None: all.

    The masks do not change the model, which is 0 there; they save a sparse engine most of the work.
    """

    def evaluate(model: Model, last: bool) -> Score:
        held = SubModel(masks=model.masks)
        session = engine.open(model.spec, model.params, held, batch_size=BATCH, optimizer=SGD(0.0))
        classes, loss = dataset.classes, 0.0
        confusion = np.zeros(classes * classes, np.int64)
        for x, y in eval_batches(dataset, BATCH, final if last else during):
            (logits,) = session.forward(x).values()
            confusion += np.bincount(y * classes + logits.argmax(1), minlength=len(confusion))
            loss += float(_cross_entropy(logits, y).sum(dtype=np.float64))
        confusion = confusion.reshape(classes, classes)
        total = int(confusion.sum())
        return Score(int(np.trace(confusion)) / total, loss / total, confusion)

    return evaluate


def _cross_entropy(logits: np.ndarray, y: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):  # a diverged model has no finite loss
        shifted = logits - logits.max(1, keepdims=True)
        return np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(y)), y]
