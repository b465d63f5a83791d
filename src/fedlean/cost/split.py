"""What the peak of some work is made of: the parts add up to it, to the byte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedlean.core import Work
from fedlean.cost.stretch import Stretch, held_bytes, stretch
from fedlean.cost.way import stretch_memory
from fedlean.engine.forms import NONE
from fedlean.engine.memory import ForwardMemory, StepMemory
from fedlean.spec import ModelSpec


@dataclass(frozen=True)
class MemorySplit:
    """Of work whose peak is the sum of these, on the native engine."""

    weights_bytes: int = 0  # values, and of pruned tensors the indices and masks
    optimizer_bytes: int = 0  # what the optimiser holds beside them
    importance_bytes: int = 0  # sums over all coordinates, pruned ones too
    activations_bytes: int = 0  # with their gradients and scratch, at the peak
    beside_bytes: int = 0  # activations outside the engine, and stretches that stay in memory

    @property
    def peak_bytes(self) -> int:
        return (
            self.weights_bytes
            + self.optimizer_bytes
            + self.importance_bytes
            + self.activations_bytes
            + self.beside_bytes
        )


def memory_split(
    spec: ModelSpec,
    works: Sequence[Work],
    *,
    frozen: frozenset[str] = frozenset(),
    slower: Sequence[frozenset[str]] | None = None,
) -> MemorySplit:
    """Of `works` as a device does them (`Cost.done`): the sum is `Cost.peak_memory_bytes`.

    It is the split of the neediest stretch; what others hold beside that one is `beside_bytes`.
    """
    own = [stretch(spec, work, frozen) for work in works]
    forms = slower or [NONE] * len(works)
    held = [stretch_memory(*one, slower=f) for one, f in zip(own, forms, strict=True)]
    alone = [one.peak_bytes + held_bytes(spec, w) for one, w in zip(held, works, strict=True)]
    together = [sum(alone[max(0, i - work.beside) : i + 1]) for i, work in enumerate(works)]
    if not together:
        return MemorySplit()
    ends = together.index(max(together))
    group = range(max(0, ends - works[ends].beside), ends + 1)
    neediest = max(group, key=lambda at: alone[at])
    return _split(own[neediest], held[neediest], forms[neediest], together[ends])


def _split(
    own: Stretch, held: StepMemory | ForwardMemory, slower: frozenset[str], peak: int
) -> MemorySplit:
    """Of one stretch, where all that is in memory takes `peak`."""
    beside = peak - held.peak_bytes
    if not isinstance(held, StepMemory):
        return MemorySplit(held.parameter_bytes, 0, 0, held.activation_bytes, beside)
    weights = held.parameter_bytes
    if own.work.optimizer_floats:
        work = replace(own.work, optimizer_floats=0)
        weights = stretch_memory(own.spec, work, own.frozen, slower=slower).parameter_bytes
    return MemorySplit(
        weights,
        held.parameter_bytes - weights,
        held.importance_bytes,
        held.activation_bytes,
        beside,
    )
