"""What a session comes to hold by what is asked of it, known before it is opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from math import prod
from typing import Protocol

from fedlean.core import SubModel
from fedlean.engine.memory import forward_memory, optimizer_floats, step_memory
from fedlean.engine.native_forward_plan import tapped_bytes
from fedlean.engine.native_step_plan import SessionPlan
from fedlean.engine.native_storage import FLOAT_BYTES
from fedlean.engine.pieces import Importance, pieces_of, sum_bytes
from fedlean.engine.protocol import SGD, Engine
from fedlean.spec import ModelSpec
from fedlean.tree import kept_counts


class StepNeeds(Protocol):
    """Bytes of a session that trains.  Its arena serves the largest of its passes."""

    stored_bytes: int  # tensors, patterns, optimiser
    arena_bytes: int  # of a step
    gradient_bytes: int  # that `apply` holds

    @property
    def step_bytes(self) -> int: ...
    def importance_bytes(self, importance: Importance) -> tuple[int, int]:
        """(Σ g², arena of a step that sums it).  Raises ValueError for pieces that are none."""
        ...

    def forward_arena_bytes(self, examples: int, taps: Sequence[str], training: bool) -> int: ...
    def backward_bytes(self, dense: bool) -> int:
        """The gradients that it holds and those that it returns."""
        ...


def step_needs(
    engine: Engine,
    spec: ModelSpec,
    sub_model: SubModel,
    batch_size: int,
    optimizer: SGD,
    slower: frozenset[str] = frozenset(),
) -> StepNeeds:
    kept = kept_counts(sub_model.masks)
    if engine.arithmetic == "sparse":
        threads = getattr(engine, "threads", 1)
        plan = SessionPlan(spec, kept, batch_size, sub_model.frozen, threads, slower)
        return _SparseStep(plan, optimizer)
    return _DenseStep(spec, kept, batch_size, sub_model.frozen, optimizer)


class _SparseStep:
    """Of the native engine, to the byte."""

    def __init__(self, plan: SessionPlan, optimizer: SGD):
        self.stored_bytes = plan.stored_bytes(optimizer_floats(optimizer))
        self.arena_bytes = plan.step_bytes()
        clips = optimizer.clip_norm is not None  # holds them all the time
        self.gradient_bytes = 0 if clips else plan.gradient_bytes()
        self._plan = plan
        self._forward = lru_cache(plan.forward_bytes)  # a loop asks for the same again
        self._summing = lru_cache(lambda pieces: plan.step_bytes([pieces]))

    @property
    def step_bytes(self) -> int:
        return self.stored_bytes + self.arena_bytes

    def importance_bytes(self, importance: Importance) -> tuple[int, int]:
        pieces = pieces_of(self._plan.spec, self._plan.frozen, importance)
        return sum_bytes(self._plan.spec, pieces), self._summing(pieces)

    def forward_arena_bytes(self, examples: int, taps: Sequence[str], training: bool) -> int:
        at_once = min(examples, self._plan.batch_size)
        return self._forward(at_once, _known(self._plan.spec, taps), training=training)

    def backward_bytes(self, dense: bool) -> int:
        returned = _trained_bytes(self._plan.spec, self._plan.frozen)
        return returned + (returned if dense else self.gradient_bytes)


class _DenseStep:
    """Of a dense engine, whose gradients and activations a step's memory has in it."""

    gradient_bytes = 0

    def __init__(
        self,
        spec: ModelSpec,
        kept: Mapping[str, int],
        batch_size: int,
        frozen: frozenset[str],
        optimizer: SGD,
    ):
        plain = step_memory(
            spec,
            kept,
            batch_size=batch_size,
            optimizer_floats=optimizer_floats(optimizer, sparse=False),
            frozen=frozen,
            sparse=False,
        )
        self.stored_bytes = 0
        self.arena_bytes = plain.peak_bytes
        self._spec, self._frozen = spec, frozen

    @property
    def step_bytes(self) -> int:
        return self.arena_bytes

    def importance_bytes(self, importance: Importance) -> tuple[int, int]:
        pieces = pieces_of(self._spec, self._frozen, importance)
        return sum_bytes(self._spec, pieces), self.arena_bytes

    def forward_arena_bytes(self, examples: int, taps: Sequence[str], training: bool) -> int:
        return self.arena_bytes

    def backward_bytes(self, dense: bool) -> int:
        return 0  # it returns the gradients themselves


@dataclass(frozen=True)
class ForwardNeeds:
    """Bytes of a session that only runs forward."""

    spec: ModelSpec
    kept: Mapping[str, int]
    batch_size: int
    stored_bytes: int
    loss_bytes: int
    sparse: bool
    slower: frozenset[str] = frozenset()

    def forward_bytes(self, examples: int, taps: Sequence[str]) -> int:
        if not self.sparse:
            return self.loss_bytes
        at_once = min(examples, self.batch_size)
        arena = self._forward(examples=at_once, taps=_known(self.spec, taps))
        return max(self.loss_bytes, self.stored_bytes + arena)

    @cached_property
    def _forward(self) -> Callable[..., int]:
        return lru_cache(partial(tapped_bytes, self.spec, self.kept, slower=self.slower))


def forward_needs(
    engine: Engine,
    spec: ModelSpec,
    sub_model: SubModel,
    batch_size: int,
    directions_at_once: int,
    slower: frozenset[str] = frozenset(),
) -> ForwardNeeds:
    kept, sparse = kept_counts(sub_model.masks), engine.arithmetic == "sparse"
    memory = forward_memory(
        spec,
        kept,
        batch_size=batch_size,
        frozen=sub_model.frozen,
        sparse=sparse,
        directions_at_once=directions_at_once,
        slower=slower,
    )
    return ForwardNeeds(
        spec, kept, batch_size, memory.parameter_bytes, memory.peak_bytes, sparse, slower
    )


def _known(spec: ModelSpec, taps: Sequence[str]) -> tuple[str, ...]:
    """The engine refuses the others, by name."""
    return tuple(name for name in taps if name in spec.by_name)


def _trained_bytes(spec: ModelSpec, frozen: frozenset[str]) -> int:
    """A float for every coordinate of what is trained, pruned ones too."""
    trained = spec.param_shapes.keys() - frozen
    return FLOAT_BYTES * sum(prod(spec.param_shapes[name]) for name in trained)
