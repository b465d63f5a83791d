"""The time and the steps that a device gives to one task.

A task is given up between two calls of an engine's session or two batches, never inside one:
whatever the method is, its work goes through these, and nothing that is kept is left half written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from fedlean.core import Batches, Params
from fedlean.data.batches import Batch
from fedlean.engine.pieces import Importance
from fedlean.engine.protocol import Engine, ForwardSession, Session

MAX_STEPS = 10**7  # of one draw; no round is that long, and a sum of losses must fit into memory
_DIRECTIONS_AT_ONCE = 64  # between two looks at the clock; the native engine takes as many in a row


class GaveUp(Exception):
    """The time is over before the work is done, or nobody waits for it any more."""


class TooMuch(ValueError):
    """A task orders more than any device will do."""


class Budget:
    """Of one task, from now on.

    deadline_seconds: for which the server still waits; max_seconds: the operator's bound;
    withdrawn: whether the task's run is over, asked often, so it should be quick.
    """

    def __init__(
        self, deadline_seconds: float, max_seconds: float, withdrawn: Callable[[], bool]
    ) -> None:
        self._withdrawn = withdrawn
        self._ends = time.monotonic() + min(deadline_seconds, max_seconds)
        self._why = (
            f"the {max_seconds:g} s of --max-task-seconds are over"
            if max_seconds < deadline_seconds
            else "the server's deadline is over: raise deadline-seconds, or order less work"
        )

    def check(self) -> None:
        """Raises GaveUp."""
        if time.monotonic() >= self._ends:
            raise GaveUp(self._why)
        if self._withdrawn():
            raise GaveUp("the run is over")


class TimedBatches:
    """A client's `batches` within a budget."""

    def __init__(self, batches: Batches, budget: Budget):
        self.num_examples = batches.num_examples
        self._batches, self._budget = batches, budget

    def draw(
        self, *, steps: int, batch_size: int, seed: int, examples: int | None = None
    ) -> Iterator[Batch]:
        """As `Batches.draw`.  Raises TooMuch at once, GaveUp before a batch."""
        if steps > MAX_STEPS:
            raise TooMuch(
                f"the task orders {steps} steps, a device does at most {MAX_STEPS} in a round: "
                "lower the number of local steps"
            )
        drawn = self._batches.draw(steps=steps, batch_size=batch_size, seed=seed, examples=examples)
        return self._timed(drawn)

    def _timed(self, drawn: Iterator[Batch]) -> Iterator[Batch]:
        for batch in drawn:
            self._budget.check()
            yield batch


class TimedEngine:
    """`engine` within a budget: its sessions raise GaveUp instead of computing on."""

    def __init__(self, engine: Engine, budget: Budget):
        self._engine, self._budget = engine, budget
        self.name = engine.name
        self.arithmetic: Literal["masked", "sparse"] = engine.arithmetic
        self.instruction_set = engine.instruction_set

    def open(self, *given: Any, **named: Any) -> Session:
        self._budget.check()
        session = self._engine.open(*given, **named)
        return _TimedSession(session, self._budget)  # type: ignore[return-value]

    def open_forward(self, *given: Any, **named: Any) -> ForwardSession:
        self._budget.check()
        session = self._engine.open_forward(*given, **named)
        return _TimedSession(session, self._budget)  # type: ignore[return-value]


class _TimedSession:
    """Looks at the clock before all that computes; all else is the session's own."""

    def __init__(self, session: Any, budget: Budget):
        self._session, self._budget = session, budget

    def step(self, x: np.ndarray, y: np.ndarray, *, importance: Importance = False) -> float:
        self._budget.check()
        return self._session.step(x, y, importance=importance)

    def forward(self, x: np.ndarray, **named: Any) -> Any:
        self._budget.check()
        return self._session.forward(x, **named)

    def backward(self, output_gradients: Mapping[str, np.ndarray], **named: Any) -> Params:
        self._budget.check()
        return self._session.backward(output_gradients, **named)

    def descend(self, output_gradients: Mapping[str, np.ndarray], **named: Any) -> None:
        self._budget.check()
        self._session.descend(output_gradients, **named)

    def loss(self, x: np.ndarray, y: np.ndarray) -> float:
        self._budget.check()
        return self._session.loss(x, y)

    def losses_perturbed(
        self, x: np.ndarray, y: np.ndarray, *, ks: Sequence[int], **named: Any
    ) -> np.ndarray:
        """In pieces, each loss being of its own direction alone."""
        if len(ks) > MAX_STEPS:
            raise TooMuch(
                f"the task orders {len(ks)} directions, a device does at most {MAX_STEPS} in a "
                "round: lower their number"
            )
        losses = []
        for first in range(0, max(1, len(ks)), _DIRECTIONS_AT_ONCE):
            self._budget.check()
            some = ks[first : first + _DIRECTIONS_AT_ONCE]
            losses.append(self._session.losses_perturbed(x, y, ks=some, **named))
        return np.concatenate(losses)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)
