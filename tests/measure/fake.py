"""An engine that computes nothing: its operations only move a clock on, by known costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedlean.layers import Conv2d, Flatten, Linear
from fedlean.spec import sequential
from fedlean.tree import kept_counts

SPEC = sequential(
    (1, 12, 12),
    [("conv", Conv2d(8, 5)), ("flat", Flatten()), ("fc1", Linear(40)), ("fc2", Linear(10))],
)
SIZES = {"conv.weight": 200, "fc1.weight": 8 * 8 * 8 * 40, "fc2.weight": 400}
# Whole multiples of 2^-20 s, so that sums of them are exact.
TICK = 2.0**-20
STEP = {"conv.weight": 64 * TICK, "fc1.weight": 1 * TICK, "fc2.weight": 3 * TICK}
OPEN = {"conv.weight": 2 * TICK, "fc1.weight": 1 * TICK, "fc2.weight": 1 * TICK}
NEW_MASKS = 500 * TICK
FORWARD = {"conv.weight": 16 * TICK, "fc1.weight": 0 * TICK, "fc2.weight": 1 * TICK}


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Engine:
    """Linear times below half density; a full layer costs three quarters of its line."""

    clock: Clock = field(default_factory=Clock)
    name: str = "fake"
    arithmetic: Any = "sparse"
    instruction_set: str = "none"
    alive: int = 0
    most_alive: int = 0
    opened: list[Mapping[str, int]] = field(default_factory=list)

    def open(self, spec, params, sub_model, *, batch_size, optimizer, loss="ce"):
        kept = kept_counts(sub_model.masks)
        for name, count in kept.items():
            assert params[name].shape == (count,), "masked tensors come packed"
        if not self.opened or self.opened[-1] != kept:
            self.clock.now += NEW_MASKS
        self.opened.append(kept)
        self.clock.now += seconds(OPEN, 100 * TICK, kept)
        return Session(self, kept)


@dataclass
class Session:
    engine: Engine
    kept: Mapping[str, int]
    steps: int = 0

    def __post_init__(self):
        self.engine.alive += 1
        self.engine.most_alive = max(self.engine.most_alive, self.engine.alive)

    def __del__(self):
        self.engine.alive -= 1

    def step(self, x, y, *, importance=False):
        cold = 0 if self.steps else 7 * TICK
        self.steps += 1
        extra = 5000 * TICK if importance else 0
        self.engine.clock.now += seconds(STEP, 1000 * TICK, self.kept) + cold + extra
        return 1.0

    def forward(self, x, *, taps=(), training=False):
        self.engine.clock.now += seconds(FORWARD, 10 * TICK, self.kept)
        return {}

    def params(self, *, packed=False):
        assert packed
        self.engine.clock.now += 3 * TICK
        return {}


def seconds(per_weight: Mapping[str, float], constant: float, kept: Mapping[str, int]) -> float:
    """What an operation costs; without masks every layer is full."""
    total = constant
    for name, size in SIZES.items():
        count = kept.get(name, size)
        total += per_weight[name] * count * (0.75 if count == size else 1.0)
    return total
