"""Local SGD: the inner loop that the first-order methods share."""

from __future__ import annotations

from math import fsum

from fedlean.core import Batches
from fedlean.engine.protocol import Session


def local_sgd(
    session: Session,
    batches: Batches,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    importance: bool = False,
    examples: int | None = None,
) -> float:
    """`steps` optimiser steps; the mean training loss (0.0 for no steps).

    `importance` adds g² of all coordinates to the session's sums at every step; `examples`
    restricts the data as `Batches.draw` says.
    """
    drawn = batches.draw(steps=steps, batch_size=batch_size, seed=seed, examples=examples)
    # summed as they come: a task may have millions of steps, and a device no memory for a list
    total = fsum(session.step(x, y, importance=importance) for x, y in drawn)
    return total / steps if steps else 0.0
