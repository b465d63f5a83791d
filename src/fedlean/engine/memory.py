"""What a training step holds in memory, from the model alone.

Two models: `sparse=True` is the sparse storage of a device that keeps only what it trains (value,
momentum and 16-bit row of a Linear weight; those plus gradient, permuted copy, offset and
permutation of a Conv2d weight), never worse than dense per layer; `sparse=False` is what a dense
engine with masks holds.  Counted are parameters, gradients, optimiser state, importance sums,
activations saved for the backward pass, and the largest transient; not counted are the process, its
libraries and a convolution's workspace.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from fedlean.layers import (
    Add,
    Conv2d,
    Flatten,
    GlobalAvgPool,
    Linear,
    MaxPool2d,
    ReLU,
)
from fedlean.spec import INPUT, ModelSpec

FLOAT_BYTES = 4
LINEAR_INDEX_BYTES = 2  # 16-bit row
CONV_EXTRA_BYTES = 16  # gradient 4, permuted copy 4, two 16-bit offsets 4, permutation 4
MAX_POOL_INDEX_BYTES = 8  # torch keeps int64 positions


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one training step; `peak_bytes` is less than the sum of the others."""

    parameter_bytes: int  # values, optimiser state, gradients, indices, masks
    importance_bytes: int  # Σ g² of all coordinates and, in sparse storage, one dense gradient
    activation_bytes: int  # input and everything saved for the backward pass
    peak_bytes: int


def step_memory(
    spec: ModelSpec,
    kept: Mapping[str, int],
    *,
    batch_size: int,
    optimizer_floats: int = 0,
    frozen: frozenset[str] = frozenset(),
    importance: bool = False,
    sparse: bool = True,
) -> StepMemory:
    """Memory of one forward, backward and update on `batch_size` examples.

    `kept` maps masked tensors to their kept coordinates (absent: dense); `optimizer_floats` is what
    the optimiser holds per trained weight (1 with momentum).
    """
    trainable = {name: prod(s) for name, s in spec.param_shapes.items() if name not in frozen}
    held, gradients = 0, {}  # held all the time; dense gradients as the backward pass makes them
    for name, shape in spec.tensor_shapes.items():
        if name not in trainable:
            held += FLOAT_BYTES * prod(shape)
            continue
        own, gradient = _trained_bytes(spec, name, kept.get(name), optimizer_floats, sparse)
        held += own
        gradients[name] = gradient
    accumulators = 0
    if importance:
        widest = max(trainable.values()) if sparse else 0  # a dense engine has it as gradient
        accumulators = FLOAT_BYTES * (sum(trainable.values()) + widest)
    saved = _saved_bytes(spec, batch_size)
    peak = held + accumulators + _backward_peak(spec, saved, gradients, batch_size)
    return StepMemory(held + sum(gradients.values()), accumulators, sum(saved.values()), peak)


def _trained_bytes(
    spec: ModelSpec, name: str, kept: int | None, optimizer_floats: int, sparse: bool
) -> tuple[int, int]:
    """(held all the time, dense gradient) of one trainable tensor."""
    size = prod(spec.param_shapes[name])
    state = FLOAT_BYTES * optimizer_floats
    layer = spec.by_name[name.split(".")[0]].layer
    # a Linear layer can be updated in place as its gradient is made
    gradient = 0 if sparse and isinstance(layer, Linear) else FLOAT_BYTES * size
    dense = size * (FLOAT_BYTES + state)
    if kept is None:
        return dense, gradient
    if not sparse:
        return dense + FLOAT_BYTES * size, gradient  # the mask, as a float factor
    extra = CONV_EXTRA_BYTES if isinstance(layer, Conv2d) else LINEAR_INDEX_BYTES
    in_storage = kept * (FLOAT_BYTES + state + extra)
    return (in_storage, 0) if in_storage < dense + gradient else (dense, gradient)


def _saved_bytes(spec: ModelSpec, batch_size: int) -> dict[str, int]:
    """Activations kept for the backward pass, by the node that made them (or the input)."""
    saved: dict[str, int] = {}
    for node in spec.nodes:
        size = prod(spec.shapes[node.name])
        if isinstance(node.layer, ReLU):
            saved[node.name] = FLOAT_BYTES * size  # its gradient needs the sign of its output
        if isinstance(node.layer, ReLU | Add | Flatten | GlobalAvgPool):
            continue  # these do not need their input again
        for source in map(spec.viewed, node.inputs):
            saved[source] = FLOAT_BYTES * prod(spec.shapes[source])
    for node in spec.nodes:
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
    for node in reversed(spec.nodes):
        for suffix in ("weight", "bias"):
            live_gradients += gradients.get(f"{node.name}.{suffix}", 0)
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
