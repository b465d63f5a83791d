"""Freezing rules: movement, slope, smoothing and patience by hand."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest

from fedlean.freezing.rules import movement, never, scalars, slope, slope_of_movement
from fedlean.runtime.checkpoint import load_checkpoint, save_checkpoint

SETTINGS = {"window": 2, "smoothing": 0.5, "values": 2, "threshold": 0.5, "patience": 2}


def followed(rule, values):
    """The states after each of the values of one scalar, which begins at the first."""
    points = [np.array([value], np.float32) for value in values]
    states = [rule.init(points[0])]
    for point in points[1:]:
        states.append(rule.update(states[-1], point))
    return states


def test_movement_by_hand():
    """|1 + 2| + |3 - 1| = 5 of 1 + 2 + 3 + 1 = 7."""
    assert movement(np.array([[1.0, 3.0], [2.0, -1.0]])) == pytest.approx(5 / 7)
    assert movement(np.zeros((4, 3))) == 0.0


@pytest.mark.parametrize("rounds", [2, 6, 7])
def test_a_straight_line_moves_wholly(rounds):
    pace = np.array([0.5, -2.0, 0.25])
    assert movement(np.tile(pace, (rounds, 1))) == 1.0


def test_an_even_oscillation_does_not_move():
    steps = np.array([[1.0, -3.0], [-1.0, 3.0]] * 3)
    assert movement(steps) == 0.0
    assert movement(steps[:5]) == pytest.approx(1 / 5)  # one way of five is left over


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("rounds", [2, 6, 20])
def test_a_random_walk_has_the_floor(rounds, seed):
    """Of normal moves E|Σ_i Δ| = √H E|Δ|, of H E|Δ| in all.

    With 10,000 scalars the ratio has a deviation below 1% of it; five of these are let pass.
    """
    moves = np.random.default_rng(seed).standard_normal((rounds, 10_000))
    assert movement(moves) == pytest.approx(1 / sqrt(rounds), rel=0.05)


def test_slope_by_hand():
    """x = -1, 0, 1 and -1.5 ... 1.5: Σ xy / Σ x²."""
    assert slope([0.0, 4.0, 1.0]) == pytest.approx((0 + 0 + 1) / 2)
    assert slope([1.0, 0.0, 0.0, 3.0]) == pytest.approx((-1.5 + 4.5) / 5)
    assert slope([7.0, 7.0]) == 0.0


def test_a_rule_by_hand():
    """One scalar at 0, 1, 2, 1, 0, 0: moves 1, 1, -1, -1, 0; H = 2, W = 2.

    Movement of two: 1, 0, 1, 1; times √2; smoothed by halves √2·(1, 1/2, 3/4, 7/8); slopes
    √2·(-1/2, 1/4, 1/8), of which the last two are below 1/2 in size.
    """
    states = followed(slope_of_movement(**SETTINGS), [0, 1, 2, 1, 0, 0])
    root = sqrt(2)
    assert states[0]["measured"] == {}
    assert states[1]["measured"] == {"movement": 1.0, "floor": 1.0}  # one move: no window yet
    assert states[2]["measured"] == pytest.approx(
        {"movement": 1.0, "floor": 1 / root, "smoothed": root}
    )
    wanted = [(0.0, 1 / 2, -1 / 2), (1.0, 3 / 4, 1 / 4), (1.0, 7 / 8, 1 / 8)]
    for state, (moved, smoothed, fitted) in zip(states[3:], wanted, strict=True):
        assert state["measured"] == pytest.approx(
            {
                "movement": moved,
                "floor": 1 / root,
                "smoothed": smoothed * root,
                "slope": fitted * root,
            }
        )
    assert [state["quiet"] for state in states] == [0, 0, 0, 0, 1, 2]
    assert [state["frozen"] for state in states] == [False] * 5 + [True]


def test_patience_begins_again_after_a_jump():
    """After two straight moves the slope is 0; then one turn, and quiet again."""
    rule = slope_of_movement(**SETTINGS | {"smoothing": 0.0, "patience": 2})
    states = followed(rule, [0, 1, 2, 3, 2, 1, 0, -1])
    # movement: 1, 1, 0, 1, 1, 1 over two moves each; slopes √2·(0, -1, 1, 0, 0)
    assert [state["quiet"] for state in states[3:]] == [1, 0, 0, 1, 2]
    assert [state["frozen"] for state in states] == [False] * 7 + [True]


def test_an_update_leaves_the_state_before_it():
    rule = slope_of_movement(**SETTINGS)
    held = np.zeros(2, np.float32)
    before = rule.init(held)
    held += 1  # the caller's array is not the state's
    rule.update(before, held)
    assert before["moves"].shape == (0, 2) and not before["last"].any()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"window": 1}, "window must be an integer of at least 2"),
        ({"values": 1}, "values must be an integer of at least 2"),
        ({"patience": 0}, "patience must be an integer of at least 1"),
        ({"smoothing": 1.0}, "smoothing must lie in"),
        ({"threshold": 0.0}, "threshold must lie in"),
    ],
)
def test_settings_out_of_range(changed, message):
    with pytest.raises(ValueError, match=message):
        slope_of_movement(**SETTINGS | changed)


def test_never():
    rule = never()
    state = rule.init(np.zeros(3, np.float32))
    for value in range(50):
        state = rule.update(state, np.full(3, value, np.float32))
    assert state == {"frozen": False, "measured": {}}


PARAMS = {
    "b.weight": np.arange(100, 160, dtype=np.float32).reshape(6, 10),
    "a.weight": np.arange(40, dtype=np.float32),
    "other": np.full(9, -1, np.float32),
}


def test_few_scalars_are_all_of_them_in_the_order_of_names():
    got = scalars(PARAMS, ["b.weight", "a.weight"], at_most=100, seed=3)
    np.testing.assert_array_equal(got, [*range(40), *range(100, 160)])


def test_sampled_scalars_are_the_same_ones_at_every_call():
    names = frozenset({"a.weight", "b.weight"})
    got = scalars(PARAMS, names, at_most=17, seed=3)
    assert got.dtype == np.float32 and len(set(got.tolist())) == 17
    every = {*range(40), *range(100, 160)}
    assert set(got.tolist()) <= every
    later = {name: value + 1000 for name, value in PARAMS.items()}
    np.testing.assert_array_equal(scalars(later, sorted(names), at_most=17, seed=3), got + 1000)
    assert not np.array_equal(scalars(PARAMS, names, at_most=17, seed=4), got)


@pytest.mark.parametrize("count", [2, 6])
def test_states_survive_a_checkpoint(tmp_path, count):
    """A rule goes on from what was stored as if it had never stopped."""
    rule = slope_of_movement(**SETTINGS)
    values = [0, 1, 2, 1, 0, 0, 3, 2]
    states = followed(rule, values[:count])
    save_checkpoint(tmp_path, 1, {"rule": states[-1], "never": never().init(np.zeros(1))})
    restored, skipped = load_checkpoint(tmp_path)
    assert not skipped and restored["never"] == {"frozen": False, "measured": {}}
    one, other = states[-1], restored["rule"]
    for value in values[count:]:
        point = np.array([value], np.float32)
        one, other = rule.update(one, point), rule.update(other, point)
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(other[key], one[key])
