"""What a training step, or a forward pass alone, holds in memory, from the model alone.

Two models: `sparse=True` is a device with the native engine, which keeps and computes the kept
weights only (`native_step_plan`, `native_forward_plan`), to the byte; `sparse=False` is what a
dense engine with masks holds.  Counted are parameters, gradients, optimiser state, importance sums,
activations and scratch; not counted are the process and its libraries, and a dense engine's
workspace.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from fedlean.engine.gradient_flow import needed
from fedlean.engine.native_forward_plan import forward_bytes, tapped_bytes
from fedlean.engine.native_step_plan import SessionPlan
from fedlean.engine.native_storage import FLOAT_BYTES
from fedlean.engine.pieces import Pieces, sum_bytes, whole
from fedlean.engine.protocol import SGD
from fedlean.layers import (
    Add,
    Concat,
    Dropout,
    Flatten,
    GlobalAvgPool,
    MaxPool2d,
    ReLU,
    Scaler,
)
from fedlean.spec import INPUT, ModelSpec, Node

MAX_POOL_INDEX_BYTES = 8  # torch keeps int64 positions


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one training step; `peak_bytes` is at most the sum of the others."""

    parameter_bytes: int  # values, optimiser state, indices, masks; dense: gradients
    importance_bytes: int  # Σ g²
    activation_bytes: int  # activations; native: their gradients and scratch too, at the peak
    peak_bytes: int


def step_memory(
    spec: ModelSpec,
    kept: Mapping[str, int],
    *,
    batch_size: int,
    optimizer_floats: int = 0,
    frozen: frozenset[str] = frozenset(),
    importance: bool = False,
    taps: Collection[str] = (),
    pieces: Sequence[Pieces] = (),
    sparse: bool = True,
    threads: int = 1,
    slower: frozenset[str] = frozenset(),
) -> StepMemory:
    """Memory of one forward, backward and update on `batch_size` examples.

    `importance` sums g², of all coordinates or of `pieces`, one step's after another's.

    `kept` maps masked tensors to their kept coordinates (absent: dense); `optimizer_floats` is what
    the optimiser holds per trained weight (`optimizer_floats`).  With `taps` the session also runs
    forward to them and descends from there, which natively takes more scratch.  `slower` names the
    layers that the native engine holds in the slower of their two forms (`engine.forms`).
    """
    sizes = {name: prod(s) for name, s in spec.param_shapes.items() if name not in frozen}
    summed = (pieces or (whole(spec, frozen),)) if importance else ()
    sums = max((sum_bytes(spec, each) for each in summed), default=0)
    if sparse:
        plan = SessionPlan(spec, kept, batch_size, frozen, threads, slower)
        stored = plan.stored_bytes(optimizer_floats)
        arena = plan.step_bytes(summed)
        if taps:
            arena = max(arena, plan.forward_bytes(batch_size, taps, training=True))
        return StepMemory(stored, sums, arena, stored + sums + arena)
    gradients = {name: FLOAT_BYTES * size for name, size in sizes.items()}
    stored = sum(FLOAT_BYTES * prod(shape) for shape in spec.tensor_shapes.values())
    stored += FLOAT_BYTES * optimizer_floats * sum(sizes.values())
    stored += FLOAT_BYTES * sum(sizes[name] for name in kept if name in sizes)  # masks, as factors
    saved = _saved_bytes(spec, batch_size)
    peak = stored + sums + _backward_peak(spec, saved, gradients, batch_size)
    return StepMemory(stored + sum(gradients.values()), sums, sum(saved.values()), peak)


def optimizer_floats(optimizer: SGD, *, sparse: bool = True) -> int:
    """What an engine holds per trained weight beside its value.

    Momentum, what was loaded for the proximal term and, natively, where clipping must know the norm
    before it updates, the gradient; a dense engine has that in any case.
    """
    clips = sparse and optimizer.clip_norm is not None
    return bool(optimizer.momentum) + bool(optimizer.proximal) + clips


@dataclass(frozen=True)
class ForwardMemory:
    """Bytes of evaluating a model and its perturbed neighbours; `peak_bytes` is their sum."""

    parameter_bytes: int  # values, indices, masks
    activation_bytes: int  # those that live at once, and scratch: the perturbed layer in work
    peak_bytes: int


