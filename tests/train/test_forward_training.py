"""The settings of training by forward passes, as methods share them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from federation import devices, server

from fedlean.train.cohort import sample_cohort
from fedlean.train.forward_training import ForwardTraining, unused


def test_what_clients_are_asked():
    given = ForwardTraining(directions=7, sigma=0.5, micro_batch=3, batch_size=8, scalars="int8")
    asked = given.asked
    assert (asked.probe.directions, asked.probe.sigma, asked.at_once) == (7, 0.5, 3)
    assert (asked.scalars, asked.last_block) == ("int8", "zeroth")
    assert asked.work().forward_examples == 8 * 8 and asked.work({"w": 3}).kept == {"w": 3}


def test_rate_and_cohort():
    given = ForwardTraining(lr=0.2, lr_half_life_rounds=10, cohort=2)
    assert (given.rate(0), given.rate(10)) == (0.2, 0.1)
    drawn = given.clients(server(), devices(), 3)
    assert drawn == sample_cohort(devices(), 2, seed=server().seed, round=3)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"lr": 0.0}, "lr must"),
        ({"lr_half_life_rounds": -1.0}, "lr_half_life_rounds must"),
        ({"optimizer": "sgd"}, "optimizer must be one of"),
        ({"momentum": 1.0}, "momentum must"),
        ({"directions": 0}, "directions must"),
        ({"kind": "cauchy"}, "kind must be one of"),
        ({"cohort": 9}, "a cohort of 9 cannot be drawn from 4 clients"),
        ({"optimizer": "normalised", "directions": 1}, "take directions=2 or more"),
    ],
)
def test_what_is_wrong_is_named(setting, said):
    with pytest.raises(ValueError, match=said):
        ForwardTraining(**setting).check(replace(server(), clients=4))


def test_momentum_is_for_its_optimizer():
    assert set(unused({"optimizer": "adam"})) == {"momentum"}
    assert unused({"optimizer": "momentum"}) == {}
