from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedlean.data.moments import Moments, moments

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
SHAPES = hnp.array_shapes(min_dims=2, max_dims=4, max_side=5)


def oracle(x: np.ndarray) -> tuple[list[Fraction], list[Fraction]]:
    """Per channel, in rational numbers."""
    channels = [[Fraction(float(v)) for v in x[:, c].ravel()] for c in range(x.shape[1])]
    return [sum(each, Fraction()) for each in channels], [
        sum((v * v for v in each), Fraction()) for each in channels
    ]


def exact(found: Moments) -> tuple[list[Fraction], list[Fraction]]:
    return (
        [Fraction(total, 1 << 149) for total in found.totals],
        [Fraction(square, 1 << 298) for square in found.squares],
    )


@given(hnp.arrays(np.float32, SHAPES, elements=FLOATS))
def test_floats_are_added_exactly(x: np.ndarray):
    assert exact(moments(x)) == oracle(x)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16])
def test_integers_are_added_exactly(dtype: type):
    ends = np.iinfo(dtype)
    x = np.random.default_rng(0).integers(ends.min, ends.max, (50, 3, 7), dtype, endpoint=True)
    assert exact(moments(x)) == oracle(x)
    assert moments(x) == moments(x.astype(np.float32))


@pytest.mark.parametrize("value", [1e-45, -1e-45, 3.4e38, -3.4e38, 0.0, -0.0, 1.1754944e-38])
def test_the_ends_of_float32(value: float):
    x = np.full((3, 2), value, np.float32)
    assert exact(moments(x)) == oracle(x)
    assert moments(x).statistics(1.0)[1].tolist() == [1.0, 1.0]


@given(hnp.arrays(np.float32, (12, 2, 3), elements=FLOATS), st.permutations(range(12)))
def test_neither_order_nor_division_matters(x: np.ndarray, order: list[int]):
    shuffled = x[order]
    parts = moments(shuffled[:5]) + moments(shuffled[5:7]) + moments(shuffled[7:])
    assert parts == moments(x)


def test_many_columns_and_large_examples():
    """More channels than one group, more values than one chunk."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((9, 40, 300)).astype(np.float32)
    mean, std = moments(x).statistics(1.0)
    np.testing.assert_allclose(mean, x.mean((0, 2), dtype=np.float64), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(std, x.std((0, 2), dtype=np.float64), rtol=1e-6)


def test_statistics_by_hand():
    """0, 255, 255, 0 over 255: mean 1/2, deviation 1/2.  A constant 51: mean 1/5, deviation 1."""
    x = np.array([[[[0, 255]], [[51, 51]]], [[[255, 0]], [[51, 51]]]], np.uint8)
    mean, std = moments(x).statistics(255.0)
    assert mean.dtype == std.dtype == np.float32
    assert mean.tolist() == [0.5, np.float32(0.2)] and std.tolist() == [0.5, 1.0]


def test_a_small_spread_about_a_large_mean_keeps_its_digits():
    x = np.array([[1e6], [1e6 + 0.125]], np.float32)
    mean, std = moments(x).statistics(1.0)
    assert mean[0] == np.float32(1e6 + 0.0625) and std[0] == 0.0625


def test_channels_must_agree():
    with pytest.raises(ValueError, match="argument 2 is longer"):
        _ = Moments(1, (1,), (1,)) + Moments(1, (1, 2), (1, 2))
