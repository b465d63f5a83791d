"""What a training step of the native engine holds beside the weights, from the model alone.

A model of `native/src/program.cpp`: activations lie in panels of a multiple of four examples with
zeros around images, ReLU works in place and after max-pooling, max-pooling keeps a byte per output,
and arrays whose lifetimes do not meet share memory.  Left out is what that sharing loses to gaps;
a frozen beginning, which the engine runs a few examples at a time, is counted for the whole batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod
from typing import NamedTuple

from fedlean import layers as L
from fedlean.engine.native_storage import FLOAT_BYTES, Geometry, scratch
from fedlean.layers import Shape
from fedlean.spec import INPUT, ModelSpec, Node

PANEL_LANES = 16
LANE_STEP = 4
LINE_FLOATS = 16  # arrays start at cache lines


@dataclass
class Structure:
    """Per tensor, by the node that makes it (or the input): zeros around it, and who reads it."""

    shapes: dict[str, Shape]
    value_halo: dict[str, int]
    grad_halo: dict[str, int]
    needs_grad: dict[str, bool]
    readers: Counter[str]


class Step(NamedTuple):
    node: Node
    inputs: tuple[str, ...]
    output: str


def structure(spec: ModelSpec, frozen: frozenset[str]) -> Structure:
    """`frozen` names tensors that are not trained."""
    names = (INPUT, *spec.by_name)
    s = Structure(
        {name: tuple(spec.shapes[name]) for name in names},
        dict.fromkeys(names, 0),
        dict.fromkeys(names, 0),
        {INPUT: False},
        Counter(source for node in spec.nodes for source in node.inputs),
    )
    for node in spec.nodes:
        own = {f"{node.name}.weight", f"{node.name}.bias"} & spec.param_shapes.keys() - frozen
        inputs_need = any(s.needs_grad[source] for source in node.inputs)
        s.needs_grad[node.name] = bool(own) or inputs_need
        if isinstance(node.layer, L.Conv2d):
            halo = node.layer.padding if node.layer.stride == 1 else 0
            s.value_halo[node.inputs[0]] = max(s.value_halo[node.inputs[0]], halo)
            if inputs_need:
                s.grad_halo[node.name] = _gradient_halo(spec, node, node.layer)
    alike = [n for n in spec.nodes if isinstance(n.layer, L.ReLU | L.Add)]
    alike = [node for node in alike if s.readers[node.inputs[0]] == 1]  # they may share memory
    for node in reversed(alike):
        source = node.inputs[0]
        s.value_halo[source] = max(s.value_halo[source], s.value_halo[node.name])
    for node in alike:
        s.grad_halo[node.name] = max(s.grad_halo[node.name], s.grad_halo[node.inputs[0]])
    return s


def geometries(spec: ModelSpec, s: Structure) -> dict[str, Geometry]:
    """Of the layers with weights, by name."""
    return {
        node.name: Geometry(
            s.needs_grad[node.inputs[0]], s.value_halo[node.inputs[0]], s.grad_halo[node.name]
        )
        for node in spec.weighted
    }


def _gradient_halo(spec: ModelSpec, node: Node, conv: L.Conv2d) -> int:
    if conv.stride == 1:
        return max(0, conv.kernel_size - 1 - conv.padding)
    inside, outside = spec.input_shapes(node)[0][1:], spec.shapes[node.name][1:]
    beyond = (
        -(-(side + 2 * conv.padding) // conv.stride) - out
        for side, out in zip(inside, outside, strict=True)
    )
    return max((conv.kernel_size - 1) // conv.stride, *beyond)


def steps_of(spec: ModelSpec, s: Structure) -> list[Step]:
    """In the engine's order: a ReLU read by a max-pooling alone works on the pooled image."""
    steps = [Step(node, tuple(node.inputs), node.name) for node in spec.nodes]
    for i, relu in enumerate(steps):
        if not isinstance(relu.node.layer, L.ReLU) or s.readers[relu.output] != 1:
            continue
        j = next(k for k in range(i + 1, len(steps)) if relu.output in steps[k].inputs)
        pool = steps[j]
        if not isinstance(pool.node.layer, L.MaxPool2d):
            continue
        between, last = relu.output, pool.output
        s.shapes[between], s.value_halo[between] = s.shapes[last], s.value_halo[last]
        s.grad_halo[between] = s.grad_halo[last] = 0
        swapped = [Step(pool.node, relu.inputs, between), Step(relu.node, (between,), last)]
        steps[i : j + 1] = [*steps[i + 1 : j], *swapped]
    return steps


