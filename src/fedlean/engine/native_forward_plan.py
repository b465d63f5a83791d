"""What the native engine holds to evaluate a model and its perturbed neighbours, to the byte.

A model of `native/src/forward.cpp`, for servers and planners that have no extension: the weights
without anything that gradients need, the activations that live at once, and one layer's perturbed
weights.  Unlike a training step's (`native_arena`), arrays are placed as the engine places them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from fedlean import layers as L
from fedlean.engine.native_arena import (
    LANE_STEP,
    LINE_FLOATS,
    PANEL_LANES,
    Step,
    Structure,
    floats_of,
    geometries,
    steps_of,
    structure,
)
from fedlean.engine.native_storage import FLOAT_BYTES, Geometry, is_sparse, scratch, stored_bytes
from fedlean.layers import Shape
from fedlean.spec import INPUT, ModelSpec, Node

LINEAR_BLOCK, CONV_BLOCK = 16384, 65536  # floats of a perturbed weight that are made at once
MOST_FOR_WIDER = 3, 2  # more than one panel at once may take half as much memory again


@dataclass
class _Array:
    floats: int
    first: int  # time
    last: int
    offset: int = 0


def forward_bytes(
    spec: ModelSpec,
    kept: Mapping[str, int],
    *,
    batch_size: int,
    frozen: frozenset[str],
    directions_at_once: int,
) -> tuple[int, int]:
    """(of the tensors and their patterns, of everything else)."""
    everything = frozenset(spec.tensor_shapes)
    where = geometries(spec, structure(spec, everything))
    stored = stored_bytes(spec, kept, 0, everything, where)
    plan = _Plan(spec, kept, batch_size, frozen, where)
    floats = plan.floats(1)
    times, out_of = MOST_FOR_WIDER
    most = (stored // FLOAT_BYTES + floats) * times // out_of
    panels = -(-batch_size // PANEL_LANES)
    while panels > 1:
        wider = plan.floats(panels)
        if stored // FLOAT_BYTES + wider <= most:
            floats = wider
            break
        panels //= 2
    return stored, FLOAT_BYTES * floats * directions_at_once


@dataclass(frozen=True)
class _Plan:
    spec: ModelSpec
    kept: Mapping[str, int]
    batch_size: int
    frozen: frozenset[str]
    where: Mapping[str, Geometry]

    def floats(self, panels: int) -> int:
        """Of an arena for so many panels at once."""
        s = structure(self.spec, frozenset(self.spec.tensor_shapes))
        steps = steps_of(self.spec, s)
        most = panels * PANEL_LANES
        examples = min(self.batch_size, most)
        padded = -(-self.batch_size // LANE_STEP) * LANE_STEP
        arrays = _values(s, steps, min(padded, most), padded)
        for i, step in enumerate(steps):
            arrays.append(_Array(self._scratch(step, examples, min(padded, most)), i, i))
            arrays.append(_Array(self._moved(step), i, i))
        return _placed(arrays)

    def _scratch(self, step: Step, examples: int, lanes: int) -> int:
        if not isinstance(step.node.layer, L.Linear | L.Conv2d):
            return 0
        name = f"{step.node.name}.weight"
        values = self.kept.get(name, prod(self.spec.param_shapes[name]))
        return scratch(
            self.spec,
            step.node,
            values,
            self.where,
            batch_size=examples,
            lanes=lanes,
            importance=False,
        ).forward

    def _moved(self, step: Step) -> int:
        """A block of the perturbed weight, the bias, a row of the weight (for rank one)."""
        total = 0
        for suffix in ("weight", "bias"):
            name = f"{step.node.name}.{suffix}"
            if name not in self.spec.param_shapes or name in self.frozen:
                continue
            shape = self.spec.param_shapes[name]
            values = self.kept.get(name, prod(shape))
            sparse = suffix == "weight" and is_sparse(self.spec, step.node, values, self.where)
            held = values if sparse else prod(shape)
            if suffix == "weight":
                held = _block(step.node, shape, held, sparse)
            columns = prod(shape[1:]) if held and len(shape) > 1 else 0
            total += _lines(held) + columns
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


def _values(s: Structure, steps: list[Step], lanes: int, padded: int) -> list[_Array]:
    """Activations, in the order in which they are made; the output is there for the whole batch."""
    arrays = [_Array(floats_of(s.shapes[INPUT], s.value_halo[INPUT], lanes), 0, 0)]
    made = {INPUT: arrays[0]}
    for i, step in enumerate(steps):
        source, last = step.inputs[0], step is steps[-1]
        if not last and _in_place(step, s):
            made[step.output] = made[source]
        else:
            shape, halo = s.shapes[step.output], s.value_halo[step.output]
            floats = floats_of(shape, halo, padded if last else lanes)
            made[step.output] = _Array(floats, 0 if last else i, len(steps) if last else i)
            arrays.append(made[step.output])
        for name in (step.output, *step.inputs):
            made[name].last = max(made[name].last, i)
    return arrays


def _in_place(step: Step, s: Structure) -> bool:
    """Whether the output takes the memory of the first input, which nobody else needs."""
    source, flat = step.inputs[0], isinstance(step.node.layer, L.Flatten)
    halo, out_halo = s.value_halo[source], s.value_halo[step.output]
    return (
        isinstance(step.node.layer, L.ReLU | L.Add | L.Flatten | L.Hardswish | L.Hardsigmoid)
        and source != INPUT
        and s.readers[source] == 1
        and (halo == out_halo == 0 if flat else halo == out_halo)
    )


def _placed(arrays: list[_Array]) -> int:
    """Floats in all: the largest first, each at the lowest offset free during its whole life."""
    end = 0
    placed: list[_Array] = []  # by offset
    for array in sorted(arrays, key=lambda array: -_lines(array.floats)):
        floats, at = _lines(array.floats), 0
        for other in placed:
            if other.last < array.first or array.last < other.first:
                continue
            if at + floats <= other.offset:
                break
            at = max(at, other.offset + _lines(other.floats))
        array.offset = at
        end = max(end, at + floats)
        placed.insert(bisect_right(placed, at, key=lambda other: other.offset), array)
    return end


def _lines(floats: int) -> int:
    return -(-floats // LINE_FLOATS) * LINE_FLOATS
