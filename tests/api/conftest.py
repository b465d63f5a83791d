"""What the tests of the door share: sensor-like pictures of three classes."""

from __future__ import annotations

import numpy as np
import pytest

import fedlean as fl

CLASSES, SIDE = 3, 6


def examples(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """x float64 (n, 1, 6, 6), far from mean 0 and deviation 1, and y int (n,); easily learnt."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, CLASSES, count)
    x = rng.normal(40, 3, (count, 1, SIDE, SIDE))
    x[np.arange(count), 0, 2 * y] += 9
    return x, y


@pytest.fixture(scope="session")
def data() -> fl.Dataset:
    x, y = examples(240)
    return fl.Dataset.from_arrays(x, y, clients=np.arange(240) % 4, test=examples(90, 1))
