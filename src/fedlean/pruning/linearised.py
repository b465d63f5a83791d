"""A model's layers as non-negative linear maps on one example, and their transposes, in float64.

The network on which SynFlow (Tanaka et al., NeurIPS 2020, arXiv 2006.05467) scores weights: weights
are replaced by their absolute values and the input is non-negative, so ReLU is the identity and a
max pool picks its largest input; both are exact.  Float64, because the flow through a deep network
leaves the range of float32: it is a product over layers.

OURS, where the paper's networks have no such thing:
- Biases are left out, and with them the shifts of norms: the paper's R is a product of weights,
  and its conservation laws hold without them only.
- BatchNorm is |weight| / sqrt(running variance + eps): evaluation mode, as in the authors' code.
- A Scaler and a Dropout are the identity: evaluation mode too.
- GroupNorm is |weight|.  Its division by the example's own statistics would make R independent of
  the size of every weight before it.
- Hardswish, SiLU, GELU, the sigmoids and tangents are the identity, as the first three are for
  large inputs; so is LeakyReLU, whose inputs are not negative.
- A gate (`Scale`) is added instead of multiplied, as the product is to first order around 1.  Then
  R stays linear in each layer, and the weights that make the gate have a path to the output.
"""

# C channels, H and W sides, O output channels, G groups, k kernel; primes mark the output's sides

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from fedlean import layers as L
from fedlean.core import Params
from fedlean.spec import ModelSpec, Node

_Windowed = L.Conv2d | L.MaxPool2d | L.AvgPool2d
# dR/doutput -> dR/dinputs and, of Linear and Conv2d, dR/d|weight|
Pull = Callable[[np.ndarray], tuple[list[np.ndarray], np.ndarray | None]]


def magnitudes(spec: ModelSpec, params: Params) -> dict[str, np.ndarray]:
    """|weight| of every layer that has one, float64, by tensor name; BatchNorm's by its deviation.

    >>> from fedlean.spec import sequential
    >>> magnitudes(sequential((1,), [("fc", L.Linear(1))]), {"fc.weight": np.array([[-2.0]])})
    {'fc.weight': array([[2.]])}
    """
    found = {}
    for node in spec.nodes:
        name = f"{node.name}.weight"
        if name in spec.param_shapes:
            found[name] = np.abs(params[name], dtype=np.float64)
        if isinstance(node.layer, L.BatchNorm):
            found[name] /= np.sqrt(params[f"{node.name}.running_var"] + node.layer.eps)
    return found


def linear_map(
    node: Node, inputs: list[np.ndarray], held: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, Pull]:
    """The layer's output for non-negative inputs (no batch axis), and the map back.

    `held` are `magnitudes`.  Raises ValueError naming a layer that is not covered.
    """
    x, weight = inputs[0], held.get(f"{node.name}.weight")
    match node.layer:
        case L.Linear():
            assert weight is not None
            return weight @ x, lambda g: ([g @ weight], np.outer(g, x))
        case L.Conv2d() as layer:
            assert weight is not None
            return _on_image(x, lambda image: _convolve(layer, image, weight))
        case L.MaxPool2d() as layer:
            return _on_image(x, lambda image: _max_pool(layer, image))
        case L.AvgPool2d() as layer:
            return _on_image(x, lambda image: _average_pool(layer, image))
        case L.GlobalAvgPool():
            pixels = x.reshape(len(x), -1)
            return pixels.mean(1), lambda g: ([_spread(g, x) / pixels.shape[1]], None)
        case L.BatchNorm() | L.GroupNorm():
            assert weight is not None
            gain = _spread(weight, x)
            return x * gain, lambda g: ([g * gain], None)
        case L.Elementwise():
            return x, lambda g: ([g], None)
        case L.Flatten():
            return x.reshape(-1), lambda g: ([g.reshape(x.shape)], None)
        case L.Add():
            return sum(inputs[1:], start=x), lambda g: ([g] * len(inputs), None)
        case L.Concat():
            ends = np.cumsum([len(each) for each in inputs])[:-1]
            return np.concatenate(inputs), lambda g: (np.split(g, ends), None)
        case L.Scale():
            return x + _spread(inputs[1], x), lambda g: ([g, g.reshape(len(g), -1).sum(1)], None)
    raise ValueError(
        f"layer {node.name!r}: {type(node.layer).__name__} has no non-negative linear form yet"
    )


