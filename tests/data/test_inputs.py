"""Inputs as stored or standardised."""

from dataclasses import replace

import numpy as np
import pytest
from federation import dataset

from fedlean.data.dataset import Dataset, with_inputs


def test_unit_inputs_are_pixels_over_scale():
    data = with_inputs(dataset(), "unit")
    assert np.allclose(data.normalise(data.x_test), data.x_test / 255, atol=1e-7)


def test_standardised_is_what_was_loaded():
    data = dataset()
    assert with_inputs(data, "standardised") is data


def test_other_words_are_refused():
    with pytest.raises(ValueError, match="'unit', got 'raw'"):
        with_inputs(dataset(), "raw")


def floats(train: list[float], test: list[float]) -> Dataset:
    def part(values: list[float]) -> tuple[np.ndarray, np.ndarray]:
        return np.array(values, np.float32)[:, None, None, None], np.zeros(len(values), np.int64)

    return Dataset.from_images("floats", part(train), part(test), classes=1, scale=1.0)


def test_unit_takes_the_ends_of_the_range():
    data = floats([0, 1, 0.5], [1, 0])
    assert with_inputs(data, "unit").mean.tolist() == [0.0]
    share = replace(data, x_test=data.x_test[:0], y_test=data.y_test[:0])
    assert with_inputs(share, "unit").std.tolist() == [1.0]


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([0, 255], [0, 1], r"training values in 0\.\.255, expected 0\.\.1"),
        ([-1, 1], [0, 1], r"training values in -1\.\.1"),
        ([0, 1], [0.5, 1.5], r"test values in 0\.5\.\.1\.5"),
        ([0, 1], [-0.5, 1], r"test values in -0\.5\.\.1"),
    ],
)
def test_unit_refuses_other_pixels(train: list[float], test: list[float], message: str):
    data = floats(train, test)
    with pytest.raises(ValueError, match=f"'floats'.*{message}.*--inputs standardised"):
        with_inputs(data, "unit")
    assert with_inputs(data, "standardised") is data


def test_bytes_above_the_scale_are_refused():
    data = replace(dataset(), scale=16.0)
    with pytest.raises(ValueError, match=r"training values in .*expected 0\.\.1"):
        with_inputs(data, "unit")
