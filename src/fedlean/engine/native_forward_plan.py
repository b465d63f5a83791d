"""What the native engine holds to evaluate a model and its perturbed neighbours, to the byte.

A model of `native/src/forward.cpp`, for servers and planners that have no extension: the weights
without anything that gradients need, the activations that live at once, and one layer's perturbed
weights.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from math import prod

from fedlean import layers as L
from fedlean.engine.native_plan import lines
from fedlean.engine.native_program import Mode, program
from fedlean.engine.native_storage import (
    FLOAT_BYTES,
    PANEL_LANES,
    Geometry,
    is_sparse,
    stored_bytes,
)
from fedlean.engine.native_structure import geometries
from fedlean.layers import Shape
from fedlean.spec import ModelSpec, Node

LINEAR_BLOCK, CONV_BLOCK = 16384, 65536  # floats of a perturbed weight that are made at once
MOST_FOR_WIDER = 3, 2  # more than one panel at once may take half as much memory again


def forward_bytes(
    spec: ModelSpec,
    kept: Mapping[str, int],
    *,
    batch_size: int,
    frozen: frozenset[str],
    directions_at_once: int,
    slower: Collection[str] = (),
) -> tuple[int, int]:
    """(of the tensors and their patterns, of everything else)."""
    everything = frozenset(spec.tensor_shapes)
    held = program(spec, everything, Mode(batch_size, group_panels=1)).structure
    where = geometries(spec, held, slower)
    stored = stored_bytes(spec, kept, 0, everything, where)
    moved = partial(_moved, spec, kept, frozen, where)

    def floats_of(panels: int) -> int:
        mode = Mode(batch_size, group_panels=panels)
        return program(spec, everything, mode).floats(kept, where, moved=moved)

    floats = floats_of(1)
    times, out_of = MOST_FOR_WIDER
    most = (stored // FLOAT_BYTES + floats) * times // out_of
    panels = -(-batch_size // PANEL_LANES)
    while panels > 1:
        wider = floats_of(panels)
        if stored // FLOAT_BYTES + wider <= most:
            floats = wider
            break
        panels //= 2
    return stored, FLOAT_BYTES * floats * directions_at_once


def tapped_bytes(
    spec: ModelSpec,
    kept: Mapping[str, int],
    *,
    examples: int,
    taps: Collection[str],
    slower: Collection[str] = (),
) -> int:
    """Of a forward whose taps are kept, beside the tensors and their patterns."""
    everything = frozenset(spec.tensor_shapes)
    own = program(spec, everything, Mode(examples, taps=frozenset(taps), group_panels=1))
    return FLOAT_BYTES * own.floats(kept, geometries(spec, own.structure, slower))


def _moved(
    spec: ModelSpec,
    kept: Mapping[str, int],
    frozen: frozenset[str],
    where: Mapping[str, Geometry],
    node: Node,
) -> int:
    """A block of the perturbed weight, the bias, a row of the weight (for rank one)."""
    total = 0
    for suffix in ("weight", "bias"):
        name = f"{node.name}.{suffix}"
        if name not in spec.param_shapes or name in frozen:
            continue
        shape = spec.param_shapes[name]
        values = kept.get(name, prod(shape))
        sparse = suffix == "weight" and is_sparse(spec, node, values, where)
        held = values if sparse else prod(shape)
        if suffix == "weight":
            held = _block(node, shape, held, sparse)
        columns = prod(shape[1:]) if held and len(shape) > 1 else 0
        total += lines(held) + columns
    return total


def _block(node: Node, shape: Shape, held: int, sparse: bool) -> int:
    """Of `held` values of a weight those that are made at once: as many outputs as fit."""
    outputs, columns = shape[0], prod(shape[1:])
    linear = isinstance(node.layer, L.Linear)
    if sparse:
        return min(held, max(LINEAR_BLOCK, columns)) if linear else held
    if not linear and not isinstance(node.layer, L.Conv2d):
        return held
    most = LINEAR_BLOCK if linear else CONV_BLOCK
    return min(outputs, max(1, most // columns // 4) * 4) * columns
