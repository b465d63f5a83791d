"""Which coordinates of a weight join which units."""

from __future__ import annotations

import numpy as np
import pytest

from fedlean.layers import (
    Conv2d,
    Flatten,
    GlobalAvgPool,
    GroupNorm,
    Hardswish,
    Linear,
    MaxPool2d,
    ReLU,
    Scaler,
)
from fedlean.patterns.unit_grid import unit_grid
from fedlean.spec import sequential

CNN = sequential(
    (3, 8, 8),
    [
        ("conv1", Conv2d(4, 3, padding=1)),
        ("relu1", ReLU()),
        ("conv2", Conv2d(6, 5, padding=2, groups=2)),
        ("pool", MaxPool2d(4)),
        ("flat", Flatten()),
        ("swish", Hardswish()),
        ("scaler", Scaler(2.0)),
        ("fc1", Linear(7)),
        ("norm", GroupNorm()),
        ("fc2", Linear(5)),
    ],
)


def test_shapes_by_hand() -> None:
    """conv1 reads pixels; conv2 has 2 groups of 3 by 2; fc1 reads 6 channels of 2x2; fc2 fc1's."""
    assert unit_grid(CNN, "conv1.weight") == ((1, 4, 3, 9), False)
    assert unit_grid(CNN, "conv2.weight") == ((2, 3, 2, 25), True)
    assert unit_grid(CNN, "fc1.weight") == ((1, 7, 6, 4), True)
    assert unit_grid(CNN, "fc2.weight") == ((1, 5, 7, 1), True)


def test_a_reshaped_weight_has_its_units_on_its_axes() -> None:
    """Of fc1, input channel 4 is the pixels 16 to 19 of the flattened image."""
    weight = np.zeros((7, 24), bool)
    weight[:, 16:20] = True
    by_unit = weight.reshape(unit_grid(CNN, "fc1.weight").shape)
    assert by_unit[:, :, 4].all() and np.count_nonzero(by_unit) == 28


def test_pooled_channels_and_plain_vectors() -> None:
    pooled = sequential(
        (3, 8, 8), [("conv", Conv2d(4, 3)), ("pool", GlobalAvgPool()), ("fc", Linear(2))]
    )
    assert unit_grid(pooled, "fc.weight") == ((1, 2, 4, 1), True)
    flat = sequential((2, 3, 3), [("flat", Flatten()), ("fc", Linear(2))])
    assert unit_grid(flat, "fc.weight") == ((1, 2, 2, 9), False)


@pytest.mark.parametrize("name", ["conv1.bias", "conv9.weight", "conv1"])
def test_refuses_what_is_not_prunable(name) -> None:
    with pytest.raises(ValueError, match=f"{name!r} is no prunable weight"):
        unit_grid(CNN, name)
