"""The layers a `ModelSpec` is made of: plain data with shape inference.

Shapes exclude the batch axis: (C, H, W) for images, (F,) for vectors.  A layer says its output
shape, its parameters and its multiply-adds per example; it never computes.  Adding a layer is one
class here and one case in each engine.

A spec may come from a stranger, and engines count in 32 bits.  So settings have limits, far beyond
what is trained on a device: windows, strides and padding of at most 1024, eps from 1e-20 to 1000,
factors from 0.001 to 1000, and fewer than 2^27 elements of one example, counted with the padding
(512 MiB of float32).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import prod

Shape = tuple[int, ...]

MAX_WINDOW = 1024  # kernel_size, stride and padding
MAX_ACTIVATION_ELEMENTS = (1 << 27) - 1  # of one example, zeros around it included
MIN_EPS, MAX_EPS = 1e-20, 1e3  # eps^-1.5, which gradients are multiplied by, is finite in float32
MIN_FACTOR, MAX_FACTOR = 1e-3, 1e3


def _one(inputs: list[Shape]) -> Shape:
    if len(inputs) != 1:
        raise ValueError(f"takes 1 input, got {len(inputs)}")
    return inputs[0]


def _image(inputs: list[Shape]) -> Shape:
    shape = _one(inputs)
    if len(shape) != 3:
        raise ValueError(f"needs an image (C, H, W) as input, got shape {shape}")
    return shape


def _window(size: int, kernel: int, stride: int, padding: int) -> int:
    out = (size + 2 * padding - kernel) // stride + 1
    if out < 1 or kernel > size + 2 * padding:
        raise ValueError(
            f"window {kernel} does not fit an input side of {size} (padding {padding}): "
            "use larger images or fewer pooling layers"
        )
    return out


def check_settings(layer: Layer) -> None:
    """ValueError naming the setting whose type or range is wrong; bools are no integers here."""
    for setting in fields(layer):
        name, value = setting.name, getattr(layer, setting.name)
        whole = value if isinstance(value, int) and not isinstance(value, bool) else -1
        if name == "bias":
            valid, wanted = isinstance(value, bool), "True or False"
        elif name == "eps":
            valid = isinstance(value, float) and MIN_EPS <= value <= MAX_EPS
            wanted = f"a positive float from {MIN_EPS:g} to {MAX_EPS:g}"
        elif name == "factor":
            valid = isinstance(value, float) and MIN_FACTOR <= value <= MAX_FACTOR
            wanted = f"a float from {MIN_FACTOR:g} to {MAX_FACTOR:g}"
        elif name == "momentum":
            valid, wanted = isinstance(value, float) and 0 <= value <= 1, "a float in [0, 1]"
        elif name == "padding":
            valid, wanted = 0 <= whole <= MAX_WINDOW, f"an integer from 0 to {MAX_WINDOW}"
        elif name in ("kernel_size", "stride"):
            optional = value is None and setting.default is None
            valid = optional or 1 <= whole <= MAX_WINDOW
            wanted = f"a positive integer of at most {MAX_WINDOW}"
        else:
            valid, wanted = whole > 0, "a positive integer"
        if not valid:
            raise ValueError(f"{name} must be {wanted}, got {value!r:.40}")


@dataclass(frozen=True)
class Linear:
    out_features: int
    bias: bool = True

    def output_shape(self, inputs: list[Shape]) -> Shape:
        shape = _one(inputs)
        if len(shape) != 1:
            raise ValueError(f"needs a vector as input, got shape {shape}: put a Flatten before it")
        return (self.out_features,)

    def param_shapes(self, inputs: list[Shape]) -> dict[str, Shape]:
        shapes: dict[str, Shape] = {"weight": (self.out_features, inputs[0][0])}
        return shapes | ({"bias": (self.out_features,)} if self.bias else {})

    def positions(self, inputs: list[Shape]) -> int:
        """Uses of each weight per example."""
        return 1


@dataclass(frozen=True)
class Conv2d:
    out_channels: int
    kernel_size: int
    stride: int = 1
    padding: int = 0
    groups: int = 1
    bias: bool = True

    def output_shape(self, inputs: list[Shape]) -> Shape:
        c, h, w = _image(inputs)
        if c % self.groups or self.out_channels % self.groups:
            raise ValueError(
                f"groups={self.groups} must divide both channel counts, got {c} in and "
                f"{self.out_channels} out"
            )
        k, s, p = self.kernel_size, self.stride, self.padding
        if (padded := c * (h + 2 * p) * (w + 2 * p)) > MAX_ACTIVATION_ELEMENTS:
            raise ValueError(
                f"its input is too large: {padded} elements with padding {p}, at most "
                f"{MAX_ACTIVATION_ELEMENTS}"
            )
        return (self.out_channels, _window(h, k, s, p), _window(w, k, s, p))

    def param_shapes(self, inputs: list[Shape]) -> dict[str, Shape]:
        k = self.kernel_size
        shapes: dict[str, Shape] = {
            "weight": (self.out_channels, inputs[0][0] // self.groups, k, k)
        }
        return shapes | ({"bias": (self.out_channels,)} if self.bias else {})

    def positions(self, inputs: list[Shape]) -> int:
        return prod(self.output_shape(inputs)[1:])


@dataclass(frozen=True)
class _Pool:
    kernel_size: int
    stride: int | None = None  # None: kernel_size
    padding: int = 0

    def output_shape(self, inputs: list[Shape]) -> Shape:
        c, h, w = _image(inputs)
        stride = self.stride or self.kernel_size
        k, p = self.kernel_size, self.padding
        if 2 * p > k:
            raise ValueError(f"padding {p} must be at most half of kernel_size {k}")
        return (c, _window(h, k, stride, p), _window(w, k, stride, p))


@dataclass(frozen=True)
class MaxPool2d(_Pool):
    """Maximum over each window; padding never wins."""


@dataclass(frozen=True)
class AvgPool2d(_Pool):
    """Average pooling; padded zeros count in the mean, as in PyTorch's default."""


