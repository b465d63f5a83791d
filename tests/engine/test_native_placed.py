"""Where arrays lie, against a search byte by byte; one layout serves all masks."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlean.engine.native_plan import Arrays, lines, placed_floats
from fedlean.engine.native_program import Mode, program
from fedlean.engine.native_structure import geometries
from fedlean.models.lenet300 import lenet300

LIVES = st.tuples(st.integers(0, 100), st.integers(0, 9), st.integers(0, 9))


def naive(arrays):
    """Every offset in turn, until none that lives at the same time is there."""
    taken = np.zeros((10, sum(floats for floats, _, _ in arrays) + 1), bool)  # by time
    for floats, first, last in sorted(arrays, key=lambda array: -array[0]):
        alive = taken[first : last + 1]
        at = next(at for at in range(taken.shape[1]) if not alive[:, at : at + floats].any())
        alive[:, at : at + floats] = True
    return int(np.flatnonzero(taken.any(axis=0)).max(initial=-1)) + 1


@settings(deadline=None)
@given(st.lists(LIVES, max_size=12))
def test_against_trying_every_offset(wanted):
    arrays = [(lines(floats), min(a, b), max(a, b)) for floats, a, b in wanted]
    assert placed_floats(arrays) == naive(arrays)


def test_a_life_grows_at_both_ends():
    arrays = Arrays()
    first = arrays.add(17, 3, 4)
    arrays.extend(first, 2, 3)
    arrays.extend(first, 3, 7)
    assert arrays.all() == ((32, 2, 7),)


def test_a_program_answers_the_same_whatever_it_was_asked_before():
    spec = lenet300((1, 28, 28), 10)
    own = program(spec, frozenset(), Mode(20, training=True))
    where = geometries(spec, own.structure)
    sparse, rows = {"fc1.weight": 900}, {"fc1.weight": 300}
    asked = [({}, {}), (sparse, {}), (sparse, rows), (sparse, {})]
    found = [own.floats(kept, where, dense_rows) for kept, dense_rows in asked]
    assert found[1] == found[3] != found[0] and found[2] > found[1]
    assert own.floats(sparse, where, least=found[1] + 5) == found[1] + 5
    assert own.floats(sparse, where, least=10**9) == 10**9
    assert program(spec, frozenset(), Mode(20, training=True)) is own
