"""The online search: every formula by hand, and its bound on the regret."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlean.pruning.size_search import (
    PATIENCE,
    WINDOW,
    derivative_sign,
    next_size,
    probe_size,
    search_within,
    step_size,
)

SEARCH = search_within(0.1, 1.0)  # B = 0.9


def test_steps_shrink_with_the_decisions_since_the_interval_changed():
    """B / √(2 (m - m₀)): 0.9/2 at 2, 0.9/4 at 8, and again 0.9/2 at 10 when m₀ = 8."""
    assert step_size(SEARCH, 2) == pytest.approx(0.45)
    assert step_size(SEARCH, 8) == pytest.approx(0.225)
    assert step_size(replace(SEARCH, since=8), 10) == pytest.approx(0.45)
    with pytest.raises(ValueError, match="after 8, got 8"):
        step_size(replace(SEARCH, since=8), 8)


def test_the_probe_is_half_a_step_below_and_has_a_floor():
    """0.8 - 0.45/2; 0.15 - 0.45/2 < 0, so a tenth of the interval's lower end."""
    assert probe_size(SEARCH, 0.8, 2) == pytest.approx(0.575)
    assert probe_size(SEARCH, 0.15, 2) == pytest.approx(0.01)


@pytest.mark.parametrize(
    "sign, size, expected",
    [(1, 0.8, 0.35), (-1, 0.4, 0.85), (0, 0.4, 0.4), (1, 0.3, 0.1), (-1, 0.8, 1.0)],
)
def test_a_move_by_hand(sign, size, expected):
    """P_K(k - 0.45 s) on K = [0.1, 1]."""
    search, moved = next_size(SEARCH, size, 2, sign)
    assert moved == pytest.approx(expected)
    assert (search.moves, search.smallest, search.largest) == (1, moved, moved)


@pytest.mark.parametrize(
    "end_loss, probe_loss, probe_seconds, expected",
    [
        (1.0, 1.5, 6.0, -1),  # τ(k') = 6 · 1 / 0.5 = 12 > 10
        (1.0, 1.5, 5.0, 0),  # 10
        (1.0, 1.25, 6.0, 1),  # 6 · 1 / 0.75 = 8 < 10
        (1.0, 0.5, 9.0, 1),  # the smaller one is even better: 9 · 1 / 1.5 = 6
        (2.0, 1.5, 6.0, None),  # the loss did not fall at k
        (1.0, 2.0, 6.0, None),  # nor at k'
        (2.5, 2.25, 6.0, None),
    ],
)
def test_the_sign_by_hand(end_loss, probe_loss, probe_seconds, expected):
    """T(k) = 10 s, L₀ = 2."""
    sign = derivative_sign(
        start_loss=2.0,
        end_loss=end_loss,
        probe_loss=probe_loss,
        seconds=10.0,
        probe_seconds=probe_seconds,
    )
    assert sign == expected


LOSS = st.integers(1, 60).map(lambda n: n / 64)


@given(LOSS, LOSS, st.integers(1, 64), st.integers(1, 64))
def test_the_sign_is_who_decreases_the_loss_faster(end, probe, seconds, probe_seconds):
    """From L₀ = 1: (1 - L')/T' against (1 - L)/T, in integers."""
    decrease, probe_decrease = 64 - int(end * 64), 64 - int(probe * 64)
    left, right = probe_decrease * seconds, decrease * probe_seconds
    sign = derivative_sign(
        start_loss=1.0,
        end_loss=end,
        probe_loss=probe,
        seconds=float(seconds),
        probe_seconds=float(probe_seconds),
    )
    if left != right:  # the quotient is rounded
        assert sign == (left > right) - (left < right)


def test_without_an_estimate_it_waits_and_then_grows():
    """Eleven times it stays, the twelfth adds δ_24 = 0.9/√48 = 0.1299."""
    search, size = SEARCH, 0.5
    for m in range(13, 13 + PATIENCE):
        search, size = next_size(search, size, m, None)
        assert size == 0.5 and search.moves == 0
    assert search.waited == PATIENCE == 11
    search, size = next_size(search, size, 24, None)
    assert size == pytest.approx(0.5 + 0.9 / sqrt(48))
    assert (search.waited, search.moves) == (0, 1)


def test_an_estimate_ends_the_wait():
    waiting = replace(SEARCH, waited=7)
    assert next_size(waiting, 0.5, 2, 0)[0].waited == 0


def last_move(smallest, largest, **fields):
    """The search after the move that fills its window, of which it has seen these sizes."""
    full = replace(SEARCH, moves=WINDOW - 1, smallest=smallest, largest=largest, **fields)
    return next_size(full, smallest, 40, 0)[0]


def test_the_interval_is_refitted_around_what_was_visited():
    """Visited [0.3, 0.36]: K' = [0.2, 0.54], B' = 0.34 <= (√2 - 1)·0.9 = 0.3728."""
    after = last_move(0.3, 0.36)
    assert (after.low, after.high) == pytest.approx((0.2, 0.54))
    assert (after.since, after.lasted, after.moves) == (40, 40, 0)
    assert (after.smallest, after.largest) == (1.0, 0.0)
    assert step_size(after, 41) == pytest.approx(0.34 / sqrt(2))


def test_the_refitted_interval_stays_within_the_first():
    """Visited [0.11, 0.2]: [0.0733, 0.3] is cut to [0.1, 0.3]; [0.8, 0.9] to [0.533, 1] is wide."""
    assert (last_move(0.11, 0.2).low, last_move(0.11, 0.2).high) == pytest.approx((0.1, 0.3))
    assert last_move(0.8, 0.9).low == 0.1


@pytest.mark.parametrize(
    "smallest, largest, fields",
    [
        (0.3, 0.39, {}),  # B' = 0.385 > 0.3728
        (0.3, 0.36, {"since": 30, "lasted": 11}),  # K has held for 10 decisions, the last for 11
    ],
)
def test_the_interval_stays_where_refitting_does_not_pay(smallest, largest, fields):
    after = last_move(smallest, largest, **fields)
    assert (after.low, after.high) == (0.1, 1.0)
    assert (after.moves, after.smallest, after.largest) == (0, 1.0, 0.0)
    assert after.since == fields.get("since", 0)


def test_twenty_moves_fill_the_window():
    """At 0.3 throughout: K' = [0.2, 0.45] after the twentieth."""
    search = SEARCH
    for m in range(1, WINDOW + 1):
        assert search.high == 1.0
        search, _ = next_size(search, 0.3, m, 0)
    assert (search.low, search.high, search.since) == pytest.approx((0.2, 0.45, 20))


@given(st.floats(0.1, 1.0), st.floats(0.1, 1.0))
def test_regret_is_at_most_b_sqrt_2m(best, size):
    """True signs of |k - best|: Σ |k_m - best| <= B √(2M), while K stays (M < 20)."""
    search, regret = SEARCH, 0.0
    for m in range(1, WINDOW):
        regret += abs(size - best)
        search, size = next_size(search, size, m, (size > best) - (size < best))
        assert regret <= 0.9 * sqrt(2 * m) + 1e-9


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (0.5, 0.4), (0.1, 1.1)])
def test_bounds_that_are_none(bounds):
    with pytest.raises(ValueError, match="0 < lowest <= highest <= 1"):
        search_within(*bounds)
