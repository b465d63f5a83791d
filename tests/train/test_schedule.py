"""The learning rate over rounds, by hand."""

from __future__ import annotations

from math import cos, pi

import pytest
from federation import server

from fedlean.methods.fedavg import fedavg
from fedlean.train.forward_training import ForwardTraining
from fedlean.train.local_sgd import LocalSGD
from fedlean.train.schedule import LEAST_SHARE, Schedule


def rates(schedule: Schedule, rounds: int) -> list[float]:
    return [schedule.rate(done) for done in range(rounds)]


@pytest.mark.parametrize("done", [0, 1, 10_000])
def test_it_is_constant_unless_said_otherwise(done):
    assert Schedule(0.25).rate(done) == 0.25


def test_halved_every_ten_rounds():
    """After 5 it is 0.8/√2."""
    halved = Schedule(0.8, half_life_rounds=10)
    assert [halved.rate(done) for done in (0, 10, 20, 30)] == [0.8, 0.4, 0.2, 0.1]
    assert halved.rate(5) == pytest.approx(0.8 / 2**0.5, rel=1e-12)


def test_cosine_of_four_rounds():
    """(1 + cos(π·t/4))/2 for t = 0, 1, 2, 3; a fifth round has what the fourth had."""
    last = (1 + cos(3 * pi / 4)) / 2
    expected = [1.0, (1 + 0.5**0.5) / 2, 0.5, last, last]
    assert rates(Schedule(1.0, shape="cosine:4"), 5) == pytest.approx(expected, rel=1e-12)


def test_steps_of_three_rounds_by_a_tenth():
    expected = [2.0, 2.0, 2.0, 0.2, 0.2, 0.2, 0.02]
    assert rates(Schedule(2.0, shape="step:3:0.1"), 7) == pytest.approx(expected, rel=1e-12)
    assert Schedule(2.0, shape="step:1:0.1").rate(10**6) == 2.0 * LEAST_SHARE


def test_warm_up_of_three_rounds_before_cosine():
    """A quarter, a half, three quarters of what there would be without it."""
    warm, cold = (rates(Schedule(1.0, 0, "cosine:6", of), 6) for of in (3, 0))
    shares = [0.25, 0.5, 0.75, 1, 1, 1]
    assert warm == pytest.approx([s * c for s, c in zip(shares, cold, strict=True)], rel=1e-12)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr_schedule": "linear"}, "lr_schedule must be constant, cosine:ROUNDS or step"),
        ({"lr_schedule": "cosine"}, "lr_schedule must be constant, cosine:ROUNDS or step"),
        ({"lr_schedule": "cosine:0"}, "whole number of rounds of 1 or more, got 'cosine:0'"),
        ({"lr_schedule": "cosine:1e3"}, "whole number of rounds"),
        ({"lr_schedule": "step:9:nan"}, r"factor in \(0, 1\], got 'step:9:nan'"),
        ({"lr_schedule": "step:9:2"}, r"factor in \(0, 1\]"),
        ({"lr_schedule": "constant:5"}, "lr_schedule must be"),
        ({"lr_warmup_rounds": -1}, "lr_warmup_rounds must be an integer of at least 0"),
        ({"lr_half_life_rounds": float("nan")}, "lr_half_life_rounds must lie in"),
    ],
)
def test_what_is_wrong_is_named(settings, said):
    for record in (LocalSGD, ForwardTraining):
        with pytest.raises(ValueError, match=said):
            record(**settings).check(server())


def test_clients_are_told_the_rate_of_their_round():
    sgd = LocalSGD(lr=0.2, lr_schedule="step:2:0.5", lr_warmup_rounds=1)
    assert [sgd.hparams(done)["lr"] for done in range(4)] == [0.1, 0.2, 0.1, 0.1]
    assert ForwardTraining(lr=0.2, lr_schedule="step:2:0.5").rate(2) == 0.1
    assert fedavg(server(), lr_schedule="cosine:100") is not None
