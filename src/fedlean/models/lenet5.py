"""A convolutional network after LeNet-5 (LeCun et al. 1998), with norms for small batches.

GroupNorm and Hardswish in place of the original's sigmoids: what training by forward passes wants.
"""

from __future__ import annotations

from fedlean.layers import Conv2d, Flatten, GroupNorm, Hardswish, Layer, Linear, MaxPool2d, Shape
from fedlean.models._arguments import check_classes, check_image
from fedlean.spec import ModelSpec, sequential


def lenet5(input_shape: Shape, classes: int) -> ModelSpec:
    """LeNet-5-like: two 5x5 convolutions with GroupNorm and Hardswish, three linear layers.

    >>> lenet5((1, 28, 28), 10).num_params
    62606
    """
    return _lenet5("lenet5", input_shape, classes, (8, 16), (120, 84))


def lenet5_small(input_shape: Shape, classes: int) -> ModelSpec:
    """The same with 4 and 8 channels and 48 and 32 units: a fifth of lenet5's parameters.

    >>> lenet5_small((1, 28, 28), 10).num_params
    12482
    """
    return _lenet5("lenet5_small", input_shape, classes, (4, 8), (48, 32))


def _lenet5(
    name: str, input_shape: Shape, classes: int, channels: tuple[int, int], units: tuple[int, int]
) -> ModelSpec:
    check_image(name, input_shape)
    check_classes(classes)
    layers: list[tuple[str, Layer, str]] = []
    for number, (width, padding) in enumerate(zip(channels, (2, 0), strict=True), start=1):
        block = f"conv{number}"
        layers += [
            (block, Conv2d(width, 5, padding=padding), block),
            (f"norm{number}", GroupNorm(groups=4), block),
            (f"act{number}", Hardswish(), block),
            (f"pool{number}", MaxPool2d(2), block),
        ]
    layers.append(("flatten", Flatten(), "fc1"))
    for number, width in enumerate(units, start=1):
        block = f"fc{number}"
        layers += [(block, Linear(width), block), (f"act{number + 2}", Hardswish(), block)]
    return sequential(input_shape, [*layers, ("fc3", Linear(classes), "fc3")])
