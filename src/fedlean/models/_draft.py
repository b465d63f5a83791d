"""A spec under construction from a traced PyTorch module: names, blocks, shapes.

Torch-free.  It keeps apart the shape in which the spec holds a value and the shape which PyTorch
sees: after a global pooling (C,) and (C, 1, 1) mean the same, and nothing else may differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import NamedTuple

from fedlean.layers import (
    Add,
    Concat,
    Conv2d,
    Flatten,
    GlobalAvgPool,
    Layer,
    Linear,
    Scale,
    Shape,
    check_settings,
)
from fedlean.spec import INPUT, Node

SUPPORTED = (
    "Linear, Conv1d/2d, MaxPool1d/2d, AvgPool1d/2d, AdaptiveAvgPool1d/2d, AdaptiveMaxPool1d/2d, "
    "GroupNorm, LayerNorm of vectors, BatchNorm1d/2d, ReLU, ReLU6, LeakyReLU, SiLU, GELU, Sigmoid, "
    "Tanh, Hardtanh, Hardswish, Hardsigmoid, Flatten, Identity, Dropout, calls of these, "
    "flatten/view/mean((2, 3)), torch.cat of channels, sums of equal shapes, and image * gate of "
    "shape (B, C, 1, 1)"
)
_SMOOTH = "use nn.SiLU or nn.GELU, which are as smooth, or nn.LeakyReLU"
_SEQUENCE = (
    "use nn.Conv1d layers and a mean over time, which read sequences (B, C, L) with the features "
    "as channels"
)
_LOGITS = "leave it out: the loss takes the scores before it, and their order is the same"
REWRITES = {
    **dict.fromkeys(
        ("InstanceNorm1d", "InstanceNorm2d", "instance_norm"),
        "use nn.GroupNorm(C, C) for C channels, which normalises each channel of an example alike",
    ),
    **dict.fromkeys(("LocalResponseNorm", "RMSNorm"), "use nn.GroupNorm(1, C) for C channels"),
    **dict.fromkeys(
        ("ELU", "SELU", "CELU", "Softplus", "Mish", "elu", "softplus", "mish"), _SMOOTH
    ),
    **dict.fromkeys(("PReLU", "RReLU"), "use nn.LeakyReLU, whose slope is fixed"),
    **dict.fromkeys(("GRU", "LSTM", "RNN", "MultiheadAttention", "TransformerEncoder"), _SEQUENCE),
    **dict.fromkeys(("Softmax", "LogSoftmax", "softmax", "log_softmax"), _LOGITS),
    **dict.fromkeys(
        ("permute", "transpose", "movedim"),
        "give the data with the channels first, (B, C, L) or (B, C, H, W)",
    ),
}


_EMBEDDINGS = ("Embedding", "EmbeddingBag", "embedding", "embedding_bag")


def not_supported(kind: str) -> str:
    """Why a layer or call of this kind is refused, and what would do."""
    if kind in _EMBEDDINGS:
        return (
            "is not supported; a spec reads numbers, not ids: convert the layers after it, and "
            "make its outputs the example and the data"
        )
    rewrite = f": {REWRITES[kind]}" if kind in REWRITES else ""
    return f"is not supported{rewrite}; supported are {SUPPORTED}"


class Held(NamedTuple):
    """A value: the spec node that has it, its shape there and its shape in torch (no batch)."""

    name: str
    shape: Shape
    torch_shape: Shape

    def checked(self) -> Held:
        """Itself, if both shapes mean the same."""
        if self.torch_shape != self.shape and self.torch_shape not in _spellings(self.shape):
            raise ValueError(
                f"has shape {self.torch_shape} in PyTorch and {self.shape} in the spec, which "
                f"cannot be told from {self.name!r}"
            )
        return self


def _spellings(shape: Shape) -> tuple[Shape, ...]:
    """The shapes that PyTorch code gives to a vector (C,) on its way to and from 1x1 images."""
    return (shape, (*shape, 1), (*shape, 1, 1)) if len(shape) == 1 else ()


class Draft:
    """The nodes so far.  A method that adds one takes the dotted path by which the user knows it.

    `modules` are the paths of all modules: calls inside of modules get other names.
    """

    def __init__(self, modules: Iterable[str]) -> None:
        self.nodes: list[Node] = []
        self._reserved = frozenset(path.replace(".", "_") for path in modules)
        self._taken = {INPUT}
        self._blocks = {INPUT: ""}

    def add(
        self, path: str, layer: Layer, inputs: Sequence[Held], torch_shape: Shape, *, call: bool
    ) -> Held:
        """Append a node for a module, or for a call inside of one."""
        check_settings(layer)
        shape = layer.output_shape([value.shape for value in inputs])
        name = self._name(path, call)
        held = Held(name, shape, torch_shape).checked()
        block = path.partition(".")[0] if "." in path else self._blocks[inputs[0].name]
        if not block or ("." not in path and isinstance(layer, Linear | Conv2d)):
            block = name  # outside of containers each weighted layer starts a block
        self._blocks[name] = block
        self.nodes.append(Node(name, layer, tuple(value.name for value in inputs), block))
        return held

    def _name(self, path: str, call: bool) -> str:
        base = path.replace(".", "_")
        name, number = base, 1
        while name in self._taken or (call and name in self._reserved):
            number += 1
            name = f"{base}_{number}"
        self._taken.add(name)
        return name

    def reshape(self, path: str, source: Held, after: Shape, *, expand: bool) -> Held:
        """view, flatten, x[:, :, None, None] and the like, told apart by their shapes."""
        before = source.checked().torch_shape
        same = after == before or after in _spellings(source.shape)
        if same or (expand and before[1:] in ((1,), (1, 1))):  # only `scale` takes what is expanded
            return source._replace(torch_shape=after)
        if after in _spellings((prod(before),)):
            return self.add(path, Flatten(), [source], after, call=True)
        raise ValueError(f"turns {before} into {after}, only flattening to (B, F) is supported")

    def mean(self, path: str, source: Held, axes: object, after: Shape) -> Held:
        """The mean of an image, or of a signal; axes count from the batch axis."""
        count = len(source.torch_shape) + 1
        wanted = (2, 3) if count == 4 else (2,)
        given = axes if isinstance(axes, tuple | list) else (axes,)
        if {axis % count for axis in given if isinstance(axis, int)} != {*wanted}:
            raise ValueError(f"mean over {axes} is not supported, only over {wanted}")
        if len(source.checked().shape) == 1:
            return source._replace(torch_shape=after)
        return self.add(path, GlobalAvgPool(), [source], after, call=True)

    def sum(self, path: str, sides: Sequence[Held], after: Shape) -> Held:
        shapes = [side.checked().torch_shape for side in sides]
        if len(sides) != 2 or shapes[0] != shapes[1]:
            raise ValueError(f"sums need two tensors of equal shape, got {shapes}")
        return self.add(path, Add(), sides, after, call=True)

    def concat(self, path: str, parts: Sequence[Held], axis: object, after: Shape) -> Held:
        """The channels of the parts one after the other; the axis counts from the batch axis."""
        shapes = [part.checked().torch_shape for part in parts]
        count = len(shapes[0]) + 1
        if not isinstance(axis, int) or axis % count != 1:
            raise ValueError(f"joins along axis {axis}, only the channels, dim=1, are supported")
        if len(parts) == 1:
            return parts[0]._replace(torch_shape=after)
        return self.add(path, Concat(), parts, after, call=True)

    def scale(self, path: str, sides: Sequence[Held], after: Shape) -> Held:
        """image * gate or gate * image, the gate (B, C, 1, 1) or that expanded; signals alike."""
        for image, gate in (sides, sides[::-1]):
            if len(image.shape) == 1 or image.shape != image.torch_shape:
                continue
            channels = image.shape[:1]
            pooled = (*channels, *[1] * (len(image.shape) - 1))
            if gate.torch_shape in (pooled, image.shape) and gate.shape in (channels, pooled):
                if gate.shape == pooled:  # from an average pooling rather than a global one
                    gate = self.add(f"{path}_gate", Flatten(), [gate], channels, call=True)
                return self.add(path, Scale(), [image, gate], after, call=True)
        shapes = [side.torch_shape for side in sides]
        raise ValueError(f"products need an image and a gate (B, C, 1, 1), got {shapes}")


def only_new_axes(index: object) -> bool:
    """Is x[index] all of x, with axes of one added?"""
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is Ellipsis or part == slice(None) for part in parts)
