"""Runs in turns: the order of steps, ends, failures."""

from __future__ import annotations

import pytest

from fedlean.runtime.turns import in_turns


def test_a_step_of_each_in_turn_until_each_is_done():
    order = []

    def run(name, steps):
        def go(hand_on):
            for step in range(steps):
                order.append((name, step))
                hand_on()

        return go

    in_turns([run("a", 2), run("b", 4), run("c", 1)])
    assert order == [("a", 0), ("b", 0), ("c", 0), ("a", 1), ("b", 1), ("b", 2), ("b", 3)]


def test_a_run_that_is_already_done_takes_no_turn():
    order = []

    def go(hand_on):
        order.append(1)
        hand_on()
        order.append(2)

    in_turns([lambda hand_on: None, go])
    assert order == [1, 2]


@pytest.mark.parametrize("error", [ValueError("no room"), KeyboardInterrupt()])
def test_a_failure_stops_the_others_at_their_next_step(error):
    steps = []

    def fails(hand_on):
        hand_on()
        raise error

    def endless(hand_on):
        while True:
            steps.append(1)
            hand_on()

    with pytest.raises(type(error)):
        in_turns([fails, endless])
    assert len(steps) <= 2
