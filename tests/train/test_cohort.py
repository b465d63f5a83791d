"""Cohorts."""

from __future__ import annotations

from collections import Counter

import pytest

from fedlean.algorithm import Device
from fedlean.train.cohort import devices_of, sample_cohort

DEVICES = [Device(id) for id in (9, 4, 30, 2, 17, 11, 5)]
IDS = sorted(device.id for device in DEVICES)


@pytest.mark.parametrize("size", [None, 7, 8, 1000])
def test_all(size):
    assert sample_cohort(DEVICES, size, seed=0, round=0) == IDS


@pytest.mark.parametrize("size", range(1, 7))
def test_sorted_distinct_and_present(size):
    for round in range(30):
        cohort = sample_cohort(DEVICES, size, seed=0, round=round)
        assert len(cohort) == size
        assert cohort == sorted(set(cohort))
        assert set(cohort) <= set(IDS)


def test_pure_in_seed_round_and_devices():
    first = sample_cohort(DEVICES, 3, seed=5, round=8)
    assert sample_cohort(DEVICES, 3, seed=5, round=8) == first
    assert sample_cohort(DEVICES[::-1], 3, seed=5, round=8) == first  # whatever their order


def test_rounds_and_seeds_differ():
    by_round = {tuple(sample_cohort(DEVICES, 3, seed=0, round=round)) for round in range(40)}
    by_seed = {tuple(sample_cohort(DEVICES, 3, seed=seed, round=0)) for seed in range(40)}
    assert len(by_round) > 20 and len(by_seed) > 20


def test_only_those_present():
    present = DEVICES[:4]
    ids = {device.id for device in present}
    for round in range(50):
        assert set(sample_cohort(present, 2, seed=0, round=round)) <= ids
    assert sample_cohort([], 3, seed=0, round=0) == []


def test_uniform():
    """3 of 7 in 7000 rounds: 3000 each, standard deviation 41; all 35 cohorts 200, deviation 14."""
    cohorts = [sample_cohort(DEVICES, 3, seed=0, round=round) for round in range(7000)]
    single = Counter(id for cohort in cohorts for id in cohort)
    assert set(single) == set(IDS)
    assert all(abs(count - 3000) < 5 * 41.4 for count in single.values())
    together = Counter(map(tuple, cohorts))
    assert len(together) == 35
    assert all(abs(count - 200) < 5 * 13.9 for count in together.values())


def test_devices_in_the_order_of_their_ids():
    there = [Device(7), Device(3), Device(5)]
    assert [device.id for device in devices_of(there, [3, 7])] == [3, 7]
    assert devices_of(there, []) == []
