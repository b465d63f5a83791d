"""Zhu & Gupta's schedule by hand."""

from __future__ import annotations

import pytest

from fedlean.pruning.gradual import gradual_density


def test_by_hand():
    """Sparsity 0.8·(1 - (1 - t/4)³) at t = 0..4: 0, 0.8·37/64, 0.8·7/8, 0.8·63/64, 0.8."""
    expected = [1.0, 1 - 0.8 * 37 / 64, 1 - 0.8 * 7 / 8, 1 - 0.8 * 63 / 64, 0.2]
    assert [gradual_density(step, 4, 0.2) for step in range(5)] == pytest.approx(expected)
    assert gradual_density(5, 4, 0.2) == 0.2  # and stays
    assert gradual_density(2, 4, 1.0) == 1.0


def test_bad_inputs_are_refused():
    with pytest.raises(ValueError, match="-1 of 4"):
        gradual_density(-1, 4, 0.5)
    with pytest.raises(ValueError, match="steps >= 1"):
        gradual_density(0, 0, 0.5)
    with pytest.raises(ValueError, match="final"):
        gradual_density(0, 4, 1.5)
