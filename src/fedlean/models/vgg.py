"""VGG (Simonyan & Zisserman 2015, arXiv 1409.1556) as PruneFL trains its VGG-11 on CIFAR-10.

(arXiv 1909.12326, Table I.)  No BatchNorm, and 512-wide fully connected layers instead of
ImageNet's 4096.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedlean.layers import Conv2d, Flatten, Layer, Linear, MaxPool2d, ReLU, Shape
from fedlean.models._arguments import check_classes, check_image
from fedlean.spec import ModelSpec, sequential

# Channels; each stage ends in a pool.  The paper's configurations A and D.
VGG11 = ((64,), (128,), (256, 256), (512, 512), (512, 512))
VGG16 = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)
HIDDEN = 512


def vgg11(input_shape: Shape, classes: int) -> ModelSpec:
    """VGG-11 with PruneFL's 512-wide head, no BatchNorm; needs images of 32x32 or larger.

    >>> vgg11((3, 32, 32), 10).num_params
    9750922
    """
    return _vgg("vgg11", VGG11, input_shape, classes)


def vgg16(input_shape: Shape, classes: int) -> ModelSpec:
    """VGG-16 with the same head and no BatchNorm; needs images of 32x32 or larger.

    >>> len(vgg16((3, 32, 32), 10).weighted)
    16
    """
    return _vgg("vgg16", VGG16, input_shape, classes)


def _vgg(
    name: str, stages: Sequence[tuple[int, ...]], input_shape: Shape, classes: int
) -> ModelSpec:
    check_image(name, input_shape)
    check_classes(classes)
    return sequential(input_shape, [*_convolutions(stages), *_head(classes)])


def _convolutions(stages: Sequence[tuple[int, ...]]) -> list[tuple[str, Layer, str]]:
    layers: list[tuple[str, Layer, str]] = []
    number = 0
    for index, widths in enumerate(stages, start=1):
        stage = f"stage{index}"
        for width in widths:
            number += 1
            layers.append((f"conv{number}", Conv2d(width, 3, padding=1), stage))
            layers.append((f"relu{number}", ReLU(), stage))
        layers.append((f"pool{index}", MaxPool2d(2), stage))
    return layers


def _head(classes: int) -> list[tuple[str, Layer, str]]:
    return [
        ("flatten", Flatten(), "fc1"),
        ("fc1", Linear(HIDDEN), "fc1"),
        ("fc1_relu", ReLU(), "fc1"),
        ("fc2", Linear(HIDDEN), "fc2"),
        ("fc2_relu", ReLU(), "fc2"),
        ("fc3", Linear(classes), "fc3"),
    ]
