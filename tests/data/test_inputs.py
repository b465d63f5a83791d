"""Inputs as stored or standardised."""

import numpy as np
import pytest
from federation import dataset

from fedlean.data.dataset import with_inputs


def test_unit_inputs_are_pixels_over_scale():
    data = with_inputs(dataset(), "unit")
    assert np.allclose(data.normalise(data.x_test), data.x_test / 255, atol=1e-7)


def test_standardised_is_what_was_loaded():
    data = dataset()
    assert with_inputs(data, "standardised") is data


def test_other_words_are_refused():
    with pytest.raises(ValueError, match="'unit', got 'raw'"):
        with_inputs(dataset(), "raw")
