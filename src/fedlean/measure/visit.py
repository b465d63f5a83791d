"""Timing one sub-model in one session of the engine: a round, single steps, inference.

Of a visit's tries the fastest counts, since other processes only ever add time; the survey takes
the median over visits, which lie far apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from fedlean.core import SubModel, generator
from fedlean.engine.protocol import SGD, Engine, Session
from fedlean.measure.cases import Case, draw
from fedlean.spec import ModelSpec
from fedlean.tree import kept_counts

# So small that weights stay where they are however often a step runs: fading gradients would slow
# the arithmetic down (denormal numbers), exploding ones would end it.
OPTIMIZER = SGD(lr=1e-5)
TRIES, LEAST_SECONDS, MOST_SECONDS = 3, 0.05, 1.0  # of one operation, in one visit
Clock = Callable[[], float]  # seconds


@dataclass(frozen=True)
class Setting:
    """A round: `local_steps` steps of `batch_size` examples."""

    batch_size: int
    local_steps: int


@dataclass(frozen=True)
class Visit:
    """Seconds of one sub-model, measured once."""

    kept: Mapping[str, int]  # weights of every masked tensor; empty: the dense model
    round: float  # opening with packed values and masks, all steps, reading the values back
    session: float  # of that, what is not its steps at their usual pace
    new_masks: float  # what the first round with these masks took longer than the next
    step: float
    forward: float  # of one batch
    importance: float | None  # of a step that also sums g² of all coordinates


def visit(
    engine: Engine,
    spec: ModelSpec,
    case: Case,
    setting: Setting,
    clock: Clock,
    *,
    importance: bool = False,
) -> Visit:
    """Times `case`; nothing of it is left when this returns but what the engine keeps itself."""
    params, masks = draw(spec, case)
    kept = kept_counts(masks)
    x, y = _batch(spec, setting.batch_size)

    def round() -> tuple[Session, float, float]:
        """The session, the seconds of the round, and of its steps after the first."""
        began = clock()
        session = engine.open(
            spec, params, SubModel(masks=masks), batch_size=setting.batch_size, optimizer=OPTIMIZER
        )
        session.step(x, y)
        warm = clock()
        for _ in range(setting.local_steps - 1):
            session.step(x, y)
        warm = clock() - warm
        session.params(packed=True)
        return session, clock() - began, warm

    session, first, _ = round()  # rounds with the masks of the round before follow
    rounds: list[tuple[float, float]] = []
    start = clock()
    while _again(len(rounds), clock() - start):
        session = None  # the last one goes first: a device has no room for two
        session, whole, warm = round()
        rounds.append((whole, warm))
    params, masks = {}, {}  # freed
    assert session is not None

    def seconds(call: Callable[[Session], object]) -> float:
        return _seconds(lambda: call(session), clock)

    step = seconds(lambda s: s.step(x, y))
    least = min(whole for whole, _ in rounds)
    return Visit(
        kept,
        least,
        max(0.0, min(whole - warm for whole, warm in rounds) - step),
        max(0.0, first - least),
        step,
        seconds(lambda s: s.forward(x)),
        seconds(lambda s: s.step(x, y, importance=True)) if importance else None,
    )


def _again(tries: int, spent: float) -> bool:
    """Whether another try is worth it; a long one is disturbed less."""
    return tries == 0 or spent < LEAST_SECONDS or (tries < TRIES and spent < MOST_SECONDS)


def _seconds(call: Callable[[], object], clock: Clock) -> float:
    """Of the fastest call; the first only fills the caches."""
    call()
    times: list[float] = []
    first = clock()
    while _again(len(times), clock() - first):
        began = clock()
        call()
        times.append(clock() - began)
    return min(times)


def _batch(spec: ModelSpec, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    rng = generator(0, 0, 0, "profile/batch")
    x = rng.random((batch_size, *spec.input_shape), dtype=np.float32)
    return x, rng.integers(0, spec.output_shape[0], batch_size)
