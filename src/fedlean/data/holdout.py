"""A test set for data that comes without one: a share of its examples, the same ones every time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedlean.data.source import Source
from fedlean.data.stratify import stratified_sample

SEED = 0  # fixed: runs with different seeds must be tested on the same examples


def hold_out(source: Source, share: float) -> Source:
    """The source with a share of its training examples for testing, in the classes' proportions.

    Raises ValueError when it has test examples already, or too few examples for such a share.
    """
    total, count = len(source.y_train), round(share * len(source.y_train))
    if len(source.y_test):
        raise ValueError(
            f"data set {source.name!r} has {len(source.y_test)} test examples of its own: leave out"
            " --test-share"
        )
    if not 0 < count < total:
        raise ValueError(
            f"data set {source.name!r}: a share of {share:g} of {total} examples is {count},"
            " expected at least one for testing and one for training"
        )
    test = stratified_sample(source.y_train, count, SEED)
    train = np.setdiff1d(np.arange(total), test)

    def read(wanted: np.ndarray, tested: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x, _ = source.read(np.concatenate([train[wanted], test[tested]]), np.empty(0, np.int64))
        return x[: len(wanted)], x[len(wanted) :]

    return replace(
        source,
        y_train=source.y_train[train],
        y_test=source.y_train[test],
        clients=None if source.clients is None else source.clients[train],
        read=read,
    )
