"""What layer of a spec one PyTorch module is.  Reads attributes only: torch is not imported here.

Each function takes the module and the spec's shape of its input, and returns the layer, several
that follow one another, or None if the module passes its input on.  It raises ValueError, to which
the caller adds the layer's name, on settings that a spec does not have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedlean import layers
from fedlean.layers import Layer, Shape

if TYPE_CHECKING:
    from torch import nn


def linear(m: nn.Linear, held: Shape) -> Layer:
    del held
    return layers.Linear(m.out_features, m.bias is not None)


def conv(m: nn.Conv1d | nn.Conv2d, held: Shape) -> Layer:
    _only(padding_mode=m.padding_mode, to="zeros")
    kernel, stride, dilation = (_side(side) for side in (m.kernel_size, m.stride, m.dilation))
    padding, bias = _padding(m), m.bias is not None
    if len(held) == 1:  # a pooled 1x1 image, which a spec holds as a vector
        _only(kernel_size=kernel, to=1)
        _only(padding=padding, to=0)
        _only(groups=m.groups, to=1)
        return layers.Linear(m.out_channels, bias)
    kind = layers.Conv2d if len(m.kernel_size) == 2 else layers.Conv1d
    return kind(m.out_channels, kernel, stride, padding, m.groups, bias, dilation)


def _padding(m: nn.Conv1d | nn.Conv2d) -> Any:
    if m.padding == "valid":
        return 0
    if m.padding != "same":
        return _side(m.padding)
    added = [d * (k - 1) for k, d in zip(m.kernel_size, m.dilation, strict=True)]
    if any(zeros % 2 for zeros in added):
        kernel = _side(m.kernel_size)
        raise ValueError(f"padding='same' of kernel {kernel} is asymmetric: use an odd kernel")
    return _side(tuple(zeros // 2 for zeros in added))


def max_pool(m: nn.MaxPool1d | nn.MaxPool2d, held: Shape) -> Layer:
    del held
    _only(return_indices=m.return_indices, to=False)
    _only(dilation=_side(m.dilation), to=1)
    return (layers.MaxPool1d if "1d" in type(m).__name__ else layers.MaxPool2d)(*_window(m))


def avg_pool(m: nn.AvgPool1d | nn.AvgPool2d, held: Shape) -> Layer:
    del held
    _only(divisor_override=getattr(m, "divisor_override", None), to=None)
    kernel, stride, padding = _window(m)
    if padding:
        _only(count_include_pad=m.count_include_pad, to=True)
    kind = layers.AvgPool1d if "1d" in type(m).__name__ else layers.AvgPool2d
    return kind(kernel, stride, padding)


def adaptive_avg_pool(m: Any, held: Shape) -> Layer | None:
    """nn.AdaptiveAvgPool1d or 2d: windows of equal size."""
    if len(held) == 1:
        _only(output_size=_side(m.output_size), to=1)
        return None
    kernel = _even_windows(m, held)
    if kernel == held[1:]:
        return layers.GlobalAvgPool()
    return _pool(layers.AvgPool1d, layers.AvgPool2d, kernel)


def adaptive_max_pool(m: Any, held: Shape) -> Layer | tuple[Layer, ...] | None:
    """nn.AdaptiveMaxPool1d or 2d.  A window that is too large for one byte is pooled twice."""
    _only(return_indices=m.return_indices, to=False)
    if len(held) == 1:
        _only(output_size=_side(m.output_size), to=1)
        return None
    kernel = _even_windows(m, held)
    if len(kernel) == 2 and kernel[0] * kernel[1] > MOST_AT_ONCE:
        return layers.MaxPool2d((1, kernel[1])), layers.MaxPool2d((kernel[0], 1))
    if len(kernel) == 1 and kernel[0] > MOST_AT_ONCE:
        first = max(n for n in range(1, MOST_AT_ONCE + 1) if kernel[0] % n == 0)
        if first > 1:
            return layers.MaxPool1d(first), layers.MaxPool1d(kernel[0] // first)
    return _pool(layers.MaxPool1d, layers.MaxPool2d, kernel)


MOST_AT_ONCE = 256  # pixels of a maximum that every engine takes


def _even_windows(m: Any, held: Shape) -> tuple[int, ...]:
    sizes = m.output_size
    sizes = sizes if isinstance(sizes, tuple | list) else (sizes,) * (len(held) - 1)
    if len(sizes) != len(held) - 1:
        raise ValueError(f"has output_size={m.output_size} for an input of shape {held}")
    outputs = [size if out is None else out for out, size in zip(sizes, held[1:], strict=True)]
    for out, size in zip(outputs, held[1:], strict=True):
        if out < 1 or size % out:
            divisors = [n for n in range(1, size + 1) if size % n == 0]
            raise ValueError(
                f"its windows differ in size, since output_size={out} does not divide the input's "
                f"side of {size}: use one of {divisors}, or an AvgPool or MaxPool layer"
            )
    return tuple(size // out for out, size in zip(outputs, held[1:], strict=True))


def _pool(of_signals: Any, of_images: Any, kernel: tuple[int, ...]) -> Layer | None:
    if set(kernel) == {1}:
        return None
    return of_signals(*kernel) if len(kernel) == 1 else of_images(kernel)


def dropout(m: nn.Dropout | nn.Dropout1d | nn.Dropout2d, held: Shape) -> Layer | None:
    """Of channels where the input has pixels."""
    channels = type(m).__name__ != "Dropout" and len(held) > 1
    return layers.Dropout(float(m.p), channels) if m.p > 0 else None


def leaky_relu(m: nn.LeakyReLU, held: Shape) -> Layer:
    del held
    return layers.LeakyReLU(float(m.negative_slope))


def hardtanh(m: nn.Hardtanh, held: Shape) -> Layer:
    """nn.ReLU6 is one."""
    del held
    return layers.Hardtanh(float(m.min_val), float(m.max_val))


def gelu(m: nn.GELU, held: Shape) -> Layer:
    del held
    return layers.GELU(m.approximate == "tanh")


def layer_norm(m: nn.LayerNorm, held: Shape) -> Layer:
    """Of a vector: a GroupNorm of one group."""
    if len(held) != 1 or tuple(m.normalized_shape) != held:
        raise ValueError(
            f"normalized_shape={tuple(m.normalized_shape)} of an input of shape {held} is not "
            f"supported, only that of a vector: use nn.GroupNorm(1, {held[0]}), which normalises "
            "all of an example with a scale per channel"
        )
    _only(elementwise_affine=m.elementwise_affine, to=True)
    _only(bias=m.bias is not None, to=True)
    return layers.GroupNorm(eps=float(m.eps), groups=1)


def group_norm(m: nn.GroupNorm, held: Shape) -> Layer:
    del held
    _only(affine=m.affine, to=True)
    return layers.GroupNorm(eps=float(m.eps), groups=m.num_groups)


def batch_norm(m: Any, held: Shape) -> Layer:
    """nn.BatchNorm1d, nn.BatchNorm2d or our own, which is always affine and tracking."""
    del held
    _only(affine=getattr(m, "affine", True), to=True)
    _only(track_running_stats=getattr(m, "track_running_stats", True), to=True)
    if m.momentum is None:
        raise ValueError("momentum=None (a cumulative average) is not supported, give a number")
    return layers.BatchNorm(eps=float(m.eps), momentum=float(m.momentum))


def refuse_mask(layer: Layer, suffix: str) -> None:
    """ValueError unless a spec can mask the tensor `suffix` of `layer`."""
    if suffix != "weight" or not isinstance(layer, layers.Linear | layers.Conv2d):
        raise ValueError(
            f"{suffix!r} is pruned, but a spec masks weights of Linear and Conv2d only: call "
            f"torch.nn.utils.prune.remove(layer, {suffix!r}) first"
        )


def _window(m: Any) -> tuple[Any, Any, Any]:
    _only(ceil_mode=m.ceil_mode, to=False)
    kernel, stride, padding = (_side(side) for side in (m.kernel_size, m.stride, m.padding))
    return kernel, (None if stride == kernel else stride), padding


def _side(value: Any) -> Any:
    """A setting that torch keeps per side: one number where all are alike."""
    sides = tuple(value) if isinstance(value, tuple | list) else (value,)
    return sides[0] if len(set(sides)) == 1 else sides


def _only(to: Any, **named: Any) -> None:
    ((name, value),) = named.items()
    if value != to:
        raise ValueError(f"{name}={value!r} is not supported here, only {name}={to!r}")
