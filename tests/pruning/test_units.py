"""Rows and columns that live must survive a reconfiguration under any size limit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlean.pruning.empirical_risk import LinearTime, maximise_linear
from fedlean.pruning.units import dead_units, protect_units

SHAPE = st.sampled_from([(1, 1), (3, 4), (4, 3), (2, 3, 2, 2), (5, 1, 3, 3), (0, 3), (3, 0)])


def units(shape):
    """Index of each row and each column of a weight."""
    rows = [(row,) for row in range(shape[0])]
    return rows + [(slice(None), column) for column in range(shape[1])]


def test_dead_units_by_hand() -> None:
    """Conv (2, 3, 1, 2): output 1 keeps nothing; inputs 1 and 2 keep nothing."""
    mask = np.zeros((2, 3, 1, 2), dtype=bool)
    mask[0, 0, 0, 1] = True
    assert dead_units({"conv.weight": mask}) == {"conv.weight": (1, 2)}
    with pytest.raises(ValueError, match="'bias'"):
        dead_units({"bias": np.ones(3, dtype=bool)})


@given(SHAPE, st.integers(0, 2**32 - 1))
def test_protection_equals_the_loop_over_units(shape, seed) -> None:
    rng = np.random.default_rng(seed)
    importance = rng.integers(0, 4, shape).astype(np.float32)  # ties and zeros
    kept = rng.random(shape) < 0.4
    may_go = ~kept | (rng.random(shape) < 0.7)
    expected = may_go.copy()
    places = np.arange(kept.size).reshape(shape)
    for unit in units(shape):
        alive = [i for i in places[unit].ravel() if kept.flat[i]]
        if alive:
            expected.flat[max(alive, key=lambda i: importance.flat[i])] = False  # first of equals
    before = may_go.copy()
    result = protect_units({"a": importance}, {"a": kept}, {"a": may_go})["a"]
    np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(may_go, before)


@given(SHAPE, st.integers(0, 2**32 - 1), st.integers(0, 5))
def test_no_limit_kills_a_unit(shape, seed, limit) -> None:
    rng = np.random.default_rng(seed)
    importance = {"a": rng.standard_exponential(shape, np.float32)}
    kept = {"a": rng.random(shape) < 0.5}
    everything = {"a": np.ones(shape, dtype=bool)}
    p = protect_units(importance, kept, everything)
    new = maximise_linear(importance, p, LinearTime(1.0, {"a": 1.0}), max_kept=limit)
    for unit in units(shape):
        assert new["a"][unit].any() or not kept["a"][unit].any()
    pairs = zip(dead_units(new)["a"], dead_units(kept)["a"], strict=True)
    assert all(after <= before for after, before in pairs)


def test_a_tensor_without_a_mask_is_dense() -> None:
    importance = {"a": np.array([[1, 2], [3, 4]], np.float32)}
    p = {"a": np.ones((2, 2), dtype=bool)}
    assert protect_units(importance, {}, p)["a"].tolist() == [[True, False], [False, False]]


def test_bad_masks_are_named() -> None:
    importance, p = {"a": np.ones((2, 2), np.float32)}, {"a": np.ones((2, 2), dtype=bool)}
    with pytest.raises(ValueError, match="'a'"):
        protect_units(importance, {"a": np.ones((2, 3), dtype=bool)}, p)
