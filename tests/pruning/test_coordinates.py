"""The deterministic top-k against a stable sort, and the checks' messages."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlean.pruning.coordinates import (
    LONG,
    SAMPLE,
    check_importance,
    check_limits,
    largest,
)


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


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_bad_importance_names_the_tensor(bad: float) -> None:
    squares = np.array([1.0, bad, 2.0], np.float32)
    with pytest.raises(ValueError, match=r"conv1\.weight"):
        check_importance({"conv1.weight": squares}, {"conv1.weight": np.ones(3, dtype=bool)})


@pytest.mark.parametrize(
    ("importance", "mask"),
    [
        ({}, np.ones(3, dtype=bool)),
        ({"a": np.ones(4, np.float32)}, np.ones(3, dtype=bool)),
        ({"a": np.ones(3, np.int64)}, np.ones(3, dtype=bool)),
        ({"a": np.ones(3, np.float32)}, np.ones(3, np.float32)),
    ],
)
def test_inputs_that_do_not_fit_name_the_tensor(importance, mask) -> None:
    with pytest.raises(ValueError, match="'a'"):
        check_importance(importance, {"a": mask})


def test_a_bias_beside_the_masked_tensors_is_not_looked_at() -> None:
    check_importance(
        {"w": np.ones(2, np.float32), "bias": np.array([np.nan])}, {"w": np.ones(2, dtype=bool)}
    )


@pytest.mark.parametrize(("delta", "limit"), [(-1.0, None), (np.nan, None), (0.0, -1)])
def test_limits_are_sizes(delta: float, limit: int | None) -> None:
    with pytest.raises(ValueError, match="must be"):
        check_limits(delta, limit)