@dataclass
class _Lives:
    """Arrays with the first and last time at which they are needed."""

    floats: list[int] = field(default_factory=list)
    times: list[tuple[int, int]] = field(default_factory=list)

    def add(self, floats: int, first: int, last: int) -> int:
        self.floats.append(-(-floats // LINE_FLOATS) * LINE_FLOATS)
        self.times.append((first, last))
        return len(self.floats) - 1

    def extend(self, array: int, time: int) -> None:
        first, last = self.times[array]
        self.times[array] = min(first, time), max(last, time)

    def peak(self) -> int:
        changes = [0] * (max(last for _, last in self.times) + 2)
        for floats, (first, last) in zip(self.floats, self.times, strict=True):
            changes[first] += floats
            changes[last + 1] -= floats
        return max(accumulate(changes))


def arena_bytes(
    spec: ModelSpec,
    kept: Mapping[str, int],
    s: Structure,
    *,
    batch_size: int,
    frozen: frozenset[str],
    importance: bool,
) -> int:
    """Activations, their gradients and scratch at the worst moment; changes `s`."""
    where = geometries(spec, s)
    steps, lives = steps_of(spec, s), _Lives()
    lanes = -(-batch_size // LANE_STEP) * LANE_STEP
    _add_values(spec, s, steps, lives, lanes, frozen)
    _add_gradients(s, steps, lives, lanes)
    for i, step in enumerate(steps):
        back, trained = 2 * len(steps) - i, s.needs_grad[step.output]
        lives.add(_saved(step, s, batch_size, lanes) if trained else 0, i, back)
        if isinstance(step.node.layer, L.Linear | L.Conv2d):
            name = f"{step.node.name}.weight"
            values = kept.get(name, prod(spec.param_shapes[name]))
            need = scratch(
                spec,
                step.node,
                values,
                where,
                batch_size=batch_size,
                lanes=lanes,
                importance=importance,
            )
            lives.add(need.forward, i, i)
            lives.add(need.backward if trained else 0, back, back)
    return FLOAT_BYTES * lives.peak()


def floats_of(shape: Shape, halo: int, lanes: int) -> int:
    """Of an activation with zeros around its image."""
    sides = [side + 2 * halo for side in shape[1:]]
    return shape[0] * prod(sides) * lanes


def _add_values(
    spec: ModelSpec,
    s: Structure,
    steps: list[Step],
    lives: _Lives,
    lanes: int,
    frozen: frozenset[str],
) -> None:
    made = {INPUT: lives.add(floats_of(s.shapes[INPUT], s.value_halo[INPUT], lanes), 0, 0)}
    makers = {step.output: step for step in steps}
    for i, step in enumerate(steps):
        if _in_place(step, s, makers):
            made[step.output] = made[step.inputs[0]]
        else:
            floats = floats_of(s.shapes[step.output], s.value_halo[step.output], lanes)
            made[step.output] = lives.add(floats, i, i)
        for array in (made[step.output], *(made[source] for source in step.inputs)):
            lives.extend(array, i)
        if not s.needs_grad[step.output]:
            continue
        back = 2 * len(steps) - i
        if _reads_input(spec, step.node, frozen):
            for source in step.inputs:
                lives.extend(made[source], back)
        if isinstance(step.node.layer, L.ReLU):  # the sign of its output
            lives.extend(made[step.output], back)
    lives.extend(made[steps[-1].output], 2 * len(steps))


def _in_place(step: Step, s: Structure, makers: Mapping[str, Step]) -> bool:
    """Whether the output takes the memory of the first input, which nobody needs again."""
    source = step.inputs[0]
    if not isinstance(step.node.layer, L.ReLU | L.Add | L.Flatten) or source == INPUT:
        return False
    flat = isinstance(step.node.layer, L.Flatten)
    halo, out_halo = s.value_halo[source], s.value_halo[step.output]
    if s.readers[source] != 1 or halo != out_halo or (flat and halo):
        return False
    while not flat and source != INPUT:
        maker = makers[source]
        if isinstance(maker.node.layer, L.ReLU):
            return False
        if not isinstance(maker.node.layer, L.Flatten):
            break
        source = maker.inputs[0]
        if s.readers[source] != 1:
            return False
    return True


def _reads_input(spec: ModelSpec, node: Node, frozen: frozenset[str]) -> bool:
    """In backward."""
    match node.layer:
        case L.Linear() | L.Conv2d():
            return f"{node.name}.weight" not in frozen
        case L.BatchNorm():
            return not {f"{node.name}.weight", f"{node.name}.running_mean"} <= frozen
        case L.GroupNorm() | L.Hardswish() | L.Hardsigmoid() | L.Scale():
            return True
    return False


def _add_gradients(s: Structure, steps: list[Step], lives: _Lives, lanes: int) -> None:
    made: dict[str, int] = {}
    for i, step in reversed(list(enumerate(steps))):
        if not s.needs_grad[step.output]:
            continue
        back = 2 * len(steps) - i

        def array(name: str, time: int = back) -> int:
            if name not in made:
                made[name] = lives.add(
                    floats_of(s.shapes[name], s.grad_halo[name], lanes), time, time
                )
            lives.extend(made[name], time)
            return made[name]

        if step is steps[-1]:
            array(step.output, len(steps))  # from the loss on
        out, shared = array(step.output), False
        flat = isinstance(step.node.layer, L.Flatten)
        for source in step.inputs:
            if not s.needs_grad[source]:
                continue
            halo, out_halo = s.grad_halo[source], s.grad_halo[step.output]
            fits = halo == out_halo and not (flat and halo)
            alike = isinstance(step.node.layer, L.ReLU | L.Add | L.Flatten)
            if alike and fits and not shared and source not in made and s.readers[source] == 1:
                made[source], shared = out, True
            array(source)


def _saved(step: Step, s: Structure, batch_size: int, lanes: int) -> int:
    """Floats from forward to backward beside the activations."""
    shape = s.shapes[step.output]
    match step.node.layer:
        case L.MaxPool2d():
            return -(-prod(shape) * lanes // 4)
        case L.GroupNorm(groups=groups):
            return 2 * groups * -(-batch_size // PANEL_LANES) * PANEL_LANES
        case L.BatchNorm():
            return 2 * shape[0]
    return 0
