"""Which examples of a data set are a device's own."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fedlean.data.batches import ClientData
from fedlean.data.dataset import Dataset
from fedlean.data.partition import partition


@dataclass(frozen=True)
class Share:
    """Client `client` of `clients`, as the partition deals the examples; None: all of them."""

    client: int | None = None
    clients: int = 1
    partition: str = "iid"
    seed: int = 0


def client_share(dataset: Dataset, share: Share) -> ClientData:
    """Raises ValueError naming what does not fit.

    The same partition as in a simulation, so that a device can stand for one of its clients.
    """
    if share.client is None:
        return ClientData(dataset, np.arange(len(dataset.y_train)))
    if not 0 <= share.client < share.clients:
        raise ValueError(
            f"client {share.client} of {share.clients}: expected 0 to the last of them"
        )
    parts = partition(share.partition, dataset, share.clients, share.seed)
    return ClientData(dataset, parts[share.client])


def own(data: ClientData) -> ClientData:
    """The same client with a copy of its own examples only: those of the others can be freed.

    Draws are by position, so they stay the same, bit for bit.  Of the test set, which a device does
    not use, one example stays.
    """
    whole, chosen = data.dataset, data.indices
    if len(chosen) == len(whole.y_train):
        return data
    kept = replace(
        whole,
        x_train=whole.x_train[chosen],
        y_train=whole.y_train[chosen],
        x_test=whole.x_test[:1].copy(),
        y_test=whole.y_test[:1].copy(),
        clients=None,
    )
    return ClientData(kept, np.arange(len(chosen)))
