"""Data sets out of the user's arrays."""

from __future__ import annotations

import numpy as np
import pytest

from fedlean.data.dataset import Dataset

X = np.arange(12 * 4, dtype=float).reshape(12, 1, 2, 2)
Y = np.repeat([0, 1, 2], 4)


def test_an_example_is_what_the_model_takes():
    data = Dataset.from_arrays(X, Y, test=(X[:3], Y[:3]))
    assert data.input_shape == (1, 2, 2) and data.x_train.dtype == np.float32
    assert np.array_equal(data.x_train, X) and np.array_equal(data.x_test, X[:3])
    normal = data.normalise(data.x_train)
    assert normal.mean() == pytest.approx(0, abs=1e-6) and normal.std() == pytest.approx(1)


def test_bytes_stay_bytes():
    data = Dataset.from_arrays(X.astype(np.uint8), Y, test=0.25)
    assert data.x_train.dtype == np.uint8 and data.scale == 255
    assert Dataset.from_arrays(X.astype(np.int16), Y, test=0.25).x_train.dtype == np.float32


def test_a_share_is_held_out_by_class_and_always_the_same():
    one, other = (Dataset.from_arrays(X, Y, clients=Y, test=0.25) for _ in range(2))
    assert np.bincount(one.y_test).tolist() == [1, 1, 1] and len(one.y_train) == 9
    assert np.array_equal(one.x_test, other.x_test)
    rows = {tuple(row) for row in np.concatenate([one.x_train, one.x_test]).reshape(12, 4)}
    assert rows == {tuple(row) for row in X.reshape(12, 4)}
    assert np.array_equal(one.clients, one.y_train)  # ids go with their examples
    for x, y in ((one.x_train, one.y_train), (one.x_test, one.y_test)):
        assert np.array_equal(x[:, 0, 0, 0] // 16, y)  # and so do labels


@pytest.mark.parametrize(
    ("labels", "names", "first"),
    [
        (["walk", "run", "run"] * 4, ("run", "walk"), 1),
        (np.array([7, 1, 1] * 4), ("1", "7"), 1),
        (np.array([[0], [1], [1]] * 4), ("0", "1"), 0),
        (np.array([0.0, 2.0, 2.0] * 4), ("0", "1", "2"), 0),
    ],
)
def test_labels_of_any_kind(labels, names, first):
    data = Dataset.from_arrays(X, labels, test=(X, labels))
    assert data.class_names == names and data.y_train[0] == data.y_test[0] == first


def test_ids_of_any_kind_and_names_that_are_given():
    ids = ["b", "a"] * 6
    data = Dataset.from_arrays(X, Y, clients=ids, test=(X, Y), class_names=("x", "y", "z"))
    assert data.clients is not None and data.clients.tolist() == [1, 0] * 6
    assert data.class_names == ("x", "y", "z")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X[:0], "y": Y[:0]}, "x is float64 .* at least one example"),
        ({"x": X.astype(str)}, "x is <U"),
        ({"x": np.where(X > 9, np.nan, X)}, "NaN or infinity"),
        ({"y": Y[:5]}, r"y has shape \(5,\), expected \(12,\)"),
        ({"y": Y + 0.5}, "labels must be classes"),
        ({"clients": [1, 2]}, r"clients has 2 entries, expected 12 as in y"),
        ({"test": (X, Y[:2])}, "the test labels"),
        ({"test": (X,)}, "test has 1 parts"),
        ({"test": 1.5}, "a share in"),
        ({"test": (X[:, :, :1], Y)}, "test .* shape"),
        ({"class_names": ("x", "y")}, "expected 0..1"),
    ],
)
def test_what_does_not_fit_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Dataset.from_arrays(**{"x": X, "y": Y, "test": (X, Y), **arguments})
