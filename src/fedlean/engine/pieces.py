"""Σ g² a piece at a time: which rows of which tensors the importance steps take one after another.

A step holds the sums of its pieces and no more, so a device needs no float for every coordinate.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

from fedlean.engine.native_storage import FLOAT_BYTES
from fedlean.layers import Shape
from fedlean.spec import ModelSpec


class Piece(NamedTuple):
    """Rows [first_row, first_row + rows) of a trainable tensor, along its first axis.

    Those of a weight are its output channels.
    """

    tensor: str
    first_row: int
    rows: int


Pieces = tuple[Piece, ...]  # of one step: at most one of a tensor
Importance = bool | Pieces  # of one step: nothing, all coordinates, or so many


def whole(spec: ModelSpec, frozen: Collection[str] = ()) -> Pieces:
    """All rows of all tensors that are trained."""
    return tuple(
        Piece(name, 0, shape[0]) for name, shape in spec.param_shapes.items() if name not in frozen
    )


def pieces_of(spec: ModelSpec, frozen: Collection[str], importance: Importance) -> Pieces:
    """What a step with `importance` sums.  Raises ValueError naming the piece that is none."""
    if isinstance(importance, bool):
        return whole(spec, frozen) if importance else ()
    pieces = tuple(map(_piece, importance))
    seen = set[str]()
    for name, first, rows in pieces:
        if name not in spec.param_shapes or name in frozen:
            raise ValueError(f"importance names {name!r}, expected a tensor that is trained")
        if name in seen:
            raise ValueError(f"importance names {name!r} twice, expected one piece of a tensor")
        most = spec.param_shapes[name][0]
        if first < 0 or rows < 1 or first + rows > most:
            raise ValueError(
                f"importance names {rows} rows from {first} of {name!r}, which has {most}"
            )
        seen.add(name)
    return pieces


def _piece(given: Any) -> Piece:
    match given:
        case (str(name), int(first), int(rows)):
            return Piece(name, first, rows)
    raise ValueError(f"importance holds {given!r:.60}, expected Piece(tensor, first_row, rows)")


def piece_shape(spec: ModelSpec, piece: Piece) -> Shape:
    return (piece.rows, *spec.param_shapes[piece.tensor][1:])


def sum_bytes(spec: ModelSpec, pieces: Pieces) -> int:
    """A float for every coordinate of the pieces."""
    return FLOAT_BYTES * sum(prod(piece_shape(spec, piece)) for piece in pieces)


def dense_rows(pieces: Pieces) -> dict[str, int]:
    """Rows of each tensor.

    >>> dense_rows((Piece("fc.weight", 8, 4),))
    {'fc.weight': 4}
    """
    return {piece.tensor: piece.rows for piece in pieces}


@lru_cache(maxsize=64)
def sweep(
    spec: ModelSpec, budget_bytes: int, frozen: frozenset[str] = frozenset()
) -> tuple[Pieces, ...]:
    """Cuts all trained tensors, in their order, so that what one step takes fits `budget_bytes`.

    Each takes as many rows as fit.  Raises ValueError where one row does not.

    >>> from fedlean.layers import Linear
    >>> from fedlean.spec import sequential
    >>> for pieces in sweep(sequential((4,), [("fc", Linear(3))]), 40):  # 10 floats
    ...     print(*map(tuple, pieces))
    ('fc.weight', 0, 2)
    ('fc.weight', 2, 1) ('fc.bias', 0, 3)
    """
    done, now, free = list[Pieces](), list[Piece](), budget_bytes
    for name, shape in spec.param_shapes.items():
        if name in frozen:
            continue
        row, first = FLOAT_BYTES * prod(shape[1:]), 0
        if row > budget_bytes:
            raise ValueError(
                f"a budget of {budget_bytes} bytes for sums of g², but one row of {name!r} takes "
                f"{row}: raise it"
            )
        while first < shape[0]:
            rows = min(shape[0] - first, free // row)
            if rows:
                now.append(Piece(name, first, rows))
            first, free = first + rows, free - rows * row
            if first < shape[0]:
                done.append(tuple(now))
                now, free = [], budget_bytes
    return tuple(done) + ((tuple(now),) if now else ())


class Part(NamedTuple):
    """Of a sweep: the importance steps in a row that take the same pieces."""

    pieces: Pieces
    steps: int


def parts_taken(
    spec: ModelSpec,
    steps: int,
    budget_bytes: int,
    first: int,
    frozen: frozenset[str] = frozenset(),
) -> tuple[Part, ...]:
    """What `steps` importance steps take of a sweep from its part `first` on, one part a step.

    budget_bytes: of the sweep; 0: all coordinates at every step.  Where less parts are left than
    steps, each has as many steps as goes evenly.  Raises ValueError as `sweep`, and where there is
    no such part.

    >>> from fedlean.layers import Linear
    >>> from fedlean.spec import sequential
    >>> spec = sequential((4,), [("fc", Linear(3))])
    >>> [part.steps for part in parts_taken(spec, 5, 40, 0)]
    [2, 3]
    """
    if not steps:
        return ()
    if not budget_bytes:
        return (Part(whole(spec, frozen), steps),)
    parts = sweep(spec, budget_bytes, frozen)
    if not 0 <= first < len(parts):
        raise ValueError(f"part {first} of a sweep of {len(parts)} parts")
    parts = parts[first : first + steps]
    ends = [i * steps // len(parts) for i in range(len(parts) + 1)]
    return tuple(Part(part, ends[i + 1] - ends[i]) for i, part in enumerate(parts))
