"""A memory limit that is enforced before a session allocates.

The engine's plan is exact and known beforehand, so a task that does not fit is refused with both
numbers instead of the device being killed in the middle of it.  Counted are all open sessions with
all that they were asked for so far; a session that nobody holds gives its bytes back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from fedlean.core import Params, SubModel
from fedlean.engine import checks
from fedlean.engine.pieces import Importance
from fedlean.engine.protocol import SGD, Engine, ForwardSession, Loss, Session
from fedlean.runtime.remote.needs import ForwardNeeds, StepNeeds, forward_needs, step_needs
from fedlean.runtime.remote.room import Room
from fedlean.spec import ModelSpec


class _Emulated:
    """The engine of an emulated device, whichever it is that computes here."""

    arithmetic: Literal["masked", "sparse"] = "sparse"
    threads = 1


class LimitedEngine:
    """`engine` on a device whose process may hold `limit_bytes` in all.

    emulated: the device is one of a fleet, in this process; `limit_bytes` is what its sessions may
    hold, on the native engine and one thread.  dense_way: it may always compute densely, as in
    `cost.way`, and holds the less of the two.
    """

    def __init__(
        self, engine: Engine, limit_bytes: int, *, emulated: bool = False, dense_way: bool = False
    ):
        self._engine = engine
        self._room = Room(engine, limit_bytes, emulated=emulated)
        self._planned: Any = _Emulated() if emulated else engine
        self._emulated = emulated
        self._dense_way = dense_way
        self.name = engine.name
        self.arithmetic: Literal["masked", "sparse"] = engine.arithmetic
        self.instruction_set = engine.instruction_set

    @property
    def granted_bytes(self) -> int:
        """What all open sessions may hold."""
        return self._room.granted_bytes

    def free_bytes(self) -> int:
        """What a session that is opened now may hold."""
        return self._room.free_bytes()

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
        """Raises TooLarge before anything is allocated; else as the engine's own."""
        checks.check_settings(batch_size, loss)
        ways = tuple(
            _Way(step_needs(self._planned, spec, way, batch_size, optimizer, slower))
            for way in self._ways(sub_model)
        )
        self._room.check(_least(ways), "a training step")
        session = self._engine.open(
            spec,
            params,
            sub_model,
            batch_size=batch_size,
            optimizer=optimizer,
            loss=loss,
            slower=slower,
            seed=seed,
        )
        return _Guarded(session, ways, self._room)  # type: ignore[return-value]

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
        """Raises TooLarge before anything is allocated; else as the engine's own.

        Where so many directions at once do not fit, it is as many as do: that takes longer, and
        gives the same.
        """
        checks.check_settings(batch_size, loss)
        checks.check_directions_at_once(directions_at_once)
        free = self._room.free_bytes()
        at_once = min(directions_at_once, getattr(self._planned, "threads", 1))

        def needs_of(at_once: int) -> ForwardNeeds:
            ways = [
                forward_needs(self._planned, spec, way, batch_size, at_once, slower)
                for way in self._ways(sub_model)
            ]
            return min(ways, key=lambda way: way.loss_bytes)

        while (needs := needs_of(at_once)).loss_bytes > free and at_once > 1:
            at_once -= 1
        self._room.check(needs.loss_bytes, "a forward pass")
        session = self._engine.open_forward(
            spec,
            params,
            sub_model,
            batch_size=batch_size,
            loss=loss,
            # an emulated device has one thread, and this machine may take its time with more
            directions_at_once=directions_at_once if self._emulated else at_once,
            slower=slower,
        )
        return _GuardedForward(session, needs, self._room)  # type: ignore[return-value]

    def _ways(self, sub_model: SubModel) -> Sequence[SubModel]:
        dense = self._dense_way and sub_model.masks
        return (sub_model, replace(sub_model, masks={})) if dense else (sub_model,)


class _Way:
    """Of computing, and the most that its session was granted so far."""

    def __init__(self, needs: StepNeeds):
        self.needs = needs
        self.squares = 0  # bytes of each kind
        self.arena = needs.arena_bytes
        self.returned = 0

    @property
    def total_bytes(self) -> int:
        return self.needs.stored_bytes + self.squares + self.arena + self.returned

    def with_more(self, *, squares: int = 0, arena: int = 0, returned: int = 0) -> _Way:
        way = _Way(self.needs)
        way.squares = max(self.squares, squares)
        way.arena = max(self.arena, arena)
        way.returned = max(self.returned, returned)
        return way

    def summing(self, importance: Importance, *, arena: bool) -> _Way:
        """With the sums, and with the arena of a step that adds to them."""
        squares, most = self.needs.importance_bytes(importance)
        return self.with_more(squares=squares, arena=most if arena else 0)


def _least(ways: Sequence[_Way]) -> int:
    return min(way.total_bytes for way in ways)


class _Guarded:
    """A session that allocates what comes beyond a step only if it fits.

    What was granted once stays granted: the engine keeps most of it, and a loop asks for it again.
    """

    def __init__(self, session: Session, ways: Sequence[_Way], room: Room):
        self._session = session
        self._ways = ways
        self._room = room
        room.grant(self, _least(ways))

    def step(self, x: np.ndarray, y: np.ndarray, *, importance: Importance = False) -> float:
        if importance:
            self._hold(_summing(importance), lambda way: way.summing(importance, arena=True))
        return self._session.step(x, y, importance=importance)

    def descend(
        self, output_gradients: Mapping[str, np.ndarray], *, importance: Importance = False
    ) -> None:
        if importance:
            self._hold(_summing(importance), lambda way: way.summing(importance, arena=False))
        self._session.descend(output_gradients, importance=importance)

    def forward(
        self, x: np.ndarray, *, taps: Sequence[str] = (), training: bool = False
    ) -> Mapping[str, np.ndarray]:
        self._hold(
            "a forward pass that a backward may follow" if training else "a forward pass with taps",
            lambda way: way.with_more(
                arena=way.needs.forward_arena_bytes(_examples(x), taps, training)
            ),
        )
        return self._session.forward(x, taps=taps, training=training)

    def backward(
        self, output_gradients: Mapping[str, np.ndarray], *, dense: bool = False
    ) -> Params:
        self._hold(
            "a backward pass", lambda way: way.with_more(returned=way.needs.backward_bytes(dense))
        )
        return self._session.backward(output_gradients, dense=dense)

    def apply(self, gradients: Params) -> None:
        self._hold(
            "an optimiser step", lambda way: way.with_more(returned=way.needs.gradient_bytes)
        )
        self._session.apply(gradients)

    def _hold(self, what: str, more: Callable[[_Way], _Way]) -> None:
        """Raises TooLarge where the session cannot hold so much beside what it was granted."""
        asked = tuple(more(way) for way in self._ways)
        if all(a.total_bytes == b.total_bytes for a, b in zip(asked, self._ways, strict=True)):
            return
        needed = _least(asked)
        self._room.check(needed, what, self)
        self._room.grant(self, needed)
        self._ways = asked

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


def _summing(importance: Importance) -> str:
    of = "all coordinates" if isinstance(importance, bool) else "a piece of the model"
    return f"a training step with Σ g² of {of}"


def _examples(x: np.ndarray) -> int:
    """What is no batch is refused by the engine, which says why."""
    return len(x) if isinstance(x, np.ndarray) and x.ndim else 1
