"""Which examples of a data set are a device's own, and reading only these."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedlean.data.batches import ClientData
from fedlean.data.dataset import Dataset
from fedlean.data.declared import NOTHING, Declared
from fedlean.data.load import load_source
from fedlean.data.partition import Labelled, partition
from fedlean.data.source import Room, unlimited
from fedlean.runtime.remote.room import TooLarge, resident_bytes


@dataclass(frozen=True)
class Share:
    """Client `client` of `clients`, as the partition deals the examples; None: all of them."""

    client: int | None = None
    clients: int = 1
    partition: str = "iid"
    seed: int = 0


def load_share(
    name_or_folder: str,
    share: Share,
    *,
    declared: Declared = NOTHING,
    limit_bytes: int | None = None,
) -> ClientData:
    """The share's training examples, of which alone this process ever holds any.

    The same examples in the same order as `client_share` of the whole set, so that draws are the
    same, bit for bit.  limit_bytes: of the whole process.  Raises TooLarge, before they are read,
    when labels or examples do not fit; ValueError naming what is damaged or does not fit the share.
    """
    source = load_source(name_or_folder, room_under(limit_bytes), declared)
    if not len(source.y_train):
        raise ValueError(
            f"data set {source.name!r} has no training examples, of which a device needs some"
        )
    dataset = source.share(_indices(source, share))
    return ClientData(dataset, np.arange(len(dataset.y_train)))


def client_share(dataset: Dataset, share: Share) -> ClientData:
    """The share of a data set in memory, which is not copied.

    The same partition as in a simulation, so that a device can stand for one of its clients.
    Raises ValueError naming what does not fit.
    """
    return ClientData(dataset, _indices(dataset, share))


def room_under(limit_bytes: int | None) -> Room:
    """Refuses what does not fit beside all that this process holds already."""
    if limit_bytes is None:
        return unlimited

    def room(needed_bytes: int, what: str, remedy: str) -> None:
        free_bytes = limit_bytes - resident_bytes()
        if needed_bytes > free_bytes:
            raise TooLarge(
                f"{what} needs {needed_bytes / 1e6:.1f} MB, {max(0, free_bytes) / 1e6:.1f} MB are"
                f" free under the limit of {limit_bytes / 1e6:.0f} MB: {remedy}, or raise"
                " --memory-limit"
            )

    return room


def _indices(labelled: Labelled, share: Share) -> np.ndarray:
    """Sorted int64 indices of training examples."""
    if share.client is None:
        return np.arange(len(labelled.y_train))
    if not 0 <= share.client < share.clients:
        raise ValueError(
            f"client {share.client} of {share.clients}: expected 0 to the last of them"
        )
    return partition(share.partition, labelled, share.clients, share.seed)[share.client]
