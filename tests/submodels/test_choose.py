"""Prefix, rolling window and random ids."""

from __future__ import annotations

import numpy as np
import pytest

from fedlean.submodels.choose import prefix, random, rolling


def test_prefixes_are_nested():
    assert prefix("conv1", 8, 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("offset", "ids"), [(0, [0, 1, 2]), (2, [2, 3, 4]), (3, [0, 3, 4]), (14, [0, 1, 4])]
)
def test_the_window_rolls_and_wraps(offset: int, ids: list[int]):
    assert rolling(offset)("conv1", 5, 3).tolist() == ids


@pytest.mark.parametrize(("count", "kept"), [(5, 3), (7, 1), (8, 7), (6, 3)])
def test_in_as_many_rounds_as_channels_all_are_kept_equally_often(count: int, kept: int):
    seen = np.bincount(np.concatenate([rolling(r)("c", count, kept) for r in range(3, 3 + count)]))
    assert seen.tolist() == [kept] * count


def test_random_ids():
    ids = random(5)("conv1", 40, 10)
    assert ids.size == 10 and (np.diff(ids) > 0).all() and ids[0] >= 0 and ids[-1] < 40
    assert np.array_equal(ids, random(5)("conv1", 40, 10))
    assert not np.array_equal(ids, random(6)("conv1", 40, 10))
    assert not np.array_equal(ids, random(5)("conv2", 40, 10))


def test_random_ids_are_uniform():
    seen = np.bincount(np.concatenate([random(seed)("c", 5, 2) for seed in range(500)]))
    assert np.abs(seen - 200).max() < 50  # 4.6 standard deviations
