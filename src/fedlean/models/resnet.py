"""Small residual networks in the CIFAR style (He et al. 2016, Section 4.2): 6n + 2 layers.

Differs from the paper: GroupNorm instead of BatchNorm by default, and a 1x1 convolution with norm
on the shortcut where the shape changes (the paper's option B).
"""

from __future__ import annotations

from typing import Literal

from fedlean.layers import (
    Add,
    BatchNorm,
    Conv2d,
    GlobalAvgPool,
    GroupNorm,
    Layer,
    Linear,
    ReLU,
    Shape,
)
from fedlean.models._arguments import check_classes, check_image
from fedlean.spec import INPUT, ModelSpec, Node

WIDTHS = (16, 32, 64)  # channels of the three stages; the image halves between them
NORM_GROUPS = 4  # 4, 8 and 16 channels per group: enough to average over, also after width slicing

# GroupNorm is the default because a client's batch is small and drawn from few classes: batch
# statistics then differ between clients and from the mean model's running statistics (Hsieh et al.
# 2020, arXiv 1910.00189).  GroupNorm looks at one example only and has nothing to synchronise.
Norm = Literal["group", "batch"]


def resnet8(input_shape: Shape, classes: int, *, norm: Norm = "group") -> ModelSpec:
    """ResNet-8: one residual block per stage, widths 16-32-64; a CIFAR model for small boards.

    >>> resnet8((3, 32, 32), 10).num_params
    78042
    """
    return _resnet("resnet8", input_shape, classes, depth=1, norm=norm)


def resnet20(input_shape: Shape, classes: int, *, norm: Norm = "group") -> ModelSpec:
    """ResNet-20: three residual blocks per stage, widths 16-32-64; the classic CIFAR ResNet.

    >>> list(resnet20((3, 32, 32), 10).blocks)
    ['stem', 'stage1', 'stage2', 'stage3', 'head']
    """
    return _resnet("resnet20", input_shape, classes, depth=3, norm=norm)


def _resnet(name: str, input_shape: Shape, classes: int, *, depth: int, norm: Norm) -> ModelSpec:
    check_image(name, input_shape)
    check_classes(classes)
    if norm not in ("group", "batch"):
        raise ValueError(f"norm must be 'group' or 'batch', got {norm!r}")
    normalise: Layer = GroupNorm(groups=NORM_GROUPS) if norm == "group" else BatchNorm()
    nodes = [
        Node("stem", _conv3x3(WIDTHS[0]), (INPUT,), "stem"),
        Node("stem_norm", normalise, ("stem",), "stem"),
        Node("stem_relu", ReLU(), ("stem_norm",), "stem"),
    ]
    for number, width in enumerate(WIDTHS, start=1):
        for index in range(1, depth + 1):
            stride = 2 if number > 1 and index == 1 else 1
            nodes += _residual(f"stage{number}", index, nodes[-1].name, width, stride, normalise)
    nodes += [
        Node("pool", GlobalAvgPool(), (nodes[-1].name,), "head"),
        Node("fc", Linear(classes), ("pool",), "head"),
    ]
    return ModelSpec(tuple(input_shape), tuple(nodes))


def _residual(
    stage: str, index: int, source: str, width: int, stride: int, normalise: Layer
) -> list[Node]:
    """relu(norm(conv(relu(norm(conv(x))))) + shortcut(x)); the shortcut changes shape if x must."""
    prefix = f"{stage}_{index}"
    nodes: list[Node] = []

    def add(suffix: str, layer: Layer, *inputs: str, prunable: bool = True) -> str:
        nodes.append(Node(f"{prefix}_{suffix}", layer, inputs, stage, prunable))
        return nodes[-1].name

    out = add("conv1", _conv3x3(width, stride), source)
    out = add("relu1", ReLU(), add("norm1", normalise, out))
    out = add("norm2", normalise, add("conv2", _conv3x3(width), out))
    shortcut = source
    if stride != 1:
        # 1x1 down-sampling convolutions hold 3 % of the weights and every residual path crosses
        # them: pruning them saves little and hurts much, so nobody does.
        down = Conv2d(width, 1, stride=stride, bias=False)
        shortcut = add("down_norm", normalise, add("down", down, source, prunable=False))
    add("relu2", ReLU(), add("add", Add(), out, shortcut))
    return nodes


def _conv3x3(width: int, stride: int = 1) -> Conv2d:
    return Conv2d(width, 3, stride=stride, padding=1, bias=False)  # the norm has the bias
