"""Rounding of what goes up: how far each form moves a value."""

import numpy as np
import pytest

from fedlean.train.quantised_scalars import rounded

VALUES = np.random.default_rng(0).standard_normal(1000) * 3


def test_fp32_and_fp16_by_relative_error():
    assert np.array_equal(rounded(VALUES, "fp32"), VALUES.astype(np.float32))
    half = rounded(VALUES, "fp16")
    assert half.dtype == np.float32
    assert np.abs(half - VALUES).max() <= np.abs(VALUES).max() * 2**-11
    assert np.array_equal(half, half.astype(np.float16))


def test_fp16_clips():
    assert rounded(np.array([1e6, -1e9]), "fp16").tolist() == [65504.0, -65504.0]


def test_int8_moves_no_value_by_more_than_half_a_step():
    error = np.abs(rounded(VALUES, "int8") - VALUES).max()
    assert error <= np.abs(VALUES).max() / 254 * 1.01
    assert error > np.abs(VALUES).max() / 300  # it does round


@pytest.mark.parametrize("form", ["fp32", "fp16", "int8"])
def test_zeros_stay(form):
    assert not rounded(np.zeros(5), form).any()
