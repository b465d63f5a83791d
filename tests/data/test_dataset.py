from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedlean.data import dataset as module
from fedlean.data.dataset import Dataset, channel_statistics


def colour(dtype: type = np.uint8, count: int = 6) -> Dataset:
    rng = np.random.default_rng(1)
    x = rng.integers(0, 256, (count, 3, 4, 5)).astype(dtype)
    y = (np.arange(count) % 2).astype(np.int64)
    return Dataset.from_images("colour", (x, y), (x[:2], y[:2]), classes=2, scale=255.0)


def test_statistics_by_hand():
    """Channel 0 holds 0, 255, 255, 0: mean 1/2, std 1/2.  Channel 1 is constant at 51 / 255."""
    x = np.array([[[[0, 255]], [[51, 51]]], [[[255, 0]], [[51, 51]]]], np.uint8)
    mean, std = channel_statistics(x, 255.0)
    np.testing.assert_allclose(mean, [0.5, 0.2], rtol=1e-6)
    np.testing.assert_allclose(std, [0.5, 1.0], rtol=1e-6)
    assert mean.dtype == std.dtype == np.float32


def test_statistics_do_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch):
    x = colour().x_train
    whole = channel_statistics(x, 255.0)
    monkeypatch.setattr(module, "CHUNK", 4)
    np.testing.assert_allclose(channel_statistics(x, 255.0), whole, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_normalise_equals_its_formula(dtype: type):
    data = colour(dtype)
    x = data.x_train
    expected = (x / 255.0 - data.mean[:, None, None]) / data.std[:, None, None]
    out = data.normalise(x)
    assert out.dtype == np.float32 and out.flags.c_contiguous
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(out.mean(axis=(0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(out.std(axis=(0, 2, 3)), 1, atol=1e-5)
    assert data.input_shape == (3, 4, 5)


def test_normalise_gives_contiguous_batches_of_strided_images():
    data = colour()
    strided = np.asfortranarray(data.x_train)
    assert data.normalise(strided).flags.c_contiguous
    np.testing.assert_array_equal(data.normalise(strided), data.normalise(data.x_train))


def test_a_constant_channel_normalises_to_zero():
    x, y = np.full((3, 1, 2, 2), 7, np.uint8), np.zeros(3, np.int64)
    data = Dataset.from_images("flat", (x, y), (x, y), classes=1, scale=255.0)
    np.testing.assert_allclose(data.normalise(x), 0, atol=1e-6)


GOOD = colour()
NAN = np.full((6, 3, 4, 5), np.nan, np.float32)
BAD = [
    ({"x_train": GOOD.x_train.astype(np.float64)}, "x_train is float64"),
    ({"x_train": GOOD.x_train[:, 0]}, "expected uint8 or float32 of"),
    ({"x_train": NAN, "x_test": NAN[:2]}, "NaN or infinity"),
    ({"x_test": GOOD.x_test[:0], "y_test": GOOD.y_test[:0]}, "x_test is empty"),
    ({"x_train": GOOD.x_train[:0], "y_train": GOOD.y_train[:0]}, "x_train is empty"),
    ({"x_test": GOOD.x_test[:, :, 1:]}, "test images have shape"),
    ({"x_test": GOOD.x_test.astype(np.float32)}, "test images are float32"),
    ({"y_train": GOOD.y_train[:-1]}, "expected int64 .6,."),
    ({"y_train": GOOD.y_train.astype(np.uint8)}, "y_train is uint8"),
    ({"y_train": GOOD.y_train - 1}, "labels -1..0, expected 0..1"),
    ({"y_test": GOOD.y_test + 1}, "y_test has labels 1..2"),
    ({"classes": 0}, "got 0 classes"),
    ({"classes": 1 << 40}, "classes, expected 1..65536"),
    ({"class_names": ("one",)}, "got 1 class names, expected 2"),
    ({"clients": np.zeros(5, np.int32)}, "clients is int32 .5,., expected"),
    ({"clients": np.zeros(6, np.int64)}, "clients is int64"),
    ({"clients": np.full(6, -1, np.int32)}, "ids from 0"),
    ({"mean": np.zeros(2, np.float32)}, "mean is float32 .2,."),
    ({"std": np.array([1, np.nan, 1], np.float32)}, "std is float32"),
    ({"std": np.zeros(3, np.float32)}, "must be positive"),
    ({"scale": 0.0}, "must be positive"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=range(len(BAD)))
def test_what_does_not_fit_is_refused(change: dict, message: str):
    with pytest.raises(ValueError, match=f"'colour'.*{message}"):
        replace(GOOD, **change)


def test_from_images_refuses_what_has_no_statistics():
    none = (np.empty((0, 1, 2, 2), np.uint8), np.empty(0, np.int64))
    with pytest.raises(ValueError, match="x_train is empty"):
        Dataset.from_images("none", none, none, classes=1, scale=255.0)
