"""What the native engine stores of a layer, from the number of kept weights alone.

A model of the layers in `native/src/layers`, for servers and planners that have no
extension; tests hold it against the engine's own plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import gcd, prod

from fedlean import layers as L
from fedlean.layers import Conv2d, Linear, Pair, Shape, Window, as_image
from fedlean.spec import ModelSpec, Node

FLOAT_BYTES = 4
PANEL_LANES = 16  # examples that lie side by side
OFFSET_BYTES = 2  # of a kept weight within its chunk or block
START_BYTES = 4
CHUNK_BYTES = 16
# densities from which a layer is stored and computed densely (native/src/layers/thresholds.h)
SPARSE_CONV_BELOW, SPARSE_LINEAR_BELOW = 0.7, 0.55
MOST_PIXELS = 65536  # of a convolution's chunk: offsets have 16 bits
GATHER_STRIP = 4096  # kept weights whose gradients wait for their update
COLUMN_STRIP = 2048
CONV_GRAD_ROWS, LINEAR_GRAD_ROWS = 4, 8  # rows of a dense gradient at once


NO_HALO = (0, 0)  # zeros above and below, left and right


@dataclass(frozen=True)
class Geometry:
    """What a layer reads and writes, in pixels with their halos, and the form of its weight."""

    needs_grad_in: bool
    in_halo: Pair = NO_HALO
    grad_halo: Pair = NO_HALO
    slower: bool = False  # it takes the slower of its two forms


@dataclass(frozen=True)
class Situation:
    """What decides how much memory a layer needs in a pass."""

    examples: int  # at once
    lanes: int  # of theirs, idle ones included
    panels: int
    training: bool  # backward follows
    dense_rows: int  # of the weight, whose gradients are taken densely
    needs_grad_in: bool  # of any input
    threads: int


@dataclass(frozen=True)
class Scratch:
    """Floats that a layer needs for a moment, and from forward to backward."""

    forward: int = 0
    backward: int = 0
    saved: int = 0


@dataclass(frozen=True)
class _Window:
    """A convolution of any stride as one of stride 1 on phases of its input."""

    phases: int
    in_pixels: int  # per input channel, of all phases
    grad_pixels: int  # per output channel
    size: int
    chunk: int  # input channels
    chunk_backward: int  # output channels


def stored_bytes(
    spec: ModelSpec,
    kept: Mapping[str, int],
    optimizer_floats: int,
    frozen: frozenset[str],
    geometries: Mapping[str, Geometry],
) -> int:
    """Values, optimiser state, masks and patterns of all tensors."""
    total = 0
    for name, shape in spec.tensor_shapes.items():
        trained = name in spec.param_shapes and name not in frozen
        copies = 1 + (optimizer_floats if trained else 0)
        total += _tensor_bytes(spec, name, kept.get(name, prod(shape)), copies, geometries)
    return total


def _tensor_bytes(
    spec: ModelSpec, name: str, values: int, copies: int, geometries: Mapping[str, Geometry]
) -> int:
    node, size = spec.by_name[name.rsplit(".", 1)[0]], prod(spec.tensor_shapes[name])
    if name.endswith(".weight") and is_sparse(spec, node, values, geometries):
        index = _index_bytes(spec, node, values, geometries[node.name])
        return FLOAT_BYTES * values * copies + index
    return FLOAT_BYTES * size * copies + (size if values < size else 0)  # a byte of mask


def saved_bytes(
    spec: ModelSpec, node: Node, values: int, copies: int, geometries: Mapping[str, Geometry]
) -> int:
    """What a weight of `values` kept, each stored in `copies`, takes less in its slower form.

    0 for a layer that has one form only.
    """
    if not _has_two_forms(spec, node, values, geometries):
        return 0
    forms = ({node.name: replace(geometries[node.name], slower=slower)} for slower in (False, True))
    name = f"{node.name}.weight"
    faster, slower = (_tensor_bytes(spec, name, values, copies, form) for form in forms)
    return faster - slower


def is_sparse(spec: ModelSpec, node: Node, values: int, geometries: Mapping[str, Geometry]) -> bool:
    """The faster form, unless the layer's geometry says that it takes the slower one."""
    if not _has_two_forms(spec, node, values, geometries):
        return isinstance(node.layer, Conv2d) and node.layer.groups > 1
    share = SPARSE_LINEAR_BELOW if isinstance(node.layer, Linear) else SPARSE_CONV_BELOW
    sparse_is_faster = values < share * prod(spec.param_shapes[f"{node.name}.weight"])
    return sparse_is_faster != geometries[node.name].slower


def _has_two_forms(
    spec: ModelSpec, node: Node, values: int, geometries: Mapping[str, Geometry]
) -> bool:
    """A grouped convolution is always sparse, one of large images always dense."""
    if not isinstance(node.layer, Conv2d):
        return isinstance(node.layer, Linear)
    window = _window(spec, node, values, geometries[node.name])
    return node.layer.groups == 1 and max(window.in_pixels, window.grad_pixels) <= MOST_PIXELS


