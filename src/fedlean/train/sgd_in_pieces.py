"""Local SGD whose steps sum g² a piece of the model at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from math import fsum

from fedlean.core import Batches, Params
from fedlean.engine.pieces import Part, Pieces
from fedlean.engine.protocol import Session


def sgd_in_pieces(
    session: Session,
    batches: Batches,
    *,
    parts: Sequence[Part],
    batch_size: int,
    seed: int,
    take: Callable[[Pieces, Params, float], None],
) -> float:
    """One optimiser step for each step of the parts; the mean training loss.

    take(pieces, sums, scale) as soon as a part is over, so that no two are held: g² over its steps,
    and what that is multiplied with to stand for g² over all of them.
    """
    steps = sum(part.steps for part in parts)

    def losses() -> Iterator[float]:
        drawn = batches.draw(steps=steps, batch_size=batch_size, seed=seed)
        for pieces, count in parts:
            for x, y in islice(drawn, count):
                yield session.step(x, y, importance=pieces)
            take(pieces, session.importance(), steps / count)

    return fsum(losses()) / steps if steps else 0.0