def _spread(per_channel: np.ndarray, x: np.ndarray) -> np.ndarray:
    """(C,) as an array of x's shape (C,) or (C, H, W)."""
    return np.broadcast_to(per_channel.reshape(-1, *[1] * (x.ndim - 1)), x.shape)


def _on_image(
    x: np.ndarray, run: Callable[[np.ndarray], tuple[np.ndarray, Pull]]
) -> tuple[np.ndarray, Pull]:
    """`run` on x as an image (C, H, W), and its result as a signal (C, L) where x is one."""
    out, pull = run(x.reshape(L.as_image(x.shape)))

    def back(g: np.ndarray) -> tuple[list[np.ndarray], np.ndarray | None]:
        (to_image,), to_weight = pull(g.reshape(out.shape))
        return [to_image.reshape(x.shape)], to_weight

    return out if x.ndim == 3 else out[:, 0], back


def _windows(x: np.ndarray, layer: _Windowed, fill: float) -> np.ndarray:
    """(C, H, W) -> (C, H', W', k, k')."""
    window = layer.window
    padded = np.pad(x, ((0, 0), *((p, p) for p in window.padding)), constant_values=fill)
    extent = tuple(reach + 1 for reach in window.reach)
    found = sliding_window_view(padded, extent, axis=(1, 2))
    steps = tuple(slice(None, None, step) for step in (*window.stride, *window.dilation))
    return found[(slice(None), *steps)]


def _fold(windows: np.ndarray, layer: _Windowed, x: np.ndarray) -> np.ndarray:
    """The transpose of `_windows` with fill 0: what entered several windows is summed."""
    (above, left), (down, across) = layer.window.padding, layer.window.stride
    rows, columns = windows.shape[1:3]
    total = np.zeros((x.shape[0], x.shape[1] + 2 * above, x.shape[2] + 2 * left))
    for i, j in np.ndindex(windows.shape[3:]):
        y, z = i * layer.window.dilation[0], j * layer.window.dilation[1]
        read = total[:, y : y + down * rows, z : z + across * columns]
        read[:, ::down, ::across] += windows[..., i, j]
    return total[:, above : above + x.shape[1], left : left + x.shape[2]]


def _convolve(layer: L.Conv2d, x: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, Pull]:
    windows, groups = _windows(x, layer, 0.0), layer.groups
    in_k_k = (x.shape[0], *windows.shape[3:])
    out = (layer.out_channels, *windows.shape[1:3])
    # (G, C/G·k·k, H'·W') and (G, O/G, C/G·k·k)
    patches = windows.transpose(0, 3, 4, 1, 2).reshape(groups, -1, out[1] * out[2])
    kernels = weight.reshape(groups, layer.out_channels // groups, -1)

    def pull(g: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        flat = g.reshape(groups, layer.out_channels // groups, -1)
        to_weight = (flat @ patches.swapaxes(1, 2)).reshape(weight.shape)
        to_windows = (kernels.swapaxes(1, 2) @ flat).reshape(*in_k_k, *out[1:])
        return [_fold(to_windows.transpose(0, 3, 4, 1, 2), layer, x)], to_weight

    return (kernels @ patches).reshape(out), pull


def _max_pool(layer: L.MaxPool2d, x: np.ndarray) -> tuple[np.ndarray, Pull]:
    windows = _windows(x, layer, -np.inf)  # padding never wins
    flat = windows.reshape(*windows.shape[:3], -1)
    winners = flat.argmax(-1)[..., np.newaxis]  # the first of equal ones, as engines have it

    def pull(g: np.ndarray) -> tuple[list[np.ndarray], None]:
        routed = np.zeros(flat.shape)
        np.put_along_axis(routed, winners, g[..., np.newaxis], axis=-1)
        return [_fold(routed.reshape(windows.shape), layer, x)], None

    return np.take_along_axis(flat, winners, axis=-1)[..., 0], pull


def _average_pool(layer: L.AvgPool2d, x: np.ndarray) -> tuple[np.ndarray, Pull]:
    windows = _windows(x, layer, 0.0)
    area = layer.window.area

    def pull(g: np.ndarray) -> tuple[list[np.ndarray], None]:
        shares = np.broadcast_to((g / area)[..., np.newaxis, np.newaxis], windows.shape)
        return [_fold(shares, layer, x)], None

    return windows.sum((3, 4)) / area, pull
