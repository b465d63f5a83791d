"""The output module that stands in for the parts that a stage lacks.

As ProFL's and NeuLite's authors release it (github.com/Wuxiaobo315/NeuLiteCode): one bare 3x3
convolution of stride 2 without bias per missing part, global average pooling, a linear layer.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedlean.layers import Conv1d, Conv2d, GlobalAvgPool, GroupNorm, Layer, Linear, ReLU, Shape
from fedlean.spec import ModelSpec, Node
from fedlean.submodels.parts import Part

GROUP_CHANNELS = 4  # of an optional norm, as of our residual models


def output_module(
    spec: ModelSpec,
    parts: Sequence[Part],
    number: int,
    *,
    prefix: str = "surrogate",
    fc: str | None = None,
    norm: bool = False,
) -> tuple[Node, ...]:
    """What follows the output of part `number` (from 0) in place of the later ones, for `graft`.

    Each later part that holds images is one convolution to the channels of its last one; 1x1 pixels
    stay 1x1.  The convolution that stands in for a part is `<prefix>_<part>` with the same shape in
    every stage, so that a stage may begin with what another trained.  After a part that ends in a
    vector there is the linear layer alone (ours; the authors have images only).

    fc: the name of the linear layer; `<prefix>_fc` without one.  It has the shape of the model's
    own where that follows global average pooling, and may then have its name and tensors.
    norm: after each convolution GroupNorm and ReLU (ours; the authors have neither).

    Raises ValueError for a model whose output is no vector.
    """
    source = parts[number].end
    shape = spec.shapes[source]
    if len(spec.output_shape) != 1:
        raise ValueError(f"the model's output has shape {spec.output_shape}, expected (classes,)")
    nodes: list[Node] = []

    def add(name: str, layer: Layer) -> None:
        nodes.append(Node(name, layer, (nodes[-1].name if nodes else source,), prefix))

    if len(shape) > 1:
        for missing in parts[number + 1 :]:
            if image := _last_image(spec, missing):
                for suffix, layer in _stand_in(image, norm):
                    add(f"{prefix}_{missing.name}{suffix}", layer)
        add(f"{prefix}_pool", GlobalAvgPool())
    add(fc or f"{prefix}_fc", Linear(spec.output_shape[0]))
    return tuple(nodes)


def _last_image(spec: ModelSpec, part: Part) -> Shape | None:
    shapes = [spec.shapes[name] for name in part.layers]
    return next((shape for shape in reversed(shapes) if len(shape) > 1), None)


def _stand_in(shape: Shape, norm: bool) -> list[tuple[str, Layer]]:
    channels = shape[0]
    conv = Conv2d if len(shape) == 3 else Conv1d
    layers: list[tuple[str, Layer]] = [("", conv(channels, 3, stride=2, padding=1, bias=False))]
    if norm:
        groups = max(1, channels // GROUP_CHANNELS)
        groups = groups if channels % groups == 0 else 1
        layers += [("_norm", GroupNorm(groups=groups)), ("_relu", ReLU())]
    return layers
