"""Lines about a run that its user should read: nothing is wrong, but perhaps not as intended."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from fedlean.core import Masks
from fedlean.data.dataset import Dataset
from fedlean.spec import ModelSpec

NAMED = 3  # clients or layers that a line names, of many


def about_model(spec: ModelSpec, dataset: Dataset) -> list[str]:
    """An output layer that is larger than the data set needs."""
    outputs = spec.output_shape[0]
    if outputs == dataset.classes:
        return []
    return [f"the model has {outputs} outputs for {dataset.classes} classes: the others stay idle"]


def about_shares(dataset: Dataset, shares: Sequence[np.ndarray], partition: str) -> list[str]:
    """Merged clients, classes that nobody trains, and clients that lack some of the others.

    shares: per client, indices (n,) into the training set.
    """
    lines = []
    ids = 0 if dataset.clients is None else len(np.unique(dataset.clients))
    if partition == "natural" and ids > len(shares):
        lines.append(
            f"{ids} client ids of the data are merged into {len(shares)} clients: leave --clients "
            "out for one client per id"
        )
    unseen = [name for name in dataset.class_names if name not in dataset.labels_held]
    if unseen:
        lines.append(f"no training example has the class {some(unseen)}: it cannot be learnt")
    trained = len(dataset.labels_held)
    lacking = [
        f"client {client} lacks {trained - len(classes)}"
        for client, share in enumerate(shares)
        if len(classes := np.unique(dataset.y_train[share])) < trained
    ]
    if lacking:
        lines.append(
            f"{len(lacking)} of {len(shares)} clients have no example of some of the {trained} "
            f"classes: {some(lacking)}"
        )
    return lines


def about_masks(masks: Masks) -> list[str]:
    """Layers whose every weight is pruned."""
    empty = [name for name, mask in masks.items() if not mask.any()]
    if not empty:
        return []
    return [
        f"no weight of {some(empty)} is kept, so that nothing reaches the layers behind: choose a "
        "higher density"
    ]


def some(names: Collection[str]) -> str:
    """The first of them, and how many more there are."""
    shown = ", ".join(list(names)[:NAMED])
    return shown if len(names) <= NAMED else f"{shown} and {len(names) - NAMED} more"
