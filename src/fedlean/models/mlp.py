"""Small multilayer perceptrons with smooth activations, as training by forward passes wants."""

from __future__ import annotations

from fedlean.layers import Flatten, Hardswish, Linear, Shape
from fedlean.models._arguments import check_classes
from fedlean.spec import ModelSpec, sequential


def mlp(input_shape: Shape, classes: int) -> ModelSpec:
    """MLP with hidden layers of 128 and 64 units and Hardswish; reads images and vectors.

    >>> mlp((1, 8, 8), 10).num_params
    17226
    """
    return _mlp(input_shape, classes, 128, 64)


def mlp_40_20(input_shape: Shape, classes: int) -> ModelSpec:
    """MLP with hidden layers of 40 and 20 units: on 8x8 digits a fifth of mlp's parameters.

    >>> mlp_40_20((1, 8, 8), 10).num_params
    3630
    """
    return _mlp(input_shape, classes, 40, 20)


def mlp_27_14(input_shape: Shape, classes: int) -> ModelSpec:
    """MLP with hidden layers of 27 and 14 units: on 28x28 images a fifth of mlp's parameters.

    >>> mlp((1, 28, 28), 10).num_params, mlp_27_14((1, 28, 28), 10).num_params
    (109386, 21737)
    """
    return _mlp(input_shape, classes, 27, 14)


def mlp_13_7(input_shape: Shape, classes: int) -> ModelSpec:
    """MLP with hidden layers of 13 and 7 units: on 8x8 digits a twentieth of mlp's parameters.

    >>> mlp_13_7((1, 8, 8), 10).num_params
    1023
    """
    return _mlp(input_shape, classes, 13, 7)


def _mlp(input_shape: Shape, classes: int, first: int, second: int) -> ModelSpec:
    check_classes(classes)
    return sequential(
        input_shape,
        [
            ("flatten", Flatten(), "fc1"),
            ("fc1", Linear(first), "fc1"),
            ("act1", Hardswish(), "fc1"),
            ("fc2", Linear(second), "fc2"),
            ("act2", Hardswish(), "fc2"),
            ("fc3", Linear(classes), "fc3"),
        ],
    )
