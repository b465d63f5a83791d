"""Prefix, rolling window and random ids."""

from __future__ import annotations

from itertools import pairwise

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


@pytest.mark.parametrize(("count", "kept", "once"), [(6, 3, 2), (8, 2, 4), (5, 3, 5), (6, 4, 3)])
def test_by_windows_all_are_kept_equally_often_in_a_shorter_cycle(count, kept, once):
    """After count / gcd(count, kept) moves; once each where the windows fill the space."""
    windows = [rolling(m, by="window")("c", count, kept) for m in range(once)]
    assert np.bincount(np.concatenate(windows)).tolist() == [kept * once // count] * count
    assert np.array_equal(rolling(once, by="window")("c", count, kept), windows[0])


@pytest.mark.parametrize(("by", "cycle"), [("channel", 6), ("window", 2)])
def test_an_order_holds_for_a_cycle_and_is_new_in_the_next(by, cycle):
    """A window of 3 of 6; what comes in as it moves by one was last in the order."""
    seen = [rolling(m, by=by, shuffle_seed=7)("c", 6, 3) for m in range(3 * cycle)]
    cycles = [seen[at : at + cycle] for at in range(0, 3 * cycle, cycle)]
    for each in cycles:
        assert np.bincount(np.concatenate(each)).tolist() == [3 * cycle // 6] * 6
        for one, other in pairwise(each):
            assert len(set(one.tolist()) & set(other.tolist())) == (2 if by == "channel" else 0)
    assert len({tuple(each[0].tolist()) for each in cycles}) > 1
    assert not np.array_equal(seen[0], rolling(0, by=by, shuffle_seed=8)("c", 6, 3))
    assert not np.array_equal(seen[0], rolling(0, by=by, shuffle_seed=7)("d", 6, 3))


def test_random_ids():
    ids = random(5)("conv1", 40, 10)
    assert ids.size == 10 and (np.diff(ids) > 0).all() and ids[0] >= 0 and ids[-1] < 40
    assert np.array_equal(ids, random(5)("conv1", 40, 10))
    assert not np.array_equal(ids, random(6)("conv1", 40, 10))
    assert not np.array_equal(ids, random(5)("conv2", 40, 10))


def test_random_ids_are_uniform():
    seen = np.bincount(np.concatenate([random(seed)("c", 5, 2) for seed in range(500)]))
    assert np.abs(seen - 200).max() < 50  # 4.6 standard deviations