@dataclass(frozen=True)
class GlobalAvgPool:
    """(C, H, W) -> (C,)."""

    def output_shape(self, inputs: list[Shape]) -> Shape:
        return (_image(inputs)[0],)


@dataclass(frozen=True)
class _Norm:
    eps: float = 1e-5

    def output_shape(self, inputs: list[Shape]) -> Shape:
        return _one(inputs)

    def param_shapes(self, inputs: list[Shape]) -> dict[str, Shape]:
        return {"weight": (inputs[0][0],), "bias": (inputs[0][0],)}


@dataclass(frozen=True)
class GroupNorm(_Norm):
    groups: int = 1

    def output_shape(self, inputs: list[Shape]) -> Shape:
        shape = _one(inputs)
        if shape[0] % self.groups:
            raise ValueError(f"groups={self.groups} must divide the {shape[0]} channels")
        return shape


@dataclass(frozen=True)
class BatchNorm(_Norm):
    momentum: float = 0.1

    def buffer_shapes(self, inputs: list[Shape]) -> dict[str, Shape]:
        return {"running_mean": (inputs[0][0],), "running_var": (inputs[0][0],)}


@dataclass(frozen=True)
class _Elementwise:
    def output_shape(self, inputs: list[Shape]) -> Shape:
        return _one(inputs)


@dataclass(frozen=True)
class ReLU(_Elementwise):
    pass


@dataclass(frozen=True)
class Hardswish(_Elementwise):
    pass


@dataclass(frozen=True)
class Hardsigmoid(_Elementwise):
    pass


@dataclass(frozen=True)
class Scaler(_Elementwise):
    """`factor` times the input in training mode, the input itself in evaluation.

    HeteroFL's scaler (Diao et al., ICLR 2021, Sec. 3.3): a slice that keeps the rate r of a layer's
    outputs multiplies them by 1/r as it trains, so that the full model is evaluated as it is.
    Training mode is that of the pass: what is frozen is scaled too.
    """

    factor: float


@dataclass(frozen=True)
class Flatten:
    """(C, H, W) -> (C*H*W,), row-major; a vector passes unchanged."""

    def output_shape(self, inputs: list[Shape]) -> Shape:
        return (prod(_one(inputs)),)


@dataclass(frozen=True)
class Add:
    """Residual sum of two or more equal shapes."""

    def output_shape(self, inputs: list[Shape]) -> Shape:
        if len(inputs) < 2 or any(shape != inputs[0] for shape in inputs):
            raise ValueError(f"needs two or more inputs of equal shape, got {inputs}")
        return inputs[0]


@dataclass(frozen=True)
class Scale:
    """Channel-wise product of an image (C, H, W) with a gate (C,): squeeze-and-excite."""

    def output_shape(self, inputs: list[Shape]) -> Shape:
        if len(inputs) != 2 or len(inputs[0]) != 3 or inputs[1] != inputs[0][:1]:
            raise ValueError(f"needs an image (C, H, W) and a gate (C,), got {inputs}")
        return inputs[0]


Layer = (
    Linear
    | Conv2d
    | MaxPool2d
    | AvgPool2d
    | GlobalAvgPool
    | GroupNorm
    | BatchNorm
    | ReLU
    | Hardswish
    | Hardsigmoid
    | Scaler
    | Flatten
    | Add
    | Scale
)
