"""When g² is taken and of what, by hand."""

from __future__ import annotations

import pytest
from federation import SPEC

from fedlean.engine.pieces import sweep
from fedlean.pruning.reconfiguration_rounds import Rounds, SizeLimit

FOUR_PARTS = 1000
assert len(sweep(SPEC, FOUR_PARTS)) == 4


def taking(rounds):
    return [round for round in range(1, rounds.total + 1) if rounds.takes_importance(round)]


@pytest.mark.parametrize(
    ("importance", "expected"), [(1, [4, 8]), (2, [3, 4, 7, 8]), (0, [*range(1, 9)])]
)
def test_all_at_once(importance, expected):
    """Reconfigurations after rounds 4 and 8 of 10."""
    rounds = Rounds(SPEC, 10, 4, importance, local_steps=5)
    assert [r for r in range(1, 11) if rounds.reconfigures(r)] == [4, 8]
    assert taking(rounds) == expected
    assert rounds.orders(4) == {"importance": True, "upload_importance": True}
    assert rounds.orders(9) == {"importance": False, "upload_importance": False}


@pytest.mark.parametrize(
    ("importance", "steps", "expected"),
    [
        (1, 5, {8: 0}),  # all four in one round
        (1, 3, {7: 0, 8: 3}),
        (1, 1, {5: 0, 6: 1, 7: 2, 8: 3}),
        (5, 2, {5: 0, 6: 2, 7: 0, 8: 2}),  # two sweeps fit into five rounds
        (0, 3, {1: 0, 2: 3, 3: 0, 4: 3, 5: 0, 6: 3, 7: 0, 8: 3}),
        (99, 3, {1: 0, 2: 3, 3: 0, 4: 3, 5: 0, 6: 3, 7: 0, 8: 3}),
    ],
)
def test_whole_sweeps_end_with_the_round_of_the_reconfiguration(importance, steps, expected):
    rounds = Rounds(SPEC, 10, 8, importance, steps, FOUR_PARTS)
    assert {round: rounds.first_part(round) for round in taking(rounds)} == expected
    for round, first in expected.items():
        orders = rounds.orders(round)
        assert (orders["piece_bytes"], orders["first_piece"]) == (FOUR_PARTS, first)


def test_a_sweep_must_fit():
    Rounds(SPEC, 10, 2, 1, 2, FOUR_PARTS)
    with pytest.raises(ValueError, match=r"4 parts.*4 rounds of 1 steps.*reconfigure_every is 3"):
        Rounds(SPEC, 10, 3, 1, 1, FOUR_PARTS)
    Rounds(SPEC, 10, 0, 1, 1, FOUR_PARTS)  # never


def test_the_limit_is_that_of_the_tightest_round_until_the_next():
    """840 prunable weights: 0.5 to 0.3 over 10 rounds is 0.02 a round."""
    size = SizeLimit(Rounds(SPEC, 10, 4, 1, 5), 0.5, 0.3)
    assert [size.kept(round) for round in (0, 4, 8)] == [352, 285, 252]
    assert SizeLimit(size.rounds, 0.5, None).kept(8) == 420
    assert SizeLimit(size.rounds, None, None).kept(0) is None
    with pytest.raises(ValueError, match="size_target needs a size_limit"):
        SizeLimit(size.rounds, None, 0.3)
