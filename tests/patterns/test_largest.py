"""The deterministic top-k against a stable sort."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlean.patterns.largest import BLOCK, LONG, SAMPLE, _spread, largest, smallest_magnitudes

ENTRIES = st.lists(st.tuples(st.integers(-4, 4), st.booleans()), max_size=40)
LONG_KINDS = ["random", "sorted", "ties", "one value", "sample misleads"]


@given(st.lists(st.integers(0, 4), max_size=40), st.integers(-1, 45))
def test_largest_is_the_head_of_a_stable_sort(values: list[int], count: int) -> None:
    expected = np.zeros(len(values), dtype=bool)
    expected[np.argsort(-np.array(values, dtype=float), kind="stable")[: max(count, 0)]] = True
    np.testing.assert_array_equal(largest(np.array(values, np.float32), count), expected)


@given(ENTRIES, st.integers(-1, 45))
def test_smallest_magnitudes_are_the_head_of_a_stable_sort(entries, count: int) -> None:
    values = np.array([value for value, _ in entries], np.float32)
    among = np.array([used for _, used in entries], bool)
    np.testing.assert_array_equal(
        smallest_magnitudes(values, count, among), _smallest(values, count, among)
    )


@pytest.mark.parametrize("kind", LONG_KINDS)
def test_of_a_long_vector_too(kind: str) -> None:
    """Longer than LONG, where a sample brackets the cut."""
    values = _long_vector(kind)
    n = len(values)
    order = np.argsort(-values, kind="stable")
    for count in (1, 777, n // 7, n // 2, n - 1):
        expected = np.zeros(n, dtype=bool)
        expected[order[:count]] = True
        np.testing.assert_array_equal(largest(values, count), expected)


@pytest.mark.parametrize("kind", LONG_KINDS)
def test_magnitudes_of_a_long_matrix_too(kind: str) -> None:
    values = _long_vector(kind).reshape(-1, 5)
    among = np.random.default_rng(1).random(values.shape) < 0.9
    assert np.count_nonzero(among) > LONG > BLOCK
    for count in (1, 777, values.size // 7, values.size // 2, int(among.sum()) - 1):
        np.testing.assert_array_equal(
            smallest_magnitudes(values, count, among), _smallest(values, count, among)
        )


def test_magnitudes_where_the_sample_meets_nothing_in_use() -> None:
    values = _long_vector("random")
    among = np.ones(len(values), dtype=bool)
    among[_spread(len(values))] = False
    assert np.count_nonzero(among) > LONG
    np.testing.assert_array_equal(
        smallest_magnitudes(values, 12_345, among), _smallest(values, 12_345, among)
    )


def test_the_sample_meets_every_column_of_a_matrix_alike() -> None:
    """A stride of 392 over rows of 3,136 would see 8 columns and mislead."""
    rows, columns = 2048, 3136
    seen = np.bincount(_spread(rows * columns) % columns, minlength=columns)
    assert len(seen) == columns
    assert np.count_nonzero(seen) > 0.95 * columns
    assert seen.max() < 5 * SAMPLE / columns


def _long_vector(kind: str) -> np.ndarray:
    n = LONG + 62_346
    values = np.random.default_rng(0).normal(size=n).astype(np.float32)
    if kind == "sorted":
        values.sort()
    if kind == "ties":
        values = np.round(values)
    if kind == "one value":
        values[:] = 2
    if kind == "sample misleads":
        values[_spread(n)] = -9
    return values


def _smallest(values: np.ndarray, count: int, among: np.ndarray) -> np.ndarray:
    used = np.flatnonzero(among)
    order = np.argsort(np.abs(values.ravel()[used]), kind="stable")
    expected = np.zeros(values.shape, dtype=bool)
    expected.flat[used[order[: max(count, 0)]]] = True
    return expected
