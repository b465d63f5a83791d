"""VGG (Simonyan & Zisserman 2015, arXiv 1409.1556) as PruneFL trains its VGG-11 on CIFAR-10.

(arXiv 1909.12326, Table I.)  No BatchNorm, and 512-wide fully connected layers instead of
ImageNet's 4096.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedlean.layers import Conv2d, Flatten, Layer, Linear, MaxPool2d, ReLU, Shape
from fedlean.models._arguments import check_classes, check_image, check_width
from fedlean.spec import ModelSpec, sequential

# Channels in multiples of the width, a pool after each stage.  The paper's configurations A and D.
VGG11 = ((1,), (2,), (4, 4), (8, 8), (8, 8))
VGG16 = ((1, 1), (2, 2), (4,) * 3, (8,) * 3, (8,) * 3)
HIDDEN = 8


def vgg11(input_shape: Shape, classes: int, width: int = 64) -> ModelSpec:
    """VGG-11 with PruneFL's 512-wide head, no BatchNorm; needs images of 32x32 or larger.

    `width` is the first layer's channels; the widest, and the head, have eight times as many.

    >>> vgg11((3, 32, 32), 10).num_params
    9750922
    """
    return _vgg("vgg11", VGG11, input_shape, classes, width)


def vgg16(input_shape: Shape, classes: int, width: int = 64) -> ModelSpec:
    """VGG-16 with the same head and no BatchNorm; needs images of 32x32 or larger.

    `width` is the first layer's channels; the widest, and the head, have eight times as many.

    >>> len(vgg16((3, 32, 32), 10).weighted)
    16
    """
    return _vgg("vgg16", VGG16, input_shape, classes, width)


def _vgg(
    name: str,
    stages: Sequence[tuple[int, ...]],
    input_shape: Shape,
    classes: int,
    width: int,
) -> ModelSpec:
    check_image(name, input_shape)
    check_classes(classes)
    check_width(width)
    return sequential(input_shape, [*_convolutions(stages, width), *_head(classes, HIDDEN * width)])


def _convolutions(stages: Sequence[tuple[int, ...]], width: int) -> list[tuple[str, Layer, str]]:
    layers: list[tuple[str, Layer, str]] = []
    number = 0
    for index, widths in enumerate(stages, start=1):
        stage = f"stage{index}"
        for multiple in widths:
            number += 1
            layers.append((f"conv{number}", Conv2d(multiple * width, 3, padding=1), stage))
            layers.append((f"relu{number}", ReLU(), stage))
        layers.append((f"pool{index}", MaxPool2d(2), stage))
    return layers


def _head(classes: int, hidden: int) -> list[tuple[str, Layer, str]]:
    return [
        ("flatten", Flatten(), "fc1"),
        ("fc1", Linear(hidden), "fc1"),
        ("fc1_relu", ReLU(), "fc1"),
        ("fc2", Linear(hidden), "fc2"),
        ("fc2_relu", ReLU(), "fc2"),
        ("fc3", Linear(classes), "fc3"),
    ]