def scratch(
    spec: ModelSpec,
    node: Node,
    shape: Shape,
    kept: Mapping[str, int],
    geometries: Mapping[str, Geometry],
    at: Situation,
) -> Scratch:
    """Of a layer that makes `shape`; `kept` maps masked tensors to kept coordinates."""
    match node.layer:
        case L.Linear() | L.Conv2d():
            name = f"{node.name}.weight"
            values = kept.get(name, prod(spec.param_shapes[name]))
            of = _linear_scratch if isinstance(node.layer, L.Linear) else _conv_scratch
            return of(spec, node, values, geometries, at)
        case L.MaxPool2d():  # a byte per output: which pixel won
            return Scratch(saved=-(-prod(shape) * at.lanes // 4) if at.training else 0)
        case L.GroupNorm(groups=groups):
            saved = 2 * groups * at.panels * PANEL_LANES if at.training else 0
            return Scratch(0, 2 * at.threads * (shape[0] // groups), saved)
        case L.BatchNorm():
            return Scratch(saved=2 * shape[0] if at.training else 0)
    return Scratch()


def _conv_scratch(
    spec: ModelSpec, node: Node, values: int, geometries: Mapping[str, Geometry], at: Situation
) -> Scratch:
    layer, sparse = node.layer, is_sparse(spec, node, values, geometries)
    assert isinstance(layer, L.Conv2d)
    window = _window(spec, node, values, geometries[node.name])
    channels, taps = spec.input_shapes(node)[0][0], layer.window.area
    split = channels * window.in_pixels * at.lanes if is_split(layer.window) else 0
    backward = split
    if at.dense_rows or not sparse:
        backward += at.threads * CONV_GRAD_ROWS * (channels // layer.groups) * taps
    if sparse:
        strip = at.threads * max(min(GATHER_STRIP, values), window.chunk * taps)
        transposed = values if at.needs_grad_in else 0
        backward += max(transposed, strip) + 16
    return Scratch(split, backward)


def _linear_scratch(
    spec: ModelSpec, node: Node, values: int, geometries: Mapping[str, Geometry], at: Situation
) -> Scratch:
    outputs, inputs = spec.param_shapes[f"{node.name}.weight"]
    rows, block = at.examples * inputs, LINEAR_GRAD_ROWS * inputs
    if is_sparse(spec, node, values, geometries):
        dense = rows + at.examples * at.dense_rows + block if at.dense_rows else 0
        return Scratch(0, at.threads * COLUMN_STRIP + dense)
    both = rows + at.examples * outputs
    return Scratch(both, both + block + (rows if at.needs_grad_in else 0))


def _index_bytes(spec: ModelSpec, node: Node, values: int, geometry: Geometry) -> int:
    shape = spec.param_shapes[f"{node.name}.weight"]
    if isinstance(node.layer, Linear):  # by columns where there is a gradient of the input
        columns, rows = shape[::-1] if geometry.needs_grad_in else shape
        block = min(rows, 1024 if values < 0.07 * prod(shape) else 256)
        return START_BYTES * (-(-rows // block) * columns + 1) + OFFSET_BYTES * values
    assert isinstance(node.layer, Conv2d)
    window = _window(spec, node, values, geometry)
    outputs, inputs, groups = shape[0], shape[1] * node.layer.groups, node.layer.groups
    total = _gather_bytes(inputs, window.chunk, outputs, groups, values)
    if geometry.needs_grad_in:  # and where each value is in the forward order
        images = inputs * window.phases
        total += _gather_bytes(outputs, window.chunk_backward, images, groups, values)
        total += START_BYTES * values
    return total


def _gather_bytes(channels: int, chunk: int, outputs: int, groups: int, values: int) -> int:
    group_in, group_out = channels // groups, outputs // groups
    starts = range(0, channels, chunk)
    rows = sum(
        (min(first + chunk, channels) - 1) // group_in - first // group_in + 1 for first in starts
    )
    rows *= group_out
    in_rows = START_BYTES * (rows + 1) + rows
    return CHUNK_BYTES * len(starts) + in_rows + OFFSET_BYTES * values


def _window(spec: ModelSpec, node: Node, values: int, geometry: Geometry) -> _Window:
    phases, in_pixels, grad_pixels = _images(spec, node.name, geometry.in_halo, geometry.grad_halo)
    assert isinstance(node.layer, Conv2d)
    size, (rows, columns) = prod(spec.param_shapes[f"{node.name}.weight"]), node.layer.window.kernel
    wanted = int(20 / (rows * columns * max(values / size, 1e-3)) + 0.5)
    wanted = max(wanted, 28000 // ((rows + 3) * (columns + 7) * 64))

    def chunk(pixels: int) -> int:
        return max(1, min(wanted, MOST_PIXELS // pixels, 128))

    return _Window(phases, in_pixels, grad_pixels, size, chunk(in_pixels), chunk(grad_pixels))


def is_split(window: Window) -> bool:
    """Whether it strides, so that its input is split into phases first."""
    return window.stride != (1, 1)


@lru_cache(maxsize=1024)
def _images(spec: ModelSpec, name: str, in_halo: Pair, grad_halo: Pair) -> tuple[int, int, int]:
    """Phases, and pixels of an input and of an output channel: the same for all masks."""
    node = spec.by_name[name]
    assert isinstance(node.layer, Conv2d)
    window = node.layer.window
    sides = as_image(spec.input_shapes(node)[0])[1:]
    grad_pixels = _with_zeros(as_image(spec.shapes[node.name])[1:], grad_halo)
    if not is_split(window):
        return 1, _with_zeros(sides, in_halo), grad_pixels
    phases = in_pixels = 1
    for i, side in enumerate(sides):
        stride, dilation = window.stride[i], window.dilation[i]
        phases *= min(window.kernel[i], stride // gcd(stride, dilation))  # that have a tap
        in_pixels *= -(-(side + 2 * window.padding[i]) // stride)
    return phases, phases * in_pixels, grad_pixels


def _with_zeros(sides: Pair, halo: Pair) -> int:
    return (sides[0] + 2 * halo[0]) * (sides[1] + 2 * halo[1])
