"""A memory limit that is enforced before a session allocates.

The engine's plan is exact and known beforehand, so a task that does not fit is refused with both
numbers instead of the device being killed in the middle of it.  Counted are all open sessions with
all that they were asked for so far; a session that nobody holds gives its bytes back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np

from fedlean.core import Params, SubModel
from fedlean.engine import checks
from fedlean.engine.protocol import SGD, Engine, ForwardSession, Loss, Session
from fedlean.runtime.remote.needs import ForwardNeeds, StepNeeds, forward_needs, step_needs
from fedlean.runtime.remote.room import Room, check_fits
from fedlean.spec import ModelSpec


class LimitedEngine:
    """`engine` on a device whose process may hold `limit_bytes` in all."""

    def __init__(self, engine: Engine, limit_bytes: int):
        self._engine = engine
        self._room = Room(engine, limit_bytes)
        self.name = engine.name
        self.arithmetic: Literal["masked", "sparse"] = engine.arithmetic
        self.instruction_set = engine.instruction_set

    @property
    def granted_bytes(self) -> int:
        """What all open sessions may hold."""
        return self._room.granted_bytes

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
        checks.check_settings(batch_size, loss)
        needs = step_needs(self._engine, spec, sub_model, batch_size, optimizer)
        self._room.check(needs.step_bytes, "a training step")
        session = self._engine.open(
            spec, params, sub_model, batch_size=batch_size, optimizer=optimizer, loss=loss
        )
        return _Guarded(session, needs, self._room)  # type: ignore[return-value]

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
        """Raises TooLarge before anything is allocated; else as the engine's own.

        Where so many directions at once do not fit, it is as many as do: that takes longer, and
        gives the same.
        """
        checks.check_settings(batch_size, loss)
        checks.check_directions_at_once(directions_at_once)
        free = self._room.free_bytes()
        needs_of = partial(forward_needs, self._engine, spec, sub_model, batch_size)
        at_once = min(directions_at_once, getattr(self._engine, "threads", 1))
        while (needs := needs_of(at_once)).loss_bytes > free and at_once > 1:
            at_once -= 1
        check_fits(needs.loss_bytes, free, self._room.limit_bytes, "a forward pass")
        session = self._engine.open_forward(
            spec,
            params,
            sub_model,
            batch_size=batch_size,
            loss=loss,
            directions_at_once=at_once,
        )
        return _GuardedForward(session, needs, self._room)  # type: ignore[return-value]


class _Guarded:
    """A session that allocates what comes beyond a step only if it fits.

    What was granted once stays granted: the engine keeps most of it, and a loop asks for it again.
    """

    def __init__(self, session: Session, needs: StepNeeds, room: Room):
        self._session = session
        self._needs = needs
        self._room = room
        self._squares = 0  # bytes of each kind that were granted
        self._arena = needs.arena_bytes
        self._returned = 0
        room.grant(self, needs.step_bytes)

    def step(self, x: np.ndarray, y: np.ndarray, *, importance: bool = False) -> float:
        if importance:
            self._hold_squares(self._needs.importance_arena_bytes)
        return self._session.step(x, y, importance=importance)

    def descend(
        self, output_gradients: Mapping[str, np.ndarray], *, importance: bool = False
    ) -> None:
        if importance:
            self._hold_squares(0)
        self._session.descend(output_gradients, importance=importance)

    def forward(
        self, x: np.ndarray, *, taps: Sequence[str] = (), training: bool = False
    ) -> Mapping[str, np.ndarray]:
        self._hold(
            "a forward pass that a backward may follow" if training else "a forward pass with taps",
            arena=self._needs.forward_arena_bytes(_examples(x), taps, training),
        )
        return self._session.forward(x, taps=taps, training=training)

    def backward(
        self, output_gradients: Mapping[str, np.ndarray], *, dense: bool = False
    ) -> Params:
        self._hold("a backward pass", returned=self._needs.backward_bytes(dense))
        return self._session.backward(output_gradients, dense=dense)

    def apply(self, gradients: Params) -> None:
        self._hold("an optimiser step", returned=self._needs.gradient_bytes)
        self._session.apply(gradients)

    def _hold_squares(self, arena: int) -> None:
        what = "a training step with Σ g² of all coordinates"
        self._hold(what, squares=self._needs.square_bytes, arena=arena)

    def _hold(self, what: str, *, squares: int = 0, arena: int = 0, returned: int = 0) -> None:
        """Raises TooLarge where the session cannot hold so much beside what it was granted."""
        asked = (
            max(self._squares, squares),
            max(self._arena, arena),
            max(self._returned, returned),
        )
        if asked == (self._squares, self._arena, self._returned):
            return
        needed = self._needs.stored_bytes + sum(asked)
        self._room.check(needed, what, self)
        self._room.grant(self, needed)
        self._squares, self._arena, self._returned = asked

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


class _GuardedForward:
    """The same of a session that only runs forward."""

    def __init__(self, session: ForwardSession, needs: ForwardNeeds, room: Room):
        self._session = session
        self._needs = needs
        self._room = room
        self._granted = needs.loss_bytes
        room.grant(self, self._granted)

    def forward(self, x: np.ndarray, *, taps: Sequence[str] = ()) -> Mapping[str, np.ndarray]:
        needed = self._needs.forward_bytes(_examples(x), taps)
        if needed > self._granted:
            self._room.check(needed, "a forward pass with taps", self)
            self._room.grant(self, needed)
            self._granted = needed
        return self._session.forward(x, taps=taps)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


def _examples(x: np.ndarray) -> int:
    """What is no batch is refused by the engine, which says why."""
    return len(x) if isinstance(x, np.ndarray) and x.ndim else 1
