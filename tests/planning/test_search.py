"""The largest value that fits, against trying every one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedlean.planning.search import DECADES, largest, value_at

VALUES = [value_at(place) for place in range(900 * DECADES + 1)]


def test_the_values_are_all_of_three_digits_in_order():
    assert sorted(set(VALUES)) == VALUES and VALUES[0] == 0.001 and VALUES[-1] == 1.0
    assert all(float(f"{value:.3g}") == value for value in VALUES)


@given(st.floats(0, 3), st.floats(0.1, 10), st.floats(0, 1))
def test_against_trying_every_value(limit, slope, constant):
    def need(value):
        return constant + slope * value

    fitting = [value for value in VALUES if need(value) <= limit]
    found = largest(lambda value: need(value) <= limit)
    assert found == (fitting[-1] if fitting else None)


def test_few_questions_are_asked():
    asked = []
    largest(lambda value: not asked.append(value) and value <= 0.5)
    assert len(asked) <= 14
