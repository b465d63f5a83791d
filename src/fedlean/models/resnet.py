"""Residual networks (He et al. 2016, arXiv 1512.03385) of basic blocks: two 3x3 convolutions each.

resnet8 and resnet20 are the CIFAR ones (Section 4.2: 6n + 2 layers), resnet18 and resnet34 the
smallest ImageNet ones (Table 1), of which PruneFL trains the first (arXiv 1909.12326, Table I).

Our choices: GroupNorm instead of BatchNorm by default; a 1x1 convolution with norm on the shortcut
where the shape changes (the paper's option B) in the CIFAR ones too; in the ImageNet ones the CIFAR
stem for small images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from fedlean.layers import (
    Add,
    BatchNorm,
    Conv2d,
    GlobalAvgPool,
    GroupNorm,
    Layer,
    Linear,
    MaxPool2d,
    ReLU,
    Shape,
)
from fedlean.models._arguments import check_classes, check_image
from fedlean.spec import INPUT, ModelSpec, Node

CIFAR_WIDTHS = (16, 32, 64)  # channels of the stages; the image halves between them
GROUP_CHANNELS = 4  # per group where the network is thinnest: enough also after width slicing
SMALL_SIDE = 64  # ours: images up to here lose too much in the ImageNet stem, which quarters them

# GroupNorm is the default because a client's batch is small and drawn from few classes: batch
# statistics then differ between clients and from the mean model's running statistics (Hsieh et al.
# 2020, arXiv 1910.00189).  GroupNorm looks at one example only and has nothing to synchronise.
Norm = Literal["group", "batch"]
# What one block of the spec is, and so what progressive training freezes and trains at a time.
Blocks = Literal["stage", "unit"]


def resnet8(input_shape: Shape, classes: int, *, norm: Norm = "group") -> ModelSpec:
    """ResNet-8: one residual block per stage, widths 16-32-64; a CIFAR model for small boards.

    >>> resnet8((3, 32, 32), 10).num_params
    78042
    """
    return _resnet("resnet8", input_shape, classes, CIFAR_WIDTHS, depth=(1, 1, 1), norm=norm)


def resnet20(
    input_shape: Shape, classes: int, *, norm: Norm = "group", blocks: Blocks = "stage"
) -> ModelSpec:
    """ResNet-20: three residual blocks per stage, widths 16-32-64; the classic CIFAR ResNet.

    `blocks` as in `resnet18`: 3 stages or 9 units.

    >>> list(resnet20((3, 32, 32), 10).blocks)
    ['stem', 'stage1', 'stage2', 'stage3', 'head']
    """
    return _resnet(
        "resnet20", input_shape, classes, CIFAR_WIDTHS, depth=(3, 3, 3), norm=norm, blocks=blocks
    )


def resnet18(
    input_shape: Shape,
    classes: int,
    *,
    norm: Norm = "group",
    blocks: Blocks = "stage",
    width: int = 64,
) -> ModelSpec:
    """ResNet-18: two residual blocks per stage, widths 64-128-256-512.

    `blocks` divides it for progressive training: between stem and head there is one block per
    "stage" (4) or per residual "unit" (8); names of layers and tensors are the same.  The stem is
    ImageNet's, 7x7 with stride 2 and a max pool, when both sides of the image exceed `SMALL_SIDE`,
    otherwise the CIFAR networks' 3x3 with stride 1.  `width` is that of the first stage, which each
    later one doubles: a multiple of 4, or from 1 to 7.

    PruneFL's, for ImageNet-100, has 11.23M parameters (Table I) and leaves the 1x1 convolutions on
    the shortcuts unpruned.  Its norms are BatchNorm, `norm="batch"`, and so is its learning rate
    one for BatchNorm; the number of parameters is the same.

    >>> spec = resnet18((3, 168, 168), 100)
    >>> spec.num_params
    11227812
    >>> [node.name for node in spec.weighted if not node.prunable]
    ['stage2_1_down', 'stage3_1_down', 'stage4_1_down']

    On CIFAR-10, 7,680 weights fewer in the stem and 46,170 fewer in the head:

    >>> resnet18((3, 32, 32), 10).num_params
    11173962
    """
    return _resnet(
        "resnet18",
        input_shape,
        classes,
        _doubling(width),
        depth=(2, 2, 2, 2),
        norm=norm,
        blocks=blocks,
        imagenet_stem=True,
    )


def resnet34(
    input_shape: Shape,
    classes: int,
    *,
    norm: Norm = "group",
    blocks: Blocks = "stage",
    width: int = 64,
) -> ModelSpec:
    """ResNet-34: three, four, six and three residual blocks in the stages of ResNet-18.

    `blocks` ("unit": 16) and `width` as in `resnet18`.

    >>> resnet34((3, 32, 32), 10).num_params
    21282122
    """
    return _resnet(
        "resnet34",
        input_shape,
        classes,
        _doubling(width),
        depth=(3, 4, 6, 3),
        norm=norm,
        blocks=blocks,
        imagenet_stem=True,
    )


def _doubling(width: int) -> tuple[int, ...]:
    whole = isinstance(width, int) and not isinstance(width, bool)
    if not whole or width < 1 or (width % GROUP_CHANNELS and width >= 2 * GROUP_CHANNELS):
        raise ValueError(f"width must be a multiple of 4, or from 1 to 7, got {width!r:.40}")
    return tuple(width << stage for stage in range(4))


def is_small(image: Shape) -> bool:
    """Whether either side of (C, H, W) is at most `SMALL_SIDE`."""
    return min(image[1:]) <= SMALL_SIDE


def check_choice(setting: str, value: str, choices: tuple[str, ...]) -> None:
    """ValueError if `value` is not one of the `choices` of that setting."""
    if value not in choices:
        raise ValueError(f"{setting} must be {' or '.join(map(repr, choices))}, got {value!r}")


def _resnet(
    name: str,
    input_shape: Shape,
    classes: int,
    widths: tuple[int, ...],
    *,
    depth: Sequence[int],
    norm: Norm,
    blocks: Blocks = "stage",
    imagenet_stem: bool = False,
) -> ModelSpec:
    check_image(name, input_shape)
    check_classes(classes)
    check_choice("norm", norm, get_args(Norm))
    check_choice("blocks", blocks, get_args(Blocks))
    normalise: Layer = (
        GroupNorm(groups=max(1, widths[0] // GROUP_CHANNELS)) if norm == "group" else BatchNorm()
    )
    nodes = _stem(widths[0], normalise, shrink=imagenet_stem and not is_small(input_shape))
    for number, (width, units) in enumerate(zip(widths, depth, strict=True), start=1):
        for index in range(1, units + 1):
            stage, unit = f"stage{number}", f"stage{number}_{index}"
            block = unit if blocks == "unit" else stage
            stride = 2 if number > 1 and index == 1 else 1
            nodes += _residual(unit, block, nodes[-1].name, width, stride, normalise)
    nodes += [
        Node("pool", GlobalAvgPool(), (nodes[-1].name,), "head"),
        Node("fc", Linear(classes), ("pool",), "head"),
    ]
    return ModelSpec(tuple(input_shape), tuple(nodes))


def _stem(width: int, normalise: Layer, *, shrink: bool) -> list[Node]:
    """To `width` channels; with `shrink` the image's sides become a quarter, as for ImageNet."""
    conv = Conv2d(width, 7, stride=2, padding=3, bias=False) if shrink else _conv3x3(width)
    nodes = [
        Node("stem", conv, (INPUT,), "stem"),
        Node("stem_norm", normalise, ("stem",), "stem"),
        Node("stem_relu", ReLU(), ("stem_norm",), "stem"),
    ]
    if shrink:
        nodes.append(Node("stem_pool", MaxPool2d(3, 2, 1), ("stem_relu",), "stem"))
    return nodes


