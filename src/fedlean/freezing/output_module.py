"""The output module that stands in for the blocks that a stage lacks.

As ProFL's and NeuLite's authors release it (github.com/Wuxiaobo315/NeuLiteCode): one bare 3x3
convolution of stride 2 without bias per missing block, global average pooling, a linear layer.
"""

from __future__ import annotations

from fedlean.layers import Conv2d, GlobalAvgPool, GroupNorm, Layer, Linear, ReLU, Shape
from fedlean.spec import ModelSpec, Node

GROUP_CHANNELS = 4  # of an optional norm, as of our residual models


def output_module(
    spec: ModelSpec,
    block: str,
    *,
    prefix: str = "surrogate",
    fc: str | None = None,
    norm: bool = False,
) -> tuple[Node, ...]:
    """What follows the output of `block` in place of the later blocks; for `stages.graft`.

    Each later block that ends in an image is one convolution to its channels; 1x1 pixels stay 1x1.
    The convolution that stands in for a block is `<prefix>_<block>` with the same shape in every
    stage, so that a stage may begin with what another trained.

    fc: the name of the linear layer; `<prefix>_fc` without one.  It has the shape of the model's
    own where that follows global average pooling, and may then have its name and tensors.
    norm: after each convolution GroupNorm and ReLU (ours; the authors have neither).

    Raises ValueError naming a block that the model lacks, or one that does not end in an image.
    """
    if block not in spec.blocks:
        raise ValueError(f"the model has no block {block!r}; it has {', '.join(spec.blocks)}")
    ends = {name: nodes[-1].name for name, nodes in spec.blocks.items()}
    source = ends[block]
    if len(spec.shapes[source]) != 3:
        raise ValueError(
            f"block {block!r} ends in shape {spec.shapes[source]}, but the output module needs an "
            "image (C, H, W): take an earlier block"
        )
    if len(spec.output_shape) != 1:
        raise ValueError(f"the model's output has shape {spec.output_shape}, expected (classes,)")
    nodes: list[Node] = []

    def add(name: str, layer: Layer) -> None:
        nodes.append(Node(name, layer, (nodes[-1].name if nodes else source,), prefix))

    for missing in _later(spec, block):
        shape = spec.shapes[ends[missing]]
        if len(shape) == 3:
            for suffix, layer in _stand_in(shape, norm):
                add(f"{prefix}_{missing}{suffix}", layer)
    add(f"{prefix}_pool", GlobalAvgPool())
    add(fc or f"{prefix}_fc", Linear(spec.output_shape[0]))
    return tuple(nodes)


def _later(spec: ModelSpec, block: str) -> list[str]:
    names = list(spec.blocks)
    return names[names.index(block) + 1 :]


def _stand_in(shape: Shape, norm: bool) -> list[tuple[str, Layer]]:
    channels = shape[0]
    layers: list[tuple[str, Layer]] = [("", Conv2d(channels, 3, stride=2, padding=1, bias=False))]
    if norm:
        groups = max(1, channels // GROUP_CHANNELS)
        groups = groups if channels % groups == 0 else 1
        layers += [("_norm", GroupNorm(groups=groups)), ("_relu", ReLU())]
    return layers
