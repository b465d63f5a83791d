"""Which clients are asked less often, by hand."""

from __future__ import annotations

import pytest

from fedlean.runtime.remote.patience import MOST_STEPS, Patience

ALL = range(6)


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def patience(lines) -> Patience:
    return Patience(lines.append)


def asked(patience: Patience, client: int, steps: range) -> list[int]:
    """In which steps a client that never answers is asked."""
    found = []
    for step in steps:
        if client not in patience.left_out(ALL, step, least=1):
            found.append(step)
            patience.missed(client, step)
    return found


def test_the_pause_doubles_with_each_miss_up_to_a_bound(patience):
    """1, 2, 4, 8, 16, 32, 32 steps between."""
    expected = [1, 3, 6, 11, 20, 37, 70, 103]
    assert asked(patience, 2, range(1, 104)) == expected
    assert expected[-1] - expected[-2] == MOST_STEPS + 1
    assert asked(patience, 3, range(200, 207)) == [200, 202, 205], "the others' pauses are theirs"


def test_an_answer_in_time_ends_it(patience):
    assert asked(patience, 2, range(1, 7)) == [1, 3, 6]
    patience.answered(2)
    assert patience.left_out(ALL, 7, least=1) == set()
    assert asked(patience, 2, range(7, 11)) == [7, 9], "the next streak starts anew"


def test_each_pause_is_said_once(patience, lines):
    asked(patience, 2, range(1, 11))
    assert lines == [
        "client 2 gave no answer in time: it is left out of the next step",
        "client 2 gave no answer in time, 2 times in a row: it is left out of 2 steps",
        "client 2 gave no answer in time, 3 times in a row: it is left out of 4 steps",
    ]
    assert patience.notes() == lines and patience.notes() == []


def test_nobody_is_left_out_where_too_few_would_be_left(patience, lines):
    for client in (1, 2):
        patience.missed(client, 1)
    assert patience.left_out(range(4), 2, least=3) == set() and lines == []
    assert patience.left_out(range(4), 2, least=2) == {1, 2} and len(lines) == 2
    assert patience.left_out([1, 2], 2, least=1) == set(), "somebody is asked"


def test_who_speaks_is_asked_at_once_but_not_for_ever(patience, lines):
    """A device that every task kills starts anew, signs in, and is silent again."""
    for step in (1, 2, 3):
        patience.missed(5, step)
        assert patience.left_out(ALL, step + 1, least=1) == {5}
        patience.spoke(5)
        out = patience.left_out(ALL, step + 1, least=1)
        assert out == (set() if step < 3 else {5})
    assert lines.count("client 5 is heard again, and asked again") == 2


def test_that_a_slow_device_speaks_does_not_make_it_faster(patience):
    patience.missed(5, 1)
    assert patience.silent(2) == {5} and patience.silent(3) == set()
    patience.gave_up(5)
    assert patience.silent(2) == set(), "no greeting would tell more"
    patience.spoke(5)
    assert patience.left_out(ALL, 2, least=1) == {5}


def test_from_the_second_refusal_in_a_row_on(patience, lines):
    patience.refused(4, 1)
    assert patience.left_out(ALL, 2, least=1) == set(), "one may be an accident"
    patience.refused(4, 2)
    assert patience.left_out(ALL, 3, least=1) == {4}
    assert patience.left_out(ALL, 4, least=1) == set()
    patience.answered(4)
    patience.refused(4, 4)
    assert [patience.left_out(ALL, step, least=1) for step in (5, 6, 7)] == [{4}, {4}, set()]
    assert lines[-1] == (
        "client 4 sent an update that was refused, 3 times in a row: it is left out of 2 steps"
    )
    patience.taken(4)
    patience.refused(4, 7)
    assert patience.left_out(ALL, 8, least=1) == set()