def _residual(
    prefix: str, block: str, source: str, width: int, stride: int, normalise: Layer
) -> list[Node]:
    """relu(norm(conv(relu(norm(conv(x))))) + shortcut(x)); the shortcut changes shape if x must."""
    nodes: list[Node] = []

    def add(suffix: str, layer: Layer, *inputs: str, prunable: bool = True) -> str:
        nodes.append(Node(f"{prefix}_{suffix}", layer, inputs, block, prunable))
        return nodes[-1].name

    out = add("conv1", _conv3x3(width, stride), source)
    out = add("relu1", ReLU(), add("norm1", normalise, out))
    out = add("norm2", normalise, add("conv2", _conv3x3(width), out))
    shortcut = source
    if stride != 1:
        # 1x1 down-sampling convolutions hold 1 to 3 % of the weights and every residual path
        # crosses them: pruning them saves little and hurts much, so nobody does.
        down = Conv2d(width, 1, stride=stride, bias=False)
        shortcut = add("down_norm", normalise, add("down", down, source, prunable=False))
    add("relu2", ReLU(), add("add", Add(), out, shortcut))
    return nodes


def _conv3x3(width: int, stride: int = 1) -> Conv2d:
    return Conv2d(width, 3, stride=stride, padding=1, bias=False)  # the norm has the bias
