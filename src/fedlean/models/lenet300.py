"""LeNet-300-100 (LeCun et al. 1998), the smallest model that pruning papers report."""

from __future__ import annotations

from fedlean.layers import Flatten, Linear, ReLU, Shape
from fedlean.models._arguments import check_classes
from fedlean.spec import ModelSpec, sequential


def lenet300(input_shape: Shape, classes: int) -> ModelSpec:
    """LeNet-300-100: three fully connected layers; reads images and vectors.

    >>> lenet300((1, 28, 28), 10).num_params
    266610
    """
    check_classes(classes)
    return sequential(
        input_shape,
        [
            ("flatten", Flatten(), "fc1"),
            ("fc1", Linear(300), "fc1"),
            ("relu1", ReLU(), "fc1"),
            ("fc2", Linear(100), "fc2"),
            ("relu2", ReLU(), "fc2"),
            ("fc3", Linear(classes), "fc3"),
        ],
    )
