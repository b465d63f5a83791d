"""What layer of a spec one PyTorch module is.  Reads attributes only: torch is not imported here.

Each function takes the module and the spec's shape of its input, and returns the layer, or None if
the module passes its input on.  It raises ValueError, to which the caller adds the layer's name,
on settings that a spec does not have.
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


def conv(m: nn.Conv2d, held: Shape) -> Layer:
    _only(padding_mode=m.padding_mode, to="zeros")
    _only(dilation=_side(dilation=m.dilation), to=1)
    kernel, stride = _side(kernel_size=m.kernel_size), _side(stride=m.stride)
    padding: Any = {"valid": 0, "same": kernel // 2}.get(str(m.padding), m.padding)
    if m.padding == "same" and kernel % 2 == 0:
        raise ValueError(f"padding='same' of kernel {kernel} is asymmetric: use an odd kernel")
    padding, bias = _side(padding=padding), m.bias is not None
    if len(held) == 1:  # a pooled 1x1 image, which a spec holds as a vector
        _only(kernel_size=kernel, to=1)
        _only(padding=padding, to=0)
        _only(groups=m.groups, to=1)
        return layers.Linear(m.out_channels, bias)
    return layers.Conv2d(m.out_channels, kernel, stride, padding, m.groups, bias)


def max_pool(m: nn.MaxPool2d, held: Shape) -> Layer:
    del held
    _only(return_indices=m.return_indices, to=False)
    _only(dilation=_side(dilation=m.dilation), to=1)
    return layers.MaxPool2d(*_window(m))


def avg_pool(m: nn.AvgPool2d, held: Shape) -> Layer:
    del held
    _only(divisor_override=m.divisor_override, to=None)
    kernel, stride, padding = _window(m)
    if padding:
        _only(count_include_pad=m.count_include_pad, to=True)
    return layers.AvgPool2d(kernel, stride, padding)


def global_pool(m: nn.AdaptiveAvgPool2d, held: Shape) -> Layer | None:
    _only(output_size=_side(output_size=m.output_size), to=1)
    return None if len(held) == 1 else layers.GlobalAvgPool()


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


def _window(m: nn.MaxPool2d | nn.AvgPool2d) -> tuple[int, int | None, int]:
    _only(ceil_mode=m.ceil_mode, to=False)
    kernel, stride = _side(kernel_size=m.kernel_size), _side(stride=m.stride)
    return kernel, (None if stride == kernel else stride), _side(padding=m.padding)


def _side(**named: Any) -> Any:
    """The one number of a setting that torch keeps per side."""
    ((name, value),) = named.items()
    sides = set(value) if isinstance(value, tuple | list) else {value}
    if len(sides) != 1:
        raise ValueError(f"{name}={value} is not supported, only the same number for both sides")
    return sides.pop()


def _only(to: Any, **named: Any) -> None:
    ((name, value),) = named.items()
    if value != to:
        raise ValueError(f"{name}={value!r} is not supported here, only {name}={to!r}")
