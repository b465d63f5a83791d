"""A small data set whose every image shows its own index, so that tests can tell examples apart."""

from __future__ import annotations

import numpy as np
import pytest

from fedlean.data.dataset import Dataset


def make_dataset(
    labels: np.ndarray, clients: np.ndarray | None = None, classes: int | None = None
) -> Dataset:
    x = np.arange(len(labels), dtype=np.float32)[:, None, None, None]
    y = labels.astype(np.int64)
    return Dataset.from_images(
        "indexed",
        (x, y),
        (x, y),
        classes=classes or int(y.max()) + 1,
        scale=1.0,
        clients=clients,
    )


@pytest.fixture
def make():
    """make(labels, clients=None): see `make_dataset`."""
    return make_dataset


@pytest.fixture(scope="session")
def balanced() -> Dataset:
    """1,000 examples of 10 classes with 40 natural clients of uneven sizes."""
    rng = np.random.default_rng(0)
    clients = np.sort(rng.integers(0, 40, 1000)).astype(np.int32)
    clients[:40] = np.arange(40)
    return make_dataset(np.arange(1000) % 10, clients)
