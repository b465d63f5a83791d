"""MobileNetV3-Small (Howard et al. 2019, arXiv 1905.02244, Table 2), with torchvision's details.

Inverted residuals: a 1x1 convolution expands the channels, a depthwise one mixes positions, a gate
weighs channels (squeeze-and-excite), a 1x1 convolution projects back.

Differs from torchvision's: no dropout before the last layer, because specs have no dropout; the
1x1 convolutions on pooled images are Linear layers, which is the same with as many parameters.
Our choices: for small images the stem keeps the size of the image; GroupNorm as an option; the
depthwise weights are not pruned.
"""

from __future__ import annotations

from typing import NamedTuple, get_args

from fedlean.layers import (
    Add,
    BatchNorm,
    Conv2d,
    GlobalAvgPool,
    GroupNorm,
    Hardsigmoid,
    Hardswish,
    Layer,
    Linear,
    ReLU,
    Scale,
    Shape,
)
from fedlean.models._arguments import check_classes, check_image
from fedlean.models.resnet import GROUP_CHANNELS, Blocks, Norm, check_choice, is_small
from fedlean.spec import INPUT, ModelSpec, Node


class Unit(NamedTuple):
    """One inverted residual: a row of the paper's Table 2."""

    kernel: int  # side of the depthwise convolution
    expanded: int  # channels inside
    width: int  # channels that come out
    squeezed: int  # hidden units of the gate: expanded / 4 in steps of 8; 0: no gate
    swish: bool  # Hardswish, otherwise ReLU
    stride: int


# Rows of equal resolution are a stage; the image halves at the first row of each.
STAGES = (
    (Unit(3, 16, 16, 8, False, 2),),
    (Unit(3, 72, 24, 0, False, 2), Unit(3, 88, 24, 0, False, 1)),
    (
        Unit(5, 96, 40, 24, True, 2),
        Unit(5, 240, 40, 64, True, 1),
        Unit(5, 240, 40, 64, True, 1),
        Unit(5, 120, 48, 32, True, 1),
        Unit(5, 144, 48, 40, True, 1),
    ),
    (
        Unit(5, 288, 96, 72, True, 2),
        Unit(5, 576, 96, 144, True, 1),
        Unit(5, 576, 96, 144, True, 1),
    ),
)
STEM, LAST, HIDDEN = 16, 576, 1024  # channels, channels, units


