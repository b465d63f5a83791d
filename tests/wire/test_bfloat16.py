"""bfloat16 against exact rational arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedlean.wire.bfloat16 import fits_bfloat16, from_halves, round_bfloat16, to_halves

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


def neighbours(value: np.float32) -> list[np.float32]:
    """The bfloat16 numbers at and beside a float32, by cutting bits off."""
    cut = int(np.array(value).view(np.uint32)) & 0xFFFF0000
    near = [np.array(bits, np.uint32).view(np.float32)[()] for bits in (cut, cut + 0x10000)]
    return [number for number in near if np.isfinite(number)]


@given(FINITE)
def test_nearest_and_even_in_a_tie(value):
    x = np.float32(value)
    (got,) = round_bfloat16(np.array([x]))
    near = neighbours(x)
    if np.isinf(got):  # beyond the largest by half a step or more
        assert abs(x) > np.float32(3.3895e38)
        return
    distance = {float(n): abs(Fraction(float(n)) - Fraction(float(x))) for n in near}
    assert distance[float(got)] == min(distance.values())
    if len(set(distance.values())) == 1 and len(near) == 2:
        assert int(got.view(np.uint32)) >> 16 & 1 == 0


@given(st.lists(FINITE, min_size=1))
def test_what_was_rounded_travels_exactly(values):
    rounded = round_bfloat16(np.array(values, np.float32))
    assert fits_bfloat16(rounded)
    assert from_halves(to_halves(rounded)).tobytes() == rounded.tobytes()


def test_others_do_not_fit():
    assert not fits_bfloat16(np.array([1.0, 0.1], np.float32))
    assert not fits_bfloat16(np.array([1.0], np.float64))
    assert not fits_bfloat16(np.zeros(0, np.float32))
    assert fits_bfloat16(np.zeros((2, 3), np.float32)[:, ::2])


def test_not_a_number_stays_so():
    low = np.array([0x7F800001], np.uint32).view(np.float32)  # its upper half says infinity
    assert np.isnan(round_bfloat16(low)).all()
