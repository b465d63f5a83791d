"""VGG and Conv-2 of other widths: every layer in proportion."""

from __future__ import annotations

import pytest

from fedlean.models.conv2 import conv2
from fedlean.models.vgg import vgg11, vgg16


def test_widths_by_hand():
    shapes = vgg11((3, 32, 32), 10, width=4).param_shapes
    convolutions = [shapes[f"conv{n}.weight"][:2] for n in range(1, 9)]
    assert convolutions == [
        (4, 3),
        (8, 4),
        (16, 8),
        (16, 16),
        (32, 16),
        (32, 32),
        (32, 32),
        (32, 32),
    ]
    assert shapes["fc1.weight"] == (32, 32) and shapes["fc3.weight"] == (10, 32)
    shapes = conv2((1, 28, 28), 62, width=8).param_shapes
    assert shapes["conv2.weight"] == (16, 8, 5, 5) and shapes["fc1.weight"] == (512, 16 * 49)


@pytest.mark.parametrize("model", [vgg11, vgg16, conv2])
def test_the_width_that_is_not_said_is_the_papers(model):
    first = {"vgg11": 64, "vgg16": 64, "conv2": 32}[model.__name__]
    assert model((3, 32, 32), 10) == model((3, 32, 32), 10, width=first)
    for width in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="width must be an integer of at least 1"):
            model((3, 32, 32), 10, width=width)
