"""An engine whose sessions take the forms that fit the memory that a task may have."""

from __future__ import annotations

from typing import Literal

from fedlean.core import Params, SubModel
from fedlean.engine import checks
from fedlean.engine.forms import forward_forms, step_forms
from fedlean.engine.memory import optimizer_floats
from fedlean.engine.protocol import SGD, Engine, ForwardSession, Loss, Session
from fedlean.spec import ModelSpec
from fedlean.tree import kept_counts


class FittingEngine:
    """`engine`, with layers in their slower and smaller forms where `memory_bytes` ask for it.

    memory_bytes: what the server takes the device to have, as its price does; a simulation and a
    deployment that say the same give the same bits, however much is free at the moment.  It is no
    limit: `limit.LimitedEngine` is one.
    """

    def __init__(self, engine: Engine, memory_bytes: int):
        self._engine = engine
        self._memory_bytes = memory_bytes
        self.name = engine.name
        self.arithmetic: Literal["masked", "sparse"] = engine.arithmetic
        self.instruction_set = engine.instruction_set

    def open(
        self,
        spec: ModelSpec,
        params: Params,
        sub_model: SubModel,
        *,
        batch_size: int,
        optimizer: SGD,
        loss: Loss = "ce",
        slower: frozenset[str] = frozenset(),
        seed: int = 0,
    ) -> Session:
        """As the engine's own; forms that the caller chooses count."""
        checks.check_settings(batch_size, loss)
        checks.check_sub_model(spec, sub_model)
        slower = slower or step_forms(
            spec,
            kept_counts(sub_model.masks),
            self._memory_bytes,
            batch_size=batch_size,
            optimizer_floats=optimizer_floats(optimizer),
            frozen=sub_model.frozen,
        )
        return self._engine.open(
            spec,
            params,
            sub_model,
            batch_size=batch_size,
            optimizer=optimizer,
            loss=loss,
            slower=slower,
            seed=seed,
        )

    def open_forward(
        self,
        spec: ModelSpec,
        params: Params,
        sub_model: SubModel,
        *,
        batch_size: int,
        loss: Loss = "ce",
        directions_at_once: int = 1,
        slower: frozenset[str] = frozenset(),
    ) -> ForwardSession:
        """As `open`."""
        checks.check_settings(batch_size, loss)
        checks.check_sub_model(spec, sub_model)
        kept = kept_counts(sub_model.masks)
        slower = slower or forward_forms(spec, kept, self._memory_bytes, batch_size=batch_size)
        return self._engine.open_forward(
            spec,
            params,
            sub_model,
            batch_size=batch_size,
            loss=loss,
            directions_at_once=directions_at_once,
            slower=slower,
        )
