"""Rounding to a byte: its error, what comes back, and what is left alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedlean.wire.scaled_int8 import fits_int8, from_int8, round_int8, to_int8

VALUES = arrays(np.float32, st.integers(1, 60), elements=st.floats(-(2.0**40), 2.0**40, width=32))


@given(VALUES)
def test_error_is_half_a_step_of_the_largest(values):
    rounded = round_int8(values)

    step = float(abs(values).max()) / 127
    assert np.abs(rounded.astype(np.float64) - values).max() <= step / 2 * (1 + 2**-7) + 2.0**-90
    assert rounded.dtype == np.float32


@given(VALUES)
def test_what_was_rounded_travels_without_loss(values):
    rounded = round_int8(values)

    assert fits_int8(rounded) or not rounded.any()
    if rounded.any():
        scale, steps = to_int8(rounded)
        assert abs(steps).max() == 127
        assert from_int8(scale, steps).tobytes() == rounded.tobytes()
    assert round_int8(rounded).tobytes() == rounded.tobytes()


@pytest.mark.parametrize(
    "values", [[0.1, 0.3], [127.0, -0.0], [127.0, 0.5], [np.inf], [0.0], [np.nan, 127.0]]
)
def test_other_values_do_not_fit(values):
    assert not fits_int8(np.array(values, np.float32))


def test_by_hand():
    """Scale 2: -5.1 is nearest to -6 of -4, -6; 0.9 to 0."""
    values = np.array([254.0, -5.1, 0.9, 1.1], np.float32)

    scale, steps = to_int8(round_int8(values))

    assert scale == 2 and steps.tolist() == [127, -3, 0, 1]
