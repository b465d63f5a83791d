from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlean.core import Batches
from fedlean.data import batches as module
from fedlean.data.batches import ClientData, drawn_positions, eval_batches
from fedlean.data.dataset import Dataset

INDICES = np.arange(3, 300, 7)  # 43 examples


def seen(dataset: Dataset, batches) -> list[np.ndarray]:
    """Which examples each batch holds: the pixel of each image is its index."""
    return [
        np.rint(x[:, 0, 0, 0] * dataset.std[0] + dataset.mean[0]).astype(int) for x, _ in batches
    ]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 12), st.integers(1, 100), st.integers(0, 2**63 - 1), st.integers(1, 60))
def test_full_batches_in_shuffled_passes(
    balanced: Dataset, steps: int, batch_size: int, seed: int, examples: int
):
    data: Batches = ClientData(balanced, INDICES)
    drawn = seen(
        balanced, data.draw(steps=steps, batch_size=batch_size, seed=seed, examples=examples)
    )
    assert [len(batch) for batch in drawn] == [batch_size] * steps
    stream = np.concatenate([*drawn, np.empty(0, int)])
    size = min(examples, len(INDICES))
    for start in range(0, len(stream) - size + 1, size):
        once = np.unique(stream[start : start + size])
        assert len(once) == size and np.isin(once, INDICES).all()
    assert len(np.unique(stream)) == min(size, len(stream))


def test_drawing_is_a_pure_function(balanced: Dataset):
    data = ClientData(balanced, INDICES)
    first = list(data.draw(steps=5, batch_size=16, seed=1))
    second = list(data.draw(steps=5, batch_size=16, seed=1))
    longer = list(data.draw(steps=9, batch_size=16, seed=1))
    for (x, y), (again, labels), (more, _) in zip(first, second, longer[:5], strict=True):
        np.testing.assert_array_equal(x, again)
        np.testing.assert_array_equal(x, more)
        np.testing.assert_array_equal(y, labels)
    other = seen(balanced, data.draw(steps=5, batch_size=16, seed=2))
    assert not np.array_equal(np.concatenate(seen(balanced, first)), np.concatenate(other))


def test_each_pass_has_its_own_order(balanced: Dataset):
    passes = seen(
        balanced, ClientData(balanced, INDICES).draw(steps=3, batch_size=len(INDICES), seed=0)
    )
    assert not np.array_equal(passes[0], passes[1])
    for each in passes:
        np.testing.assert_array_equal(np.sort(each), INDICES)


def test_the_subset_does_not_depend_on_the_seed(balanced: Dataset):
    """PruneFL's initial pruning draws anew, with new seeds, from the same few examples."""
    data = ClientData(balanced, INDICES)
    subsets = {
        tuple(np.unique(np.concatenate(seen(balanced, batches))))
        for seed in range(5)
        for batches in [data.draw(steps=2, batch_size=20, seed=seed, examples=20)]
    }
    assert len(subsets) == 1 and len(subsets.pop()) == 20


def test_batches_match_their_labels_and_are_normalised(balanced: Dataset):
    data = ClientData(balanced, INDICES)
    assert data.num_examples == len(INDICES)
    for x, y in data.draw(steps=3, batch_size=10, seed=0):
        assert x.dtype == np.float32 and x.shape == (10, 1, 1, 1) and y.dtype == np.int64
        (indices,) = seen(balanced, [(x, y)])
        np.testing.assert_array_equal(y, balanced.y_train[indices])
        np.testing.assert_array_equal(x, balanced.normalise(balanced.x_train[indices]))


def test_a_single_example_fills_any_batch(balanced: Dataset):
    (batch,) = seen(
        balanced, ClientData(balanced, np.array([7])).draw(steps=1, batch_size=5, seed=0)
    )
    assert batch.tolist() == [7] * 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": -1}, "steps is -1, expected at least 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"examples": 0}, "examples is 0"),
    ],
)
def test_impossible_draws_are_refused_at_the_call(balanced: Dataset, change: dict, message: str):
    data = ClientData(balanced, INDICES)
    with pytest.raises(ValueError, match=message):
        data.draw(**{"steps": 1, "batch_size": 1, "seed": 0, **change})


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (np.empty(0, int), "without examples cannot take part"),
        (np.array([[1]]), r"indices is int64 \(1, 1\)"),
        (np.array([1.0]), "indices is float64"),
        (np.array([-1]), "indices are in -1..-1, expected 0..999"),
        (np.array([1000]), "indices are in 1000..1000"),
    ],
)
def test_indices_that_do_not_fit(balanced: Dataset, indices: np.ndarray, message: str):
    with pytest.raises(ValueError, match=message):
        ClientData(balanced, indices)


def test_eval_batches_cover_the_test_set_once_in_order(balanced: Dataset):
    drawn = seen(balanced, eval_batches(balanced, 300))
    assert [len(batch) for batch in drawn] == [300, 300, 300, 100]
    np.testing.assert_array_equal(np.concatenate(drawn), np.arange(1000))
    (some,) = seen(balanced, eval_batches(balanced, 300, np.array([5, 9])))
    assert some.tolist() == [5, 9]
    with pytest.raises(ValueError, match="batch_size is 0"):
        eval_batches(balanced, 0)


def test_the_test_subset_is_stratified_and_fixed(balanced: Dataset):
    # Through the module: imported by name, pytest would collect it as a test.
    chosen = module.test_subset(balanced, 50)
    np.testing.assert_array_equal(chosen, module.test_subset(balanced, 50))
    assert np.bincount(balanced.y_test[chosen]).tolist() == [5] * 10
    assert module.test_subset(balanced, 5000).tolist() == list(range(1000))
    with pytest.raises(ValueError, match="n is 0"):
        module.test_subset(balanced, 0)


@pytest.mark.parametrize("restriction", [{}, {"examples": 3}, {"examples": 99}])
def test_drawn_positions_say_which_examples_are_in_each_batch(balanced, restriction):
    data = ClientData(balanced, INDICES)
    places = list(drawn_positions(len(INDICES), 5, 4, 7, **restriction))
    batches = list(data.draw(steps=5, batch_size=4, seed=7, **restriction))
    assert len(places) == len(batches) == 5
    for at, (x, y) in zip(places, batches, strict=True):
        assert at.dtype == np.int64 and at.shape == (4,)
        np.testing.assert_array_equal(balanced.y_train[INDICES[at]], y)
        np.testing.assert_array_equal(balanced.normalise(balanced.x_train[INDICES[at]]), x)
