"""Weights that go, stay and come back, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlean.pruning.regrow import apply_masks


def rng_for(name: str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(len(name)))


def bits(values: np.ndarray) -> list[int]:
    return values.view(np.uint32).ravel().tolist()


ENTRY = st.tuples(st.floats(width=32, allow_nan=False), st.booleans(), st.booleans())


@given(st.lists(ENTRY, max_size=30), st.sampled_from([0.0, 0.1]))
def test_bit_for_bit(entries, scale) -> None:
    weights = np.array([w for w, _, _ in entries], np.float32).clip(-1e9, 1e9)  # some are stale
    old = np.array([o for _, o, _ in entries], bool)
    new = np.array([n for _, _, n in entries], bool)
    before = weights.copy()
    result = apply_masks({"a": weights}, {"a": old}, {"a": new}, scale=scale, rng_for=rng_for)["a"]
    assert result.dtype == np.float32
    assert bits(weights) == bits(before)
    assert bits(result[old & new]) == bits(weights[old & new])
    assert not any(bits(result[~new]))  # +0.0, not -0.0
    assert (result == result * new).all()
    if scale == 0:
        assert not any(bits(result[new & ~old]))


def test_a_stale_value_never_returns() -> None:
    """The pruned place still holds 7; scale 0 must give 0 and another scale a draw."""
    weights = {"a": np.array([2.0, 7.0], np.float32)}
    old, new = {"a": np.array([True, False])}, {"a": np.array([True, True])}
    assert apply_masks(weights, old, new, scale=0.0, rng_for=rng_for)["a"].tolist() == [2.0, 0.0]
    drawn = 0.5 * 2.0 * rng_for("a").standard_normal(1)  # RMS of the kept is 2
    result = apply_masks(weights, old, new, scale=0.5, rng_for=rng_for)["a"]
    np.testing.assert_array_equal(result, np.array([2.0, drawn[0]], np.float32))


def test_the_spread_is_scale_times_rms_of_the_kept() -> None:
    """Kept ±3 and ±4 in equal number: RMS = sqrt((9 + 16) / 2) = 3.5355; scale 0.1 -> 0.35355."""
    n = 40_000
    weights = np.zeros(2 * n, np.float32)
    weights[:n] = np.tile(np.array([3, -3, 4, -4], np.float32), n // 4)
    old = np.arange(2 * n) < n
    result = apply_masks(
        {"a": weights}, {"a": old}, {"a": np.ones(2 * n, dtype=bool)}, scale=0.1, rng_for=rng_for
    )["a"]
    assert result[n:].std() == pytest.approx(0.35355, rel=0.02)
    assert abs(result[n:].mean()) < 0.01


def test_each_tensor_draws_from_its_own_stream() -> None:
    weights = {name: np.ones(4, np.float32) for name in ("a", "bb")}
    old = {name: np.array([True, False, False, False]) for name in weights}
    new = {name: np.ones(4, dtype=bool) for name in weights}
    both = apply_masks(weights, old, new, scale=1.0, rng_for=rng_for)
    alone = apply_masks(
        {"bb": weights["bb"]}, {"bb": old["bb"]}, {"bb": new["bb"]}, scale=1.0, rng_for=rng_for
    )
    assert bits(both["bb"]) == bits(alone["bb"])
    assert bits(both["a"]) != bits(both["bb"])


def test_unmasked_tensors_pass_through_and_one_mask_counts_as_dense() -> None:
    weights = {"a": np.array([-1, 2], np.float32), "bias": np.array([3], np.float32)}
    half = {"a": np.array([False, True])}
    pruned = apply_masks(weights, {}, half, scale=0.1, rng_for=rng_for)
    assert pruned["bias"] is weights["bias"]
    assert bits(pruned["a"]) == bits(np.array([0, 2], np.float32))
    dense = apply_masks(pruned, half, {}, scale=0.0, rng_for=rng_for)
    assert bits(dense["a"]) == bits(np.array([0, 2], np.float32))


def test_a_tensor_that_keeps_nothing_comes_back_at_zero() -> None:
    result = apply_masks(
        {"a": np.array([-5, 5], np.float32)},
        {"a": np.array([True, False])},
        {"a": np.array([False, True])},
        scale=1.0,
        rng_for=rng_for,
    )
    assert bits(result["a"]) == [0, 0]


def test_bad_inputs_are_named() -> None:
    weights = {"a": np.array([1, 2], np.float32)}
    with pytest.raises(ValueError, match="'b'"):
        apply_masks(weights, {}, {"b": np.ones(2, dtype=bool)}, scale=0.1, rng_for=rng_for)
    with pytest.raises(ValueError, match="'a'"):
        apply_masks(weights, {}, {"a": np.ones(3, dtype=bool)}, scale=0.1, rng_for=rng_for)
    with pytest.raises(ValueError, match="scale"):
        apply_masks(weights, {}, {}, scale=-1.0, rng_for=rng_for)
