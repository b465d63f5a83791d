"""A memory limit that is enforced before a session allocates.

The engine's plan is exact and known beforehand, so a task that does not fit is refused with both
numbers instead of the device being killed in the middle of it.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedlean.core import Params, SubModel
from fedlean.engine.memory import forward_memory, step_memory
from fedlean.engine.protocol import SGD, Engine, ForwardSession, Loss, Session
from fedlean.spec import ModelSpec
from fedlean.tree import kept_counts


class TooLarge(ValueError):
    """The task needs more memory than this device may use; the message says how much."""


class LimitedEngine:
    """`engine` on a device whose process may hold `limit_bytes` in all."""

    def __init__(self, engine: Engine, limit_bytes: int):
        self._engine = engine
        self._limit_bytes = limit_bytes
        self._planned_bytes = 0  # of the last session, which the engine may still hold
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
    ) -> Session:
        """Raises TooLarge before anything is allocated; else as the engine's own."""
        plain, important = (
            step_memory(
                spec,
                kept_counts(sub_model.masks),
                batch_size=batch_size,
                optimizer_floats=1 if optimizer.momentum else 0,
                frozen=sub_model.frozen,
                importance=importance,
                sparse=self._engine.arithmetic == "sparse",
            ).peak_bytes
            for importance in (False, True)
        )
        free = self._limit_bytes - (resident_bytes() - self._planned_bytes)
        check_fits(plain, free, self._limit_bytes, "a training step")
        session = self._engine.open(
            spec, params, sub_model, batch_size=batch_size, optimizer=optimizer, loss=loss
        )
        self._planned_bytes = plain
        return _Guarded(session, important, free, self._limit_bytes)  # type: ignore[return-value]

    def open_forward(
        self,
        spec: ModelSpec,
        params: Params,
        sub_model: SubModel,
        *,
        batch_size: int,
        loss: Loss = "ce",
        directions_at_once: int = 1,
    ) -> ForwardSession:
        """Raises TooLarge before anything is allocated; else as the engine's own."""
        needed = forward_memory(
            spec,
            kept_counts(sub_model.masks),
            batch_size=batch_size,
            frozen=sub_model.frozen,
            sparse=self._engine.arithmetic == "sparse",
            directions_at_once=directions_at_once,
        ).peak_bytes
        free = self._limit_bytes - (resident_bytes() - self._planned_bytes)
        check_fits(needed, free, self._limit_bytes, "a forward pass")
        session = self._engine.open_forward(
            spec,
            params,
            sub_model,
            batch_size=batch_size,
            loss=loss,
            directions_at_once=directions_at_once,
        )
        self._planned_bytes = needed
        return session


class _Guarded:
    """A session whose Σ g² are allocated only if they fit; all else is the session's own."""

    def __init__(self, session: Session, important_bytes: int, free_bytes: int, limit_bytes: int):
        self._session = session
        self._important_bytes = important_bytes
        self._free_bytes = free_bytes
        self._limit_bytes = limit_bytes

    def step(self, x: np.ndarray, y: np.ndarray, *, importance: bool = False) -> float:
        self._check_squares(importance)
        return self._session.step(x, y, importance=importance)

    def descend(
        self, output_gradients: Mapping[str, np.ndarray], *, importance: bool = False
    ) -> None:
        self._check_squares(importance)
        self._session.descend(output_gradients, importance=importance)

    def _check_squares(self, asked: bool) -> None:
        if asked:
            what = "a training step with Σ g² of all coordinates"
            check_fits(self._important_bytes, self._free_bytes, self._limit_bytes, what)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


def check_fits(needed_bytes: int, free_bytes: int, limit_bytes: int, what: str) -> None:
    """Raises TooLarge naming both numbers."""
    if needed_bytes > free_bytes:
        raise TooLarge(
            f"{what} needs {needed_bytes / 1e6:.1f} MB, {max(0, free_bytes) / 1e6:.1f} MB are free "
            f"under the limit of {limit_bytes / 1e6:.0f} MB: raise --memory-limit, or train a "
            "smaller model, batch or density"
        )


def resident_bytes() -> int:
    """Memory of this process now (Linux), or its peak (elsewhere)."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
