from __future__ import annotations

import sys

import numpy as np
import pytest

from fedlean.data.digits import load_digits
from fedlean.data.stratify import stratified_sample


def test_digits():
    data = load_digits()
    assert data.x_train.shape == (1438, 1, 8, 8) and data.x_test.shape == (359, 1, 8, 8)
    assert data.x_train.dtype == np.uint8 and data.x_train.max() == 16
    assert (data.name, data.classes, data.scale, data.clients) == ("digits", 10, 16.0, None)
    np.testing.assert_allclose(data.mean, (data.x_train / 16).mean(), rtol=1e-5)
    counts = np.bincount(data.y_test)
    everyone = np.bincount(np.concatenate([data.y_train, data.y_test]))
    assert np.abs(counts - everyone * 359 / 1797).max() < 1


def test_the_held_out_digits_are_always_the_same():
    first, second = load_digits(), load_digits()
    np.testing.assert_array_equal(first.x_test, second.x_test)
    np.testing.assert_array_equal(first.y_train, second.y_train)


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match=r"scikit-learn.*pip install 'fedlean\[sim\]'"):
        load_digits()


def test_stratified_sample_gives_the_remainder_to_the_largest_fraction():
    """Quotas of 5 from sizes 6, 3, 1 are 3, 1.5, 0.5: the tie goes to the smaller label."""
    labels = np.array([0] * 6 + [1] * 3 + [2])
    chosen = stratified_sample(labels, 5, seed=3)
    assert np.bincount(labels[chosen], minlength=3).tolist() == [3, 2, 0]
    assert np.array_equal(chosen, np.unique(chosen))
    assert stratified_sample(labels, 10, seed=3).tolist() == list(range(10))


@pytest.mark.parametrize("count", [0, 11])
def test_stratified_sample_refuses_impossible_sizes(count: int):
    with pytest.raises(ValueError, match=f"sample of {count} examples, expected 1..10"):
        stratified_sample(np.zeros(10, int), count, seed=0)