def mobilenetv3_small(
    input_shape: Shape, classes: int, *, norm: Norm = "batch", blocks: Blocks = "stage"
) -> ModelSpec:
    """MobileNetV3-Small: 11 inverted residuals with squeeze-and-excite, for mobile devices.

    `norm="batch"` is the paper's; in training it needs a batch of 2 or more when the image's sides
    are at most 16, where the last stage is one pixel.  `blocks` divides the model for progressive
    training: between stem and head there is one block per "stage" (4) or per "unit", an inverted
    residual (11); the last convolution goes with the last of them.  Names of layers and tensors are
    the same.  The stem's stride is 1 if a side of the image is at most 64 (`resnet.SMALL_SIDE`),
    otherwise 2; parameters are the same.

    PruneFL's, for CelebA, has 927,008 parameters in convolutions (gates and norms included) and
    592,898 in fully connected layers (Table I):

    >>> spec = mobilenetv3_small((3, 84, 84), 2)
    >>> spec.num_params == 927_008 + 592_898
    True

    >>> list(spec.blocks)
    ['stem', 'stage1', 'stage2', 'stage3', 'stage4', 'head']
    """
    check_image("mobilenetv3_small", input_shape)
    check_classes(classes)
    check_choice("norm", norm, get_args(Norm))
    check_choice("blocks", blocks, get_args(Blocks))
    group_norm, batch_norm = GroupNorm(groups=STEM // GROUP_CHANNELS), BatchNorm(1e-3, 0.01)
    normalise: Layer = group_norm if norm == "group" else batch_norm
    stem = Conv2d(STEM, 3, stride=1 if is_small(input_shape) else 2, padding=1, bias=False)
    nodes = _convolution("stem", stem, INPUT, "stem", normalise, Hardswish())
    channels, block = STEM, ""
    for number, units in enumerate(STAGES, start=1):
        for index, unit in enumerate(units, start=1):
            prefix = f"stage{number}_{index}"
            block = prefix if blocks == "unit" else f"stage{number}"
            nodes += _inverted_residual(prefix, block, nodes[-1].name, channels, unit, normalise)
            channels = unit.width
    last = Conv2d(LAST, 1, bias=False)
    nodes += _convolution("last", last, nodes[-1].name, block, normalise, Hardswish())
    nodes += _head(nodes[-1].name, classes)
    return ModelSpec(tuple(input_shape), tuple(nodes))


def _convolution(
    name: str,
    conv: Conv2d,
    source: str,
    block: str,
    normalise: Layer,
    activation: Layer | None = None,
) -> list[Node]:
    # A depthwise convolution has few weights, 9 or 25 per channel, and each channel hangs on its
    # own: they stay dense, as in the sparse MobileNets of Zhu & Gupta 2017 (arXiv 1710.01878).
    prunable = conv.groups == 1
    nodes = [
        Node(name, conv, (source,), block, prunable),
        Node(f"{name}_norm", normalise, (name,), block),
    ]
    if activation is not None:
        nodes.append(Node(f"{name}_act", activation, (nodes[-1].name,), block))
    return nodes


def _inverted_residual(
    prefix: str, block: str, source: str, channels: int, unit: Unit, normalise: Layer
) -> list[Node]:
    """project(gate(depthwise(expand(x)))), plus x where the shapes agree."""
    activation = Hardswish() if unit.swish else ReLU()
    nodes: list[Node] = []

    def convolve(suffix: str, conv: Conv2d, source: str, after: Layer | None = None) -> str:
        nodes.extend(_convolution(f"{prefix}_{suffix}", conv, source, block, normalise, after))
        return nodes[-1].name

    out, wide, kernel = source, unit.expanded, unit.kernel
    if wide != channels:
        out = convolve("expand", Conv2d(wide, 1, bias=False), out, activation)
    depthwise = Conv2d(wide, kernel, unit.stride, kernel // 2, groups=wide, bias=False)
    out = convolve("depthwise", depthwise, out, activation)
    if unit.squeezed:
        nodes += _gated(prefix, block, out, unit)
        out = nodes[-1].name
    out = convolve("project", Conv2d(unit.width, 1, bias=False), out)
    if unit.stride == 1 and unit.width == channels:
        nodes.append(Node(f"{prefix}_add", Add(), (out, source), block))
    return nodes


def _gated(prefix: str, block: str, source: str, unit: Unit) -> list[Node]:
    """Squeeze-and-excite: every channel of `source` times a number in [0, 1]."""
    squeeze, fc1, relu, fc2, gate = (
        f"{prefix}_{suffix}" for suffix in ("squeeze", "fc1", "fc1_act", "fc2", "gate")
    )
    return [
        Node(squeeze, GlobalAvgPool(), (source,), block),
        Node(fc1, Linear(unit.squeezed), (squeeze,), block),
        Node(relu, ReLU(), (fc1,), block),
        Node(fc2, Linear(unit.expanded), (relu,), block),
        Node(gate, Hardsigmoid(), (fc2,), block),
        Node(f"{prefix}_scale", Scale(), (source, gate), block),
    ]


def _head(source: str, classes: int) -> list[Node]:
    return [
        Node("pool", GlobalAvgPool(), (source,), "head"),
        Node("fc1", Linear(HIDDEN), ("pool",), "head"),
        Node("fc1_act", Hardswish(), ("fc1",), "head"),
        Node("fc2", Linear(classes), ("fc1_act",), "head"),
    ]
