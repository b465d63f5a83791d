"""Which layers a device holds in the slower and smaller of their two forms, to fit its memory.

The native engine holds a pruned weight sparsely, its kept values and their places, or densely with
a byte of mask for each, whichever is faster at its density.  That form is not always the smaller
one: a Linear is faster densely from 55% kept on, and smaller sparsely up to more than 80%.

The choice is ours, and is here alone: the engine, its limit and the price ask for it.  It follows
from the model, the kept counts, the settings of the session and the device's memory, and from
nothing that differs between two runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from math import prod

from fedlean.engine.memory import ForwardMemory, StepMemory, forward_memory, step_memory
from fedlean.engine.native_storage import Geometry, saved_bytes
from fedlean.engine.native_structure import geometries, structure
from fedlean.spec import ModelSpec

MB = 10**6
NONE: frozenset[str] = frozenset()

_Kept = tuple[tuple[str, int], ...]  # sorted: the same masks are the same question


def step_forms(
    spec: ModelSpec,
    kept: Mapping[str, int],
    memory_bytes: int | None,
    *,
    batch_size: int,
    optimizer_floats: int,
    frozen: frozenset[str] = NONE,
) -> frozenset[str]:
    """Names of the layers that take the slower form where a training step must fit `memory_bytes`.

    None, where the faster forms fit or there is no limit (None).  Otherwise layers take the slower
    form one after another, those first whose weights save the most bytes by it, until a plain step
    on one thread fits; where it never does, as many as make it least.  What a session is asked for
    beyond a plain step (Σ g², taps) changes no form.  `kept` maps masked tensors to their kept
    coordinates; the rest is as in `step_memory`.
    """
    if memory_bytes is None or not kept:
        return NONE
    counts = tuple(sorted(kept.items()))
    return _step_forms(spec, counts, memory_bytes, batch_size, optimizer_floats, frozen)


def forward_forms(
    spec: ModelSpec, kept: Mapping[str, int], memory_bytes: int | None, *, batch_size: int
) -> frozenset[str]:
    """The same of a session that only runs forward, one direction at a time, nothing frozen."""
    if memory_bytes is None or not kept:
        return NONE
    return _forward_forms(spec, tuple(sorted(kept.items())), memory_bytes, batch_size)


def enough_bytes(dense: StepMemory | ForwardMemory, kept: Mapping[str, int]) -> int:
    """For the sparse way of what takes `dense`, where that keeps `kept`, in its faster forms.

    Each kept weight has two offsets, its place in the other order and its copy there, 12 bytes.
    Rows of up to one kernel start in both orders, at most 10 bytes for each weight.  Beside that
    layers want less than 1 MB of sums, and arrays of other sizes leave other gaps.
    """
    more = 12 * sum(kept.values()) + 3 * dense.parameter_bytes + dense.activation_bytes // 2
    return dense.peak_bytes + more + MB


@lru_cache(maxsize=256)
def _step_forms(
    spec: ModelSpec,
    counts: _Kept,
    memory_bytes: int,
    batch_size: int,
    optimizer_floats: int,
    frozen: frozenset[str],
) -> frozenset[str]:
    kept = dict(counts)
    if enough_bytes(_dense_step(spec, batch_size, optimizer_floats, frozen), kept) <= memory_bytes:
        return NONE

    def peak(slower: frozenset[str]) -> int:
        return step_memory(
            spec,
            kept,
            batch_size=batch_size,
            optimizer_floats=optimizer_floats,
            frozen=frozen,
            slower=slower,
        ).peak_bytes

    return _first_that_fits(spec, kept, memory_bytes, optimizer_floats, frozen, peak)


@lru_cache(maxsize=256)
def _forward_forms(
    spec: ModelSpec, counts: _Kept, memory_bytes: int, batch_size: int
) -> frozenset[str]:
    kept = dict(counts)
    if enough_bytes(_dense_forward(spec, batch_size), kept) <= memory_bytes:
        return NONE

    def peak(slower: frozenset[str]) -> int:
        return forward_memory(spec, kept, batch_size=batch_size, slower=slower).peak_bytes

    return _first_that_fits(spec, kept, memory_bytes, 0, frozenset(spec.tensor_shapes), peak)


@lru_cache(maxsize=64)
def _dense_step(
    spec: ModelSpec, batch_size: int, optimizer_floats: int, frozen: frozenset[str]
) -> StepMemory:
    """Once for all masks: a time model asks for thousands."""
    return step_memory(
        spec, {}, batch_size=batch_size, optimizer_floats=optimizer_floats, frozen=frozen
    )


@lru_cache(maxsize=64)
def _dense_forward(spec: ModelSpec, batch_size: int) -> ForwardMemory:
    return forward_memory(spec, {}, batch_size=batch_size)


def _first_that_fits(
    spec: ModelSpec,
    kept: Mapping[str, int],
    memory_bytes: int,
    optimizer_floats: int,
    frozen: frozenset[str],
    peak: Callable[[frozenset[str]], int],
) -> frozenset[str]:
    slower, least, best = NONE, peak(NONE), NONE
    if least <= memory_bytes:
        return NONE
    for name in _in_order(spec, kept, optimizer_floats, frozen):
        slower |= {name}
        needed = peak(slower)
        if needed <= memory_bytes:
            return slower
        if needed < least:
            least, best = needed, slower
    return best


def _in_order(
    spec: ModelSpec, kept: Mapping[str, int], optimizer_floats: int, frozen: frozenset[str]
) -> list[str]:
    """Layers whose weights take less in the slower form, the most saved first, else as they lie."""
    where: Mapping[str, Geometry] = geometries(spec, structure(spec, frozen))
    saved = {}
    for node in spec.weighted:
        name = f"{node.name}.weight"
        values = kept.get(name)
        if values is None or values == prod(spec.tensor_shapes[name]):
            continue  # it is whole
        copies = 1 + (0 if name in frozen else optimizer_floats)
        saved[node.name] = saved_bytes(spec, node, values, copies, where)
    return sorted((name for name in saved if saved[name] > 0), key=lambda name: -saved[name])
