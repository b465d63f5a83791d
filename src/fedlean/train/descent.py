"""Local descent on a loss of one's own: the inner loop where the engine does not know the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import fsum

import numpy as np

from fedlean.core import Batches
from fedlean.engine.protocol import Session
from fedlean.train.losses import TapsLoss


def local_descent(
    session: Session,
    batches: Batches,
    loss: TapsLoss,
    *,
    taps: Sequence[str] = (),
    steps: int,
    batch_size: int,
    seed: int,
    beside: Callable[[np.ndarray], Mapping[str, np.ndarray]] | None = None,
    examples: int | None = None,
) -> float:
    """`steps` optimiser steps on `loss(taps, y)`; its mean before each of them (0.0 for no steps).

    taps: layers that the loss reads beside the output, which it always may.  beside: arrays that
    something else makes of the same x, as a teacher its logits; they join the taps under names of
    their own, and no gradient enters there.  `examples` restricts the data as `Batches.draw` says.

    Raises ValueError where a name of `beside` is a tap's, and as `Session.descend`.
    """
    drawn = batches.draw(steps=steps, batch_size=batch_size, seed=seed, examples=examples)
    total = fsum(_step(session, x, y, loss, taps, beside) for x, y in drawn)
    return total / steps if steps else 0.0


def _step(
    session: Session,
    x: np.ndarray,
    y: np.ndarray,
    loss: TapsLoss,
    taps: Sequence[str],
    beside: Callable[[np.ndarray], Mapping[str, np.ndarray]] | None,
) -> float:
    others = beside(x) if beside else {}  # nothing may run between forward and descend
    values = session.forward(x, taps=taps, training=True)
    if both := sorted(values.keys() & others.keys()):
        raise ValueError(f"{both[0]!r} is the name of a tap and of what comes beside it: rename it")
    value, gradients = loss({**others, **values}, y)
    session.descend(gradients)
    return value
