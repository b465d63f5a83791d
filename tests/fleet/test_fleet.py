"""Fleets: pure functions of seed and step, and what each device of one is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedlean.algorithm import Device
from fedlean.core import generator
from fedlean.cost.profile import load_profile
from fedlean.fleet.fleet import Fleet, Member, Timeline, always
from fedlean.fleet.quantity import Quantity

PI = load_profile("raspberry_pi_4")
MEMORY = Quantity((40e6, 300e6), "uniform")


def drawn(redrawn="round"):
    return Fleet((always(Member(PI, {"memory_bytes": replace(MEMORY, redrawn=redrawn)})),), None)


def memories(fleet, seed, step, clients=20):
    return [device.memory_bytes or 0 for device in fleet.present(seed, step, clients)]


def test_a_fleet_says_nothing_but_its_profile():
    assert Fleet((always(Member(PI)),), None).present(0, 1, 2) == [
        Device(0, profile=PI, memory_bytes=PI.memory_bytes),
        Device(1, profile=PI, memory_bytes=PI.memory_bytes),
    ]


def test_drawn_memory_is_a_pure_function_of_seed_and_step():
    fleet = drawn()
    later = memories(fleet, 3, 5)
    assert memories(drawn(), 3, 5) == later  # whatever was asked before, by another object
    assert memories(fleet, 3, 4) != later
    assert memories(fleet, 4, 5) != later
    assert memories(fleet, 3, 5, 7) == later[:7]  # a device does not depend on its company
    assert all(40e6 <= each <= 300e6 for each in later)
    assert len(set(later)) == 20


def test_drawn_numbers_are_those_of_the_derived_generator():
    share = generator(3, 5, 2, "fleet memory_bytes").random()
    assert memories(drawn(), 3, 5)[2] == int(40e6 + 260e6 * share)


def test_numbers_drawn_once_stay():
    fleet = drawn("once")
    assert memories(fleet, 3, 1) == memories(fleet, 3, 99)
    assert memories(fleet, 4, 1) != memories(fleet, 3, 1)


def test_the_distributions_have_their_means():
    given = {
        "uniform": ((10.0, 30.0), 20.0),
        "loguniform": ((1.0, 100.0), 99 / 4.605170186),  # (high - low) / ln(high / low)
        "choice": ((1.0, 2.0, 6.0), 3.0),
    }
    for name, (numbers, mean) in given.items():
        values = [Quantity(numbers, name).value(0, step, 0, "x") for step in range(4000)]
        assert min(numbers) <= min(values) and max(values) <= max(numbers)
        assert sum(values) / 4000 == pytest.approx(mean, rel=0.05)
        assert len(set(values)) == (3 if name == "choice" else 4000)


def test_quantities_of_a_device_are_independent():
    own = {
        name: Quantity((1.0, 2.0), "uniform")
        for name in ("uplink_bytes_per_second", "downlink_bytes_per_second")
    }
    (device,) = Fleet((always(Member(PI, own)),), 1).present(0, 1, 1)
    assert device.profile is not None
    assert device.profile.uplink_bytes_per_s != device.profile.downlink_bytes_per_s


def test_link_memory_and_speed_differ_from_the_profile_and_nothing_else():
    numbers = {
        "memory_bytes": 5e7,
        "uplink_bytes_per_second": 2e5,
        "downlink_bytes_per_second": 3e5,
        "compute_factor": 2.0,
    }
    own = {name: Quantity((value,)) for name, value in numbers.items()}
    (device,) = Fleet((always(Member(PI, own)),), 1).present(0, 1, 1)
    assert device == Device(
        0,
        profile=replace(
            PI,
            uplink_bytes_per_s=2e5,
            downlink_bytes_per_s=3e5,
            dense_flops_per_s=PI.dense_flops_per_s * 2,
            sparse_conv_seconds_per_flop=PI.sparse_conv_seconds_per_flop / 2,
            sparse_linear_seconds_per_flop=PI.sparse_linear_seconds_per_flop / 2,
            sparse_seconds_per_activation=PI.sparse_seconds_per_activation / 2,
        ),
        memory_bytes=50_000_000,
    )


def test_devices_are_there_with_their_probability_anew_at_each_step():
    fleet = Fleet((always(Member(PI, {"present": Quantity((0.3,))})),), None)
    there = [[device.id for device in fleet.present(0, step, 50)] for step in range(1, 41)]
    assert len({tuple(ids) for ids in there}) > 30
    assert sum(map(len, there)) == pytest.approx(0.3 * 2000, rel=0.1)
    never, ever = (
        Fleet((always(Member(PI, {"present": Quantity((share,))})),), None) for share in (0.0, 1.0)
    )
    assert never.present(0, 1, 50) == []
    assert len(ever.present(0, 1, 50)) == 50


def test_a_timeline_holds_until_its_next_member_and_is_away_before_the_first():
    one, two = (Member(PI, {"memory_bytes": Quantity((value,))}) for value in (1e6, 2e6))
    fleet = Fleet((Timeline((3, 5), (one, two)),), 1)
    assert [memories(fleet, 0, step, 1) for step in (1, 2, 3, 4, 5, 99)] == [
        [],
        [],
        [1_000_000],
        [1_000_000],
        [2_000_000],
        [2_000_000],
    ]


def test_a_fleet_of_another_size_than_the_run_is_refused():
    fleet = Fleet((always(Member(PI)),) * 3, 3)
    with pytest.raises(ValueError, match="the fleet has 3 devices, the run has 4 clients"):
        fleet.present(0, 1, 4)
