"""What a merge made of the state is looked at before it counts.

Updates that are sound one by one may still give a model that is none: a sum may overflow, a step of
the server's may amplify.  Such a state is not kept, and no checkpoint is ever written of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from statistics import median_low
from typing import Any

import numpy as np

from fedlean.algorithm import State
from fedlean.runtime.moves import BUFFERS, MODEL, Moved, factor, square

GROWTH = 100.0  # by which one step may multiply the norm of a model, plus 1: ours, generous
BUFFER_GROWTH = 1e4  # the same of running statistics, which begin anywhere
_BUFFERS = (".running_mean", ".running_var")  # as the tensors of a norm are called


def fault(before: State, after: State) -> str | None:
    """Why the state after a step must not count, if so."""
    for field in fields(after):  # type: ignore[arg-type]  # a State is a dataclass
        kept, new = (getattr(state, field.name) for state in (before, after))
        if name := _not_finite(kept, new, field.name):
            return f"{name} of the merged state is not finite"
    norms = [_norms(state) for state in (before, after)]
    for what, most in ((MODEL, GROWTH), (BUFFERS, BUFFER_GROWTH)):
        old, new = (each[what] for each in norms)
        if new > most * (old + 1):
            return f"the merged {what} grew from a norm of {old:.3g} to {new:.3g}"
    return None


def not_finite(state: State) -> str | None:
    """The first number or array of a state with a value that is not."""
    values = ((field.name, getattr(state, field.name)) for field in fields(state))  # type: ignore[arg-type]
    return next((name for key, value in values if (name := _not_finite(None, value, key))), None)


def _not_finite(before: Any, after: Any, name: str) -> str | None:
    """The first number or array with such a value; what a step has not touched is as it was."""
    if after is before:
        return None
    if isinstance(after, float):
        return None if math.isfinite(after) else name
    if isinstance(after, np.ndarray):
        return name if after.dtype.kind == "f" and not np.isfinite(after).all() else None
    if isinstance(after, Mapping):
        old = before if isinstance(before, Mapping) else {}
        found = (_not_finite(old.get(key), value, f"{name}.{key}") for key, value in after.items())
    elif isinstance(after, tuple | list):
        found = (_not_finite(None, value, f"{name}[{at}]") for at, value in enumerate(after))
    else:
        return None
    return next((each for each in found if each), None)


def _norms(state: State) -> dict[str, float]:
    """Of all that clients train: the model, and beside it what exists in some stages only."""
    squares = {MODEL: 0.0, BUFFERS: 0.0}
    for name, value in (*state.params.items(), *getattr(state, "extra", {}).items()):
        kind = BUFFERS if name.endswith(_BUFFERS) else MODEL
        squares[kind] += square(value)
    return {kind: math.sqrt(total) for kind, total in squares.items()}


def suspects(moved: Mapping[int, Moved]) -> list[int]:
    """Of the clients in a merge that went wrong, those who may have spoilt it.

    Whose own move is beyond reason; or who sent far more than the others; or, where no one stands
    out, everybody: then training diverges, or the server's step does.
    """
    wild = [
        client
        for client, moves in moved.items()
        if moves[MODEL].far > GROWTH * (moves[MODEL].asked + 1)
    ]
    if wild:
        return wild
    sizes = {client: _sizes(moves) for client, moves in moved.items()}
    usual = {
        kind: median_low(one[kind] for one in sizes.values() if kind in one)
        for kind in {kind for one in sizes.values() for kind in one}
    }
    apart = [
        client
        for client, one in sizes.items()
        if any(far > factor(kind) * usual[kind] for kind, far in one.items())
    ]
    return apart or list(moved)


def _sizes(moved: Moved) -> dict[str, float]:
    """How much of an update there is: its move, and each of its statistics.

    A client that moves the model as the others do may still send the statistic that spoils it.
    """
    statistics = {kind: one.far for kind, one in moved.items() if kind not in (MODEL, BUFFERS)}
    return {MODEL: moved[MODEL].far + moved[BUFFERS].far, **statistics}
