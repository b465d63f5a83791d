from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedlean.data.dataset import Dataset


def colour(dtype: type = np.uint8, count: int = 6) -> Dataset:
    rng = np.random.default_rng(1)
    x = rng.integers(0, 256, (count, 3, 4, 5)).astype(dtype)
    y = (np.arange(count) % 2).astype(np.int64)
    return Dataset.from_images("colour", (x, y), (x[:2], y[:2]), classes=2, scale=255.0)


def test_statistics_are_those_of_the_training_examples():
    """Channel 0 holds 0, 255, 255, 0: mean 1/2, std 1/2.  Channel 1 is constant at 51 / 255."""
    x = np.array([[[[0, 255]], [[51, 51]]], [[[255, 0]], [[51, 51]]]], np.uint8)
    y = np.zeros(2, np.int64)
    data = Dataset.from_images("a", (x, y), (x[:1], y[:1]), classes=1, scale=255.0)
    np.testing.assert_allclose(data.mean, [0.5, 0.2], rtol=1e-6)
    np.testing.assert_allclose(data.std, [0.5, 1.0], rtol=1e-6)


@pytest.mark.parametrize("shape", [(6, 5), (6, 3, 7), (6, 2, 4, 5)])
@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.float32])
def test_tables_signals_and_pictures_of_any_type(shape: tuple[int, ...], dtype: type):
    x = (np.random.default_rng(0).random(shape) * 100).astype(dtype)
    y = np.arange(6) % 2
    data = Dataset.from_images("a", (x, y), (x[:2], y[:2]), classes=2, scale=4.0)
    assert data.input_shape == shape[1:] and data.x_train.dtype == dtype
    others = tuple(axis for axis in range(len(shape)) if axis != 1)
    out = data.normalise(x)
    assert out.dtype == np.float32 and out.shape == shape and out.flags.c_contiguous
    np.testing.assert_allclose(out.mean(axis=others), 0, atol=1e-5)
    np.testing.assert_allclose(out.std(axis=others), 1, atol=1e-5)


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
    ({"x_train": GOOD.x_train[:, 0, 0, 0]}, r"uint8 .6,., expected .* of .examples, columns."),
    ({"x_train": GOOD.x_train[None]}, "expected .* of .examples, columns."),
    ({"x_train": NAN, "x_test": NAN[:2]}, "NaN or infinity"),
    ({f"{a}_{b}": getattr(GOOD, f"{a}_{b}")[:0] for a in "xy" for b in ("train", "test")}, "empty"),
    ({"x_test": GOOD.x_test[:, :, 1:]}, "test examples have shape"),
    ({"x_test": GOOD.x_test.astype(np.float32)}, "test examples are float32"),
    ({"y_train": GOOD.y_train[:-1]}, "expected int64 .6,."),
    ({"y_train": GOOD.y_train.astype(np.uint8)}, "y_train is uint8"),
    ({"y_train": GOOD.y_train - 1}, "labels -1..0, expected 0..1"),
    ({"y_test": GOOD.y_test + 1}, "y_test has labels 1..2"),
    ({"classes": 0}, "got 0 classes"),
    ({"classes": 1 << 40}, "classes, expected 1..65536"),
    ({"class_names": ("one",)}, "got 1 class names, expected 2"),
    ({"class_names": ("one", "one")}, "class name 'one' more than once"),
    ({"class_names": ("one", "")}, "a class name of 0 characters"),
    ({"class_names": ("one", "x" * 201)}, "a class name of 201 characters"),
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


def test_a_device_has_no_test_examples_and_a_server_may_have_no_others():
    for part in ("train", "test"):
        none = {f"{each}_{part}": getattr(GOOD, f"{each}_{part}")[:0] for each in "xy"}
        data = replace(GOOD, **none)
        assert len(data.x_train) + len(data.x_test) == (2 if part == "train" else 6)
        assert data.value_range == GOOD.value_range or part == "train"


def test_without_training_examples_nothing_is_normalised_yet():
    none = GOOD.x_train[:0], GOOD.y_train[:0]
    data = Dataset.from_images("a", none, (GOOD.x_test, GOOD.y_test), classes=2, scale=255.0)
    assert data.mean.tolist() == [0.0] * 3 and data.std.tolist() == [1.0] * 3
    low, high = GOOD.x_test.min() / 255, GOOD.x_test.max() / 255
    assert data.value_range == (low, high)


def test_classes_without_names_count_from_zero():
    assert colour().class_names == ("0", "1")
    assert replace(GOOD, classes=12, class_names=()).class_names[9:] == ("9", "10", "11")


def test_labels_held_are_those_of_training():
    data = replace(GOOD, classes=4, class_names=tuple("wxyz"), y_train=3 * GOOD.y_train)
    assert data.labels_held == ("w", "z")
    assert replace(data, y_train=data.y_train // 3).labels_held == ("w", "x")


@pytest.mark.parametrize(("dtype", "scale"), [(np.uint8, 255.0), (np.uint8, 16.0), (float, 1.0)])
def test_value_range(dtype: type, scale: float):
    x = np.array([[[[8, 4]]], [[[-8 if dtype is float else 8, 16]]]]).astype(dtype)
    x = x.astype(np.float32) if dtype is float else x
    y = np.zeros(2, np.int64)
    data = Dataset.from_images("a", (x, y), (x, y), classes=1, scale=scale)
    assert data.value_range == ((-8.0, 16.0) if dtype is float else (4 / scale, 16 / scale))


def test_with_classes_renumbers_labels():
    data = replace(GOOD, class_names=("3", "7"))
    mapped = data.with_classes([str(i) for i in range(10)])
    assert mapped.y_train.tolist() == [3, 7, 3, 7, 3, 7] and mapped.y_test.tolist() == [3, 7]
    assert mapped.classes == 10 and mapped.class_names == tuple("0123456789")
    assert mapped.x_train is data.x_train and mapped.labels_held == ("3", "7")
    assert mapped.with_classes(tuple("0123456789")) is mapped
    assert data.with_classes(["7", "3"]).y_train.tolist() == [1, 0, 1, 0, 1, 0]


def test_with_classes_needs_only_the_classes_that_have_examples():
    data = replace(GOOD, classes=3, class_names=("3", "7", "9"))
    assert data.with_classes(["7", "3"]).y_train.tolist() == [1, 0, 1, 0, 1, 0]
    with pytest.raises(
        ValueError, match="examples of '3', '7', expected classes among '3', '9': '7'"
    ):
        data.with_classes(["3", "9"])
    odd = replace(data, y_train=0 * data.y_train)
    with pytest.raises(ValueError, match="'7' must be renamed"):
        odd.with_classes(["3", "9"])  # a test example has it
    share = replace(odd, x_test=odd.x_test[:0], y_test=odd.y_test[:0])
    assert share.with_classes(["9", "3"]).y_train.tolist() == [1] * 6
    with pytest.raises(ValueError, match="class name '3' more than once"):
        data.with_classes(["3", "7", "3"])


def test_with_classes_cuts_long_lists():
    data = replace(GOOD, classes=1000, class_names=())
    with pytest.raises(ValueError, match=r"'c0', .*\.\.\. 'c4999' \(5000 in all\): '0', '1' must"):
        data.with_classes([f"c{i}" for i in range(5000)])
