"""Steps over the first half of a run, by hand."""

from __future__ import annotations

import pytest

from fedlean.pruning.prune_steps import density_after, steps_in_first_half


def test_steps_that_fit_the_first_half():
    assert [steps_in_first_half(100, every) for every in (1, 7, 25, 26, 50, 51)] == [
        50,
        7,
        2,
        1,
        1,
        0,
    ]
    assert steps_in_first_half(7, 3) == 1 and steps_in_first_half(1, 1) == 0


def test_linear_steps_by_hand():
    """To 0.2 in 4: every step drops 0.2 of all weights."""
    found = [density_after(step, 4, 0.2, "linear") for step in range(5)]
    assert found == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])


def test_geometric_steps_by_hand():
    """To 1/16 in 4: every step drops half of those left."""
    assert [density_after(step, 4, 1 / 16, "geometric") for step in range(5)] == [
        1,
        1 / 2,
        1 / 4,
        1 / 8,
        1 / 16,
    ]


@pytest.mark.parametrize("step, steps", [(-1, 4), (5, 4), (0, 0)])
def test_a_step_that_is_none(step, steps):
    with pytest.raises(ValueError, match=f"got {step} of {steps}"):
        density_after(step, steps, 0.5, "linear")


def test_every_zero_rounds():
    with pytest.raises(ValueError, match="every must be at least 1"):
        steps_in_first_half(10, 0)
