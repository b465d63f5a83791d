"""Conv-2, the FEMNIST model of LEAF and of PruneFL (Jiang et al., arXiv 1909.12326, Section VI)."""

from __future__ import annotations

from fedlean.layers import Conv2d, Flatten, Linear, MaxPool2d, ReLU, Shape
from fedlean.models._arguments import check_classes, check_image, check_width
from fedlean.spec import ModelSpec, sequential


def conv2(input_shape: Shape, classes: int, width: int = 32) -> ModelSpec:
    """PruneFL's Conv-2: two 5x5 convolutions and a wide hidden layer; for FEMNIST.

    `width` is the first layer's channels; the second has twice, the hidden layer 64 times as many.

    >>> conv2((1, 28, 28), 62).num_params
    6603710
    """
    check_image("conv2", input_shape)
    check_classes(classes)
    check_width(width)
    return sequential(
        input_shape,
        [
            ("conv1", Conv2d(width, 5, padding=2), "conv1"),
            ("relu1", ReLU(), "conv1"),
            ("pool1", MaxPool2d(2), "conv1"),
            ("conv2", Conv2d(2 * width, 5, padding=2), "conv2"),
            ("relu2", ReLU(), "conv2"),
            ("pool2", MaxPool2d(2), "conv2"),
            ("flatten", Flatten(), "fc1"),
            ("fc1", Linear(64 * width), "fc1"),
            ("relu3", ReLU(), "fc1"),
            ("fc2", Linear(classes), "fc2"),
        ],
    )
