"""The deterministic top-k against a stable sort."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlean.patterns.largest import LONG, SAMPLE, largest


@given(st.lists(st.integers(0, 4), max_size=40), st.integers(-1, 45))
def test_largest_is_the_head_of_a_stable_sort(values: list[int], count: int) -> None:
    expected = np.zeros(len(values), dtype=bool)
    expected[np.argsort(-np.array(values, dtype=float), kind="stable")[: max(count, 0)]] = True
    np.testing.assert_array_equal(largest(np.array(values, np.float32), count), expected)


@pytest.mark.parametrize("kind", ["random", "sorted", "ties", "one value", "sample misleads"])
def test_of_a_long_vector_too(kind: str) -> None:
    """Longer than LONG, where a sample brackets the cut."""
    n = LONG + 12_345
    values = np.random.default_rng(0).normal(size=n).astype(np.float32)
    if kind == "sorted":
        values.sort()
    if kind == "ties":
        values = np.round(values)
    if kind == "one value":
        values[:] = 2
    if kind == "sample misleads":
        values[:: n // SAMPLE] = -9
    order = np.argsort(-values, kind="stable")
    for count in (1, 777, n // 7, n // 2, n - 1):
        expected = np.zeros(n, dtype=bool)
        expected[order[:count]] = True
        np.testing.assert_array_equal(largest(values, count), expected)
