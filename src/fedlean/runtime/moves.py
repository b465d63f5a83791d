"""How far clients move the model, and the bound on it that follows from what their peers do.

One update that is finite may still undo a model.  What honest clients do is known from their own
company: an update that moves the model by more than FACTOR times the median is refused.  The rule
and its numbers are ours; docs/untrusted-clients.md has what honest runs of every method need.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from statistics import median_low
from typing import NamedTuple

import numpy as np

from fedlean.core import ClientTask, ClientUpdate, StatisticForm
from fedlean.tree import unpack

FACTOR = 50.0  # times the median, of a move
STATISTIC_FACTOR = 100.0  # the same of statistics: what one has learnt, another has not
# Of the norm of what was asked with: less is always taken.  Where most clients have learnt what
# there is to learn, the median is next to nothing, and one with something new is no rogue.
SMALL = 0.1
LEAST = 3  # clients from which a median says something: of two, either may be the wrong one
KEPT = 8  # of the last moves, at least; and those of the last KEPT_COHORTS cohorts
KEPT_COHORTS = 2
KEPT_ALIKE = 64  # of the last clients that trained the same model
MODELS = 64  # of the last kinds of moves of different models
MODEL, BUFFERS = "model", "running statistics"
_OF = " of "
MaxNorm = float | None  # the user's bound, 0: none; None: it follows from the cohort


class Move(NamedTuple):
    """Euclidean norms of (values sent - values asked with) and of the values asked with."""

    far: float
    asked: float = 0.0
    spec_hash: str = ""  # of the model that it is of, where clients train different ones


# MODEL: over the tensors that gradients move; BUFFERS: over running means and variances, which are
# on a scale of their own; else a statistic by its name, of sums of squares the root.
Moved = Mapping[str, Move]


@dataclass(frozen=True)
class Bound:
    """Largest moves that are taken, by kind.  `given`: the user's, of all tensors together.

    of_alike: by kind and model, where clients that hold it set each other a bound.
    """

    most: Mapping[str, float] = field(default_factory=dict)
    given: float = inf
    of_alike: Mapping[str, float] = field(default_factory=dict)

    def limit(self, kind: str, move: Move) -> float:
        """What this move is held to: the bound of all, or of those with the same model if larger.

        A slice moves as slices of its width do, and running statistics lie where they do.
        """
        return max(self.most.get(kind, inf), self.of_alike.get(_alike(kind, move), 0.0))

    def exceeded(self, moved: Moved) -> str | None:
        """Why a move is too large, if it is."""
        far = math.hypot(*(moved[kind].far for kind in (MODEL, BUFFERS) if kind in moved))
        if far > self.given:
            return f"moved the model by {far:.3g}, the bound is {self.given:g}"
        for kind, move in moved.items():
            most = self.limit(kind, move)
            if move.far > max(most, SMALL * move.asked):
                known = kind in (MODEL, BUFFERS)
                what = f"moved the {kind} by" if known else f"sent the statistic {kind} of norm"
                times = factor(kind)
                return (
                    f"{what} {move.far:.3g}, more than {times:g} times the median of the clients,"
                    f" which is {most / times:.3g}"
                )
        return None


@dataclass(frozen=True)
class Moves:
    """The last moves of a phase, refused ones included: a jump of all clients is none of one.

    Part of the checkpoint.  Another phase trains another model, or for another time.
    """

    phase: str = ""
    last: Mapping[str, tuple[tuple[int, float], ...]] = field(default_factory=dict)
    # The last move of each client that trained a model, by `_alike`, of at most MODELS of them.
    alike: Mapping[str, tuple[tuple[int, float], ...]] = field(default_factory=dict)

    def bound(self, max_norm: MaxNorm, phase: str) -> Bound:
        if max_norm is not None:
            return Bound(given=max_norm or inf)
        if phase != self.phase:
            return Bound()
        most = {kind: _bound(kind, moves) for kind, moves in self.last.items()}
        of_alike = {key: _bound(key.rpartition(_OF)[0], moves) for key, moves in self.alike.items()}
        # what says nothing lifts no bound
        return Bound(most, of_alike={key: one for key, one in of_alike.items() if one < inf})

    def suffice(self, phase: str, statistics: Collection[str]) -> bool:
        """Whether they give a bound for updates of this phase with these statistics."""
        return phase == self.phase and all(
            _clients(self.last.get(kind, ())) >= LEAST for kind in (MODEL, *statistics)
        )

    def after(self, phase: str, moved: Mapping[int, Moved]) -> Moves:
        """With those of one more round, by client."""
        last = dict(self.last) if phase == self.phase else {}
        for kind in {kind for each in moved.values() for kind in each}:
            new = [(client, each[kind].far) for client, each in moved.items() if kind in each]
            last[kind] = (*last.get(kind, ()), *new)[-max(KEPT, KEPT_COHORTS * len(new)) :]
        return Moves(phase, last, self._alike_after(phase, moved))

    def _alike_after(
        self, phase: str, moved: Mapping[int, Moved]
    ) -> dict[str, tuple[tuple[int, float], ...]]:
        """One move a client, so that nobody outweighs the others by taking part more often."""
        found = dict(self.alike) if phase == self.phase else {}
        for client, moves in moved.items():
            for kind, move in moves.items():
                if move.spec_hash:
                    key = _alike(kind, move)
                    others = [one for one in found.pop(key, ()) if one[0] != client]
                    found[key] = (*others, (client, move.far))[-KEPT_ALIKE:]
        return dict([*found.items()][-MODELS:])


def _alike(kind: str, move: Move) -> str:
    return f"{kind}{_OF}{move.spec_hash}"


def _clients(moves: Sequence[tuple[int, float]]) -> int:
    return len({client for client, _ in moves})


def factor(kind: str) -> float:
    """How many times the median a move of this kind may be."""
    return FACTOR if kind in (MODEL, BUFFERS) else STATISTIC_FACTOR


def _bound(kind: str, moves: Sequence[tuple[int, float]]) -> float:
    """Infinite where they are of too few clients; a median of 0 says nothing."""
    if _clients(moves) < LEAST:
        return inf
    return factor(kind) * median_low(far for _, far in moves) or inf


def moved(update: ClientUpdate, task: ClientTask, forms: Mapping[str, StatisticForm]) -> Moved:
    """Of an update that is otherwise sound.  Where the task carried no values, its values count 0.

    forms: of the statistics that it holds.
    """
    far, asked_with = {MODEL: 0.0, BUFFERS: 0.0}, {MODEL: 0.0, BUFFERS: 0.0}
    for name, sent in update.params.items():
        asked = task.params.get(name)
        if asked is None or name in task.sub_model.frozen:
            continue
        if sent.shape != asked.shape:  # one is packed, each by a mask of its own
            sent = _dense(sent, update.sub_model.masks.get(name))
            asked = _dense(asked, task.sub_model.masks.get(name))
        kind = MODEL if name in task.spec.param_shapes else BUFFERS
        far[kind] += square(sent - asked)
        asked_with[kind] += square(asked)
    spec = task.spec.hash
    moves = {kind: Move(far[kind] ** 0.5, asked_with[kind] ** 0.5, spec) for kind in far}
    for key, form in forms.items():
        norm = sum(square(values) for values in update.statistics[key].tensors.values()) ** 0.5
        moves[key] = Move(norm**0.5 if form.non_negative else norm, spec_hash=spec)
    return moves


def _dense(values: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    return values if mask is None else unpack(values, mask)


def square(values: np.ndarray) -> float:
    """Of their Euclidean norm; summed in float64 only where float32 does not hold it."""
    flat = values.reshape(-1)
    with np.errstate(over="ignore"):
        inner = float(np.dot(flat, flat))
    return inner if math.isfinite(inner) else float(np.sum(np.square(flat, dtype=np.float64)))
