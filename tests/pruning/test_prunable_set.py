"""P: exactly the smallest of the weights in use, and all that is pruned."""

from __future__ import annotations

from math import floor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlean.pruning.prunable_set import fraction_at, removable

WEIGHTS = st.lists(st.tuples(st.integers(-4, 4), st.booleans()), max_size=40)


@given(WEIGHTS, st.floats(0, 1))
def test_equals_a_stable_sort(entries, fraction) -> None:
    weights = np.array([w for w, _ in entries], np.float32)
    mask = np.array([m for _, m in entries], bool)
    used = [i for i, (_, m) in enumerate(entries) if m]
    smallest = sorted(used, key=lambda i: abs(entries[i][0]))[: floor(fraction * len(used))]
    expected = ~mask
    expected[smallest] = True
    result = removable({"a": weights}, {"a": mask}, fraction, ["a"])["a"]
    np.testing.assert_array_equal(result, expected)


def test_by_hand_per_layer_and_dense_without_a_mask() -> None:
    """a: 5 in use, φ = 0.5 -> floor(2.5) = 2: |w| 1 and 2.  b: no mask, 2 in use -> 1: |w| 10."""
    params = {
        "a": np.array([[5, -1, 3], [0, 2, -4]], np.float32),
        "b": np.array([-10, 20], np.float32),
        "bias": np.zeros(2, np.float32),
    }
    masks = {"a": np.array([[True, True, True], [False, True, True]])}
    result = removable(params, masks, 0.5, ["a", "b"])
    assert result["a"].tolist() == [[False, True, False], [True, True, False]]
    assert result["b"].tolist() == [True, False]
    assert list(result) == ["a", "b"]


def test_bad_inputs_are_named() -> None:
    params = {"a": np.array([1, np.nan], np.float32)}
    with pytest.raises(ValueError, match=r"'a'.*NaN"):
        removable(params, {}, 0.5, ["a"])
    with pytest.raises(ValueError, match="'b'"):
        removable(params, {}, 0.5, ["b"])
    with pytest.raises(ValueError, match="'a'"):
        removable(params, {"a": np.ones(3, dtype=bool)}, 0.5, ["a"])
    with pytest.raises(ValueError, match="fraction"):
        removable(params, {}, 1.5, ["a"])


def test_the_fraction_halves_every_ten_thousand_rounds() -> None:
    """0.3 · 0.5^(20000/10000) = 0.3 / 4 = 0.075."""
    assert fraction_at(0) == 0.3
    assert fraction_at(20_000) == pytest.approx(0.075)
    assert fraction_at(5, initial=0.4, half_life_rounds=5) == pytest.approx(0.2)
    with pytest.raises(ValueError, match="half_life_rounds"):
        fraction_at(1, half_life_rounds=0)
