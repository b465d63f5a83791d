"""The layers a `ModelSpec` is made of: plain data with shape inference.

Shapes exclude the batch axis: (C, H, W) for images, (C, L) for signals, (F,) for vectors.  A layer
says its output shape, its parameters and its multiply-adds per example; it never computes.  Adding
a layer is one class here and one case in each engine.

A spec may come from a stranger, and engines count in 32 bits.  So settings have limits, far beyond
what is trained on a device: windows, strides, padding and dilation of at most 1024, eps from 1e-20
to 1000, factors from 0.001 to 1000, bounds from -1000 to 1000, and fewer than 2^27 elements of one
example, counted with the padding (512 MiB of float32).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cached_property
from math import prod
from typing import Any, ClassVar, NamedTuple

Shape = tuple[int, ...]
Pair = tuple[int, int]  # of rows and of columns
Side = int | Pair  # an integer where both are alike

MAX_WINDOW = 1024  # kernel_size, stride, padding and dilation
MAX_BOUND = 1e3
MAX_ACTIVATION_ELEMENTS = (1 << 27) - 1  # of one example, zeros around it included
MIN_EPS, MAX_EPS = 1e-20, 1e3  # eps^-1.5, which gradients are multiplied by, is finite in float32
MIN_FACTOR, MAX_FACTOR = 1e-3, 1e3


def _one(inputs: list[Shape]) -> Shape:
    if len(inputs) != 1:
        raise ValueError(f"takes 1 input, got {len(inputs)}")
    return inputs[0]


_KINDS = {2: "a signal (C, L)", 3: "an image (C, H, W)"}


def _with_pixels(inputs: list[Shape], *ranks: int) -> Shape:
    shape = _one(inputs)
    if len(shape) not in ranks:
        wanted = " or ".join(_KINDS[rank] for rank in ranks)
        raise ValueError(f"needs {wanted} as input, got shape {shape}")
    return shape


def as_image(shape: Shape) -> tuple[int, int, int]:
    """(C, H, W) of an image; of a signal (C, L) one row, of a vector (F,) one pixel.

    >>> as_image((6, 128))
    (6, 1, 128)
    """
    channels, *sides = shape
    width = sides[-1] if sides else 1
    return channels, sides[0] if len(sides) == 2 else 1, width


def both(side: Side) -> Pair:
    """A setting of rows and of columns."""
    return side if isinstance(side, tuple) else (side, side)


class Window(NamedTuple):
    """What a convolution or pooling reads, in rows and columns; a signal is an image of one row."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair

    @property
    def area(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def reach(self) -> Pair:
        """From a window's first pixel to its last."""
        (rows, columns), (down, across) = self.kernel, self.dilation
        return (rows - 1) * down, (columns - 1) * across

    def outputs(self, shape: Shape) -> Shape:
        """The sides of what it makes of an image or signal.  ValueError where it does not fit."""
        found = []
        for i, size in enumerate(as_image(shape)[1:]):
            padding, extent = self.padding[i], self.reach[i] + 1
            if extent > size + 2 * padding:
                raise ValueError(
                    f"window {extent} does not fit an input side of {size} (padding {padding}): "
                    "use larger images or fewer pooling layers"
                )
            found.append((size + 2 * padding - extent) // self.stride[i] + 1)
        return tuple(found[3 - len(shape) :])


_SIDES = ("kernel_size", "stride", "padding", "dilation")


@dataclass(frozen=True)
class _Windowed:
    """Sides are integers or (rows, columns); two equal ones are one integer, as JSON has it."""

    rank: ClassVar[int] = 3  # of the inputs

    def __post_init__(self) -> None:
        for name in _SIDES:
            value = getattr(self, name, None)
            if isinstance(value, list | tuple) and len(value) == 2:
                same = type(value[0]) is type(value[1]) is int and value[0] == value[1]
                object.__setattr__(self, name, value[0] if same else tuple(value))

    @cached_property
    def window(self) -> Window:
        sides = {
            "dilation": 1,
            **{name: getattr(self, name) for name in _SIDES if name in _of(self)},
        }
        if sides["stride"] is None:
            sides["stride"] = sides["kernel_size"]
        if self.rank == 3:
            return Window(*(both(sides[name]) for name in _SIDES))
        return Window(*((0 if name == "padding" else 1, sides[name]) for name in _SIDES))


def _of(layer: Any) -> set[str]:
    return {setting.name for setting in fields(layer)}


def settings_of(layer: Layer) -> dict[str, Any]:
    """By name, as they are written; settings that came later are left out at their default."""
    return {
        setting.name: getattr(layer, setting.name)
        for setting in fields(layer)
        if not setting.metadata.get("later") or getattr(layer, setting.name) != setting.default
    }


def check_settings(layer: Layer) -> None:
    """ValueError naming the setting whose type or range is wrong; bools are no integers here."""
    for setting in fields(layer):
        name, value = setting.name, getattr(layer, setting.name)
        whole = _whole(value)
        if name in ("bias", "tanh", "channels"):
            valid, wanted = isinstance(value, bool), "True or False"
        elif name == "eps":
            valid = isinstance(value, float) and MIN_EPS <= value <= MAX_EPS
            wanted = f"a positive float from {MIN_EPS:g} to {MAX_EPS:g}"
        elif name == "factor":
            valid = isinstance(value, float) and MIN_FACTOR <= value <= MAX_FACTOR
            wanted = f"a float from {MIN_FACTOR:g} to {MAX_FACTOR:g}"
        elif name == "momentum" or name == "slope":
            valid, wanted = isinstance(value, float) and 0 <= value <= 1, "a float in [0, 1]"
        elif name in ("low", "high"):
            valid = isinstance(value, float) and -MAX_BOUND <= value <= MAX_BOUND
            wanted = f"a float from {-MAX_BOUND:g} to {MAX_BOUND:g}"
        elif name == "p":
            valid, wanted = isinstance(value, float) and 0 <= value < 1, "a float in [0, 1)"
        elif name in _SIDES:
            pair = isinstance(value, tuple) and len(value) == 2 and _rank(layer) == 3
            sides = [_whole(side) for side in value] if pair else [whole]
            least = 0 if name == "padding" else 1
            optional = value is None and setting.default is None
            valid = optional or all(least <= side <= MAX_WINDOW for side in sides)
            wanted = (
                f"an integer from 0 to {MAX_WINDOW}"
                if not least
                else (f"a positive integer of at most {MAX_WINDOW}")
            )
            wanted += ", or one for rows and one for columns" if _rank(layer) == 3 else ""
        else:
            valid, wanted = whole > 0, "a positive integer"
        if not valid:
            raise ValueError(f"{name} must be {wanted}, got {value!r:.40}")


def _whole(value: object) -> int:
    """-1 where it is no integer."""
    return value if isinstance(value, int) and not isinstance(value, bool) else -1


def _rank(layer: Layer) -> int:
    return layer.rank if isinstance(layer, _Windowed) else 0


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
class Conv2d(_Windowed):
    out_channels: int
    kernel_size: Side
    stride: Side = 1
    padding: Side = 0
    groups: int = 1
    bias: bool = True
    dilation: Side = field(default=1, metadata={"later": True})

    def output_shape(self, inputs: list[Shape]) -> Shape:
        shape = _with_pixels(inputs, self.rank)
        c, h, w = as_image(shape)
        if c % self.groups or self.out_channels % self.groups:
            raise ValueError(
                f"groups={self.groups} must divide both channel counts, got {c} in and "
                f"{self.out_channels} out"
            )
        window = self.window
        above, left = window.padding
        if (padded := c * (h + 2 * above) * (w + 2 * left)) > MAX_ACTIVATION_ELEMENTS:
            raise ValueError(
                f"its input is too large: {padded} elements with padding {self.padding}, at most "
                f"{MAX_ACTIVATION_ELEMENTS}"
            )
        return (self.out_channels, *window.outputs(shape))

    def param_shapes(self, inputs: list[Shape]) -> dict[str, Shape]:
        kernel = self.window.kernel[3 - self.rank :]
        shapes: dict[str, Shape] = {
            "weight": (self.out_channels, inputs[0][0] // self.groups, *kernel)
        }
        return shapes | ({"bias": (self.out_channels,)} if self.bias else {})

    def positions(self, inputs: list[Shape]) -> int:
        return prod(self.output_shape(inputs)[1:])


@dataclass(frozen=True)
class Conv1d(Conv2d):
    """On signals (C, L); weights are (O, C/groups, k)."""

    rank: ClassVar[int] = 2


@dataclass(frozen=True)
class _Pool(_Windowed):
    kernel_size: Side
    stride: Side | None = None  # None: kernel_size
    padding: Side = 0

    def output_shape(self, inputs: list[Shape]) -> Shape:
        shape, window = _with_pixels(inputs, self.rank), self.window
        if any(2 * p > k for p, k in zip(window.padding, window.kernel, strict=True)):
            raise ValueError(
                f"padding {self.padding} must be at most half of kernel_size {self.kernel_size}"
            )
        return (shape[0], *window.outputs(shape))


@dataclass(frozen=True)
class MaxPool2d(_Pool):
    """Maximum over each window; padding never wins."""


@dataclass(frozen=True)
class AvgPool2d(_Pool):
    """Average pooling; padded zeros count in the mean, as in PyTorch's default."""


@dataclass(frozen=True)
class MaxPool1d(MaxPool2d):
    """On signals (C, L)."""

    rank: ClassVar[int] = 2


@dataclass(frozen=True)
class AvgPool1d(AvgPool2d):
    """On signals (C, L)."""

    rank: ClassVar[int] = 2


@dataclass(frozen=True)
class GlobalAvgPool:
    """(C, H, W) or (C, L) -> (C,)."""

    def output_shape(self, inputs: list[Shape]) -> Shape:
        return (_with_pixels(inputs, 2, 3)[0],)


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
class Elementwise:
    """A function of each element by itself."""

    def output_shape(self, inputs: list[Shape]) -> Shape:
        return _one(inputs)


@dataclass(frozen=True)
class ReLU(Elementwise):
    pass


@dataclass(frozen=True)
class Curve(Elementwise):
    """A function whose derivative is one of its input; no layer itself."""


@dataclass(frozen=True)
class Hardswish(Curve):
    pass


@dataclass(frozen=True)
class Hardsigmoid(Curve):
    pass


@dataclass(frozen=True)
class LeakyReLU(Curve):
    """x above 0, slope·x below."""

    slope: float = 0.01


@dataclass(frozen=True)
class Hardtanh(Curve):
    """x within [low, high], otherwise the nearer bound; ReLU6 is Hardtanh(0.0, 6.0)."""

    low: float = -1.0
    high: float = 1.0

    def output_shape(self, inputs: list[Shape]) -> Shape:
        if self.low >= self.high:
            raise ValueError(f"low must be below high, got {self.low:g} and {self.high:g}")
        return super().output_shape(inputs)


@dataclass(frozen=True)
class Sigmoid(Curve):
    pass


@dataclass(frozen=True)
class Tanh(Curve):
    pass


@dataclass(frozen=True)
class SiLU(Curve):
    """x·sigmoid(x)."""


@dataclass(frozen=True)
class GELU(Curve):
    """x·Φ(x) with the normal distribution's Φ; `tanh`: by Hendrycks and Gimpel's approximation.

    That is x/2·(1 + tanh(√(2/π)·(x + 0.044715·x³))) (arXiv 1606.08415).
    """

    tanh: bool = False


@dataclass(frozen=True)
class Scaler(Elementwise):
    """`factor` times the input in training mode, the input itself in evaluation.

    HeteroFL's scaler (Diao et al., ICLR 2021, Sec. 3.3): a slice that keeps the rate r of a layer's
    outputs multiplies them by 1/r as it trains, so that the full model is evaluated as it is.
    Training mode is that of the pass: what is frozen is scaled too.
    """

    factor: float


@dataclass(frozen=True)
class Dropout(Elementwise):
    """In training 0 with probability p, otherwise x/(1-p); in evaluation the input itself.

    channels: all of a channel together.  What is dropped follows from the session's seed, the pass,
    the layer's name and the example's place in its batch, on every engine (`engine.dropout`).
    """

    p: float = 0.5
    channels: bool = False


@dataclass(frozen=True)
class Flatten:
    """(C, H, W) -> (C*H*W,) and (C, L) -> (C*L,), row-major; a vector passes unchanged."""

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
class Concat:
    """The channels of two or more inputs one after the other; all else of them is equal."""

    def output_shape(self, inputs: list[Shape]) -> Shape:
        if len(inputs) < 2 or any(shape[1:] != inputs[0][1:] for shape in inputs):
            raise ValueError(f"needs two or more inputs that differ in channels only, got {inputs}")
        return (sum(shape[0] for shape in inputs), *inputs[0][1:])


@dataclass(frozen=True)
class Scale:
    """Channel-wise product of an image or signal with a gate (C,): squeeze-and-excite."""

    def output_shape(self, inputs: list[Shape]) -> Shape:
        if len(inputs) != 2 or len(inputs[0]) not in (2, 3) or inputs[1] != inputs[0][:1]:
            raise ValueError(
                f"needs an image (C, H, W) or signal (C, L) and a gate (C,), got {inputs}"
            )
        return inputs[0]


Layer = (
    Linear
    | Conv1d
    | Conv2d
    | MaxPool1d
    | MaxPool2d
    | AvgPool1d
    | AvgPool2d
    | GlobalAvgPool
    | GroupNorm
    | BatchNorm
    | ReLU
    | Hardswish
    | Hardsigmoid
    | LeakyReLU
    | Hardtanh
    | Sigmoid
    | Tanh
    | SiLU
    | GELU
    | Scaler
    | Dropout
    | Flatten
    | Add
    | Concat
    | Scale
)