def forward_memory(
    spec: ModelSpec,
    kept: Mapping[str, int],
    *,
    batch_size: int,
    frozen: frozenset[str] = frozenset(),
    taps: Collection[str] = (),
    sparse: bool = True,
    directions_at_once: int = 1,
    slower: frozenset[str] = frozenset(),
) -> ForwardMemory:
    """Memory of a `ForwardSession` for `batch_size` examples, on as many threads as directions.

    `kept` and `slower` as in `step_memory`.  Not counted is the table of normal values, 256 KiB,
    which a process has once.
    """
    if sparse:
        stored, live = forward_bytes(
            spec,
            kept,
            batch_size=batch_size,
            frozen=frozen,
            directions_at_once=directions_at_once,
            slower=slower,
        )
        if taps:
            tapped = tapped_bytes(spec, kept, examples=batch_size, taps=taps, slower=slower)
            live = max(live, tapped)
        return ForwardMemory(stored, live, stored + live)
    sizes = {name: prod(s) for name, s in spec.param_shapes.items() if name not in frozen}
    stored = sum(FLOAT_BYTES * prod(shape) for shape in spec.tensor_shapes.values())
    stored += FLOAT_BYTES * sum(sizes[name] for name in kept if name in sizes)  # masks, as factors
    live = _forward_peak(spec, sizes, batch_size)
    return ForwardMemory(stored, live, stored + live)


def _forward_peak(spec: ModelSpec, moved: Mapping[str, int], batch_size: int) -> int:
    """Most bytes of activations and of one layer's perturbed weights at once."""
    nodes = _used(spec)
    last = {source: i for i, node in enumerate(nodes) for source in node.inputs}
    live, peak = dict[str, int](), 0
    for i, node in enumerate(nodes):
        if not isinstance(node.layer, Flatten):
            live[node.name] = FLOAT_BYTES * batch_size * prod(spec.shapes[node.name])
        layer = sum(moved.get(f"{node.name}.{suffix}", 0) for suffix in ("weight", "bias"))
        peak = max(peak, sum(live.values()) + FLOAT_BYTES * layer)
        for source in node.inputs:
            if last[source] == i:
                live.pop(source, None)
    return peak


def _used(spec: ModelSpec) -> list[Node]:
    """Without branches that end in nothing; what their statistics take is soon free again."""
    names = needed(spec)
    return [node for node in spec.nodes if node.name in names]


def _saved_bytes(spec: ModelSpec, batch_size: int) -> dict[str, int]:
    """Activations kept for the backward pass, by the node that made them (or the input)."""
    saved: dict[str, int] = {}
    nodes = _used(spec)
    for node in nodes:
        size = prod(spec.shapes[node.name])
        if isinstance(node.layer, ReLU | Dropout):
            saved[node.name] = FLOAT_BYTES * size  # the sign of its output, or what was dropped
        if isinstance(node.layer, ReLU | Add | Concat | Flatten | GlobalAvgPool | Scaler | Dropout):
            continue  # these do not need their input again
        for source in map(spec.viewed, node.inputs):
            saved[source] = FLOAT_BYTES * prod(spec.shapes[source])
    for node in nodes:
        if isinstance(node.layer, MaxPool2d):
            positions = MAX_POOL_INDEX_BYTES * prod(spec.shapes[node.name])
            saved[node.name] = saved.get(node.name, 0) + positions
    return {name: batch_size * size for name, size in saved.items()}


def _backward_peak(
    spec: ModelSpec, saved: Mapping[str, int], gradients: Mapping[str, int], batch_size: int
) -> int:
    """Most bytes of saved activations, activation gradients and weight gradients at once."""
    live_saved, live_gradients = dict(saved), 0
    flowing = {spec.nodes[-1].name: FLOAT_BYTES * batch_size * prod(spec.output_shape)}
    peak = sum(live_saved.values()) + sum(flowing.values())
    used = needed(spec)
    for node in reversed(spec.nodes):
        for suffix in ("weight", "bias"):
            live_gradients += gradients.get(f"{node.name}.{suffix}", 0)
        if node.name not in used:
            continue
        size = FLOAT_BYTES * batch_size * prod(spec.shapes[node.name])
        made = {
            source: FLOAT_BYTES * batch_size * prod(spec.shapes[source])
            for source in node.inputs
            if spec.viewed(source) != INPUT
        }
        if isinstance(node.layer, Flatten | Add):
            flowing.pop(node.name, None)  # the same memory flows on
            flowing |= made
        else:
            flowing |= made
            now = sum(live_saved.values()) + sum(flowing.values()) + live_gradients
            peak = max(peak, now + (0 if node.name in flowing else size))
            flowing.pop(node.name, None)
        live_saved.pop(node.name, None)
    return max(peak, live_gradients)
