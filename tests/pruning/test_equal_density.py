"""The same density in every tensor, against a sort."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlean.pruning.equal_density import add_random, keep_largest, kept_count, without_smallest

VALUES = st.integers(-3, 3).map(float)  # small integers, so that there are ties
ENTRIES = st.lists(st.tuples(VALUES, st.booleans()), min_size=1, max_size=24)
DENSITY = st.floats(0.01, 1.0)


def rng_for(name: str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(len(name)))


def split(entries) -> tuple[np.ndarray, np.ndarray]:
    mask = np.array([m for _, m in entries], bool)
    return np.array([v for v, _ in entries], np.float32) * mask, mask


@pytest.mark.parametrize(
    "size, density, expected",
    [(10, 0.2, 2), (10, 0.24, 2), (10, 0.25, 3), (100, 0.29, 29), (7, 1.0, 7), (5, 0.01, 1)],
)
def test_kept_counts_by_hand(size, density, expected):
    assert kept_count(size, density) == expected


@pytest.mark.parametrize("density", [0.0, -0.1, 1.01, float("nan")])
def test_density_out_of_range(density):
    with pytest.raises(ValueError, match="density must be in"):
        kept_count(4, density)


def test_each_tensor_by_itself():
    """Half of each, however large the other's weights are; the bias is not looked at."""
    params = {
        "a": np.array([[100.0, -200.0], [300.0, 50.0]], np.float32),
        "b": np.array([1.0, -3.0, 2.0, 0.5], np.float32),
        "bias": np.array([9.0], np.float32),
    }
    masks = keep_largest(params, {}, 0.5, ["a", "b"])
    assert masks.keys() == {"a", "b"}
    assert masks["a"].tolist() == [[False, True], [True, False]]
    assert masks["b"].tolist() == [False, True, True, False]


@given(ENTRIES, DENSITY)
def test_keep_largest_is_a_stable_sort(entries, density):
    """Of those in use the first by (-|w|, position); nothing pruned comes back."""
    weights, mask = split(entries)
    used = [i for i in range(len(mask)) if mask[i]]
    ranked = sorted(used, key=lambda i: (-abs(weights[i]), i))[: kept_count(len(mask), density)]
    found = keep_largest({"w": weights}, {"w": mask}, density, ["w"])["w"]
    assert np.flatnonzero(found).tolist() == sorted(ranked)


@given(ENTRIES, DENSITY)
def test_without_smallest_is_the_same_choice(entries, density):
    """From the kept values alone, as a device holds them."""
    weights, mask = split(entries)
    chosen = keep_largest({"w": weights}, {"w": mask}, density, ["w"])["w"]
    packed = without_smallest(weights[mask], weights.size, density)
    assert packed.dtype == np.float32
    assert np.array_equal(packed, (weights * chosen)[mask])
    square = np.stack([weights, weights])
    dense = keep_largest({"w": square}, {}, density, ["w"])["w"]
    assert np.array_equal(without_smallest(square, square.size, density), square * dense)


@given(ENTRIES, DENSITY)
def test_add_random_fills_up_and_takes_nothing(entries, density):
    _, mask = split(entries)
    before = mask.copy()
    (grown,) = add_random({"w": mask}, density, rng_for=rng_for).values()
    assert np.array_equal(mask, before)
    assert (grown >= mask).all()
    assert grown.sum() == max(mask.sum(), kept_count(mask.size, density))
    assert np.array_equal(grown, add_random({"w": mask}, density, rng_for=rng_for)["w"])


def test_those_added_are_uniform_over_the_pruned():
    """100 of 1,000, 300 times: every pruned one 30 times on average, standard deviation 5.2."""
    mask = np.zeros(1100, bool)
    mask[::11] = True
    times = np.zeros(mask.size)
    for i in range(300):
        draw = np.random.Generator(np.random.Philox(i))
        times += add_random({"w": mask}, 200 / 1100, rng_for=lambda _, draw=draw: draw)["w"]
    assert (times[mask] == 300).all()
    assert times[~mask].mean() == 30
    assert 4.5 < times[~mask].std() < 5.9


@pytest.mark.parametrize(
    "params, masks, named",
    [
        ({"v": np.ones(2)}, {}, "'w'"),
        ({"w": np.ones(2)}, {"w": np.ones(3, bool)}, "'w' must be bool"),
        ({"w": np.ones(2)}, {"w": np.ones(2)}, "'w' must be bool"),
        ({"w": np.array([1.0, np.nan])}, {}, "'w'. holds NaN"),
    ],
)
def test_what_does_not_fit_is_named(params, masks, named):
    with pytest.raises(ValueError, match=named):
        keep_largest(params, masks, 0.5, ["w"])
