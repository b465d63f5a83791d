"""When PruneFL (arXiv 1909.12326) reconfigures and takes g², and how large the model may be.

OURS is what of g² each round takes where that is a piece at a time: a sweep goes over the model
once, in as few rounds as there are steps for, and whole sweeps end before a reconfiguration.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil

import numpy as np

from fedlean.core import Params, Scalar
from fedlean.engine.pieces import sweep
from fedlean.pruning.budget import density_limit, max_kept
from fedlean.pruning.importance_pieces import added, joined, statistic_name
from fedlean.spec import ModelSpec
from fedlean.tree import Fold


@dataclass(frozen=True)
class Rounds:
    """`every` 0: never; `importance` 0: g² in all rounds.

    budget_bytes: of a sweep's parts; 0: all at once.  Raises ValueError where one row takes more,
    or a sweep takes longer than there is from one reconfiguration to the next.
    """

    spec: ModelSpec
    total: int
    every: int
    importance: int
    local_steps: int
    budget_bytes: int = 0

    def __post_init__(self) -> None:
        if self.every and self.sweep_rounds > self.every:
            raise ValueError(
                f"importance_budget_bytes cuts the model into {self.parts} parts, one a step: they "
                f"take {self.sweep_rounds} rounds of {self.local_steps} steps, but "
                f"reconfigure_every is {self.every}: raise one of them"
            )

    @cached_property
    def parts(self) -> int:
        """Of a sweep."""
        try:
            return len(sweep(self.spec, self.budget_bytes)) if self.budget_bytes else 1
        except ValueError as error:
            raise ValueError(f"importance_budget_bytes: {error}") from None

    @property
    def sweep_rounds(self) -> int:
        """Rounds that go over the model once."""
        return ceil(self.parts / self.local_steps)

    @property
    def last(self) -> int:
        """Rounds before a reconfiguration that take g²."""
        most = min(self.importance or self.every, self.every)
        return max(1, most // self.sweep_rounds) * self.sweep_rounds

    def reconfigures(self, round: int) -> bool:
        """Not after the last round: nothing would train what comes of it."""
        return bool(self.every) and round % self.every == 0 and round < self.total

    def takes_importance(self, round: int) -> bool:
        """In the last rounds before a reconfiguration."""
        if not self.every:
            return False
        ahead = -round % self.every
        return self.reconfigures(round + ahead) and ahead < self.last

    def first_part(self, round: int) -> int:
        """Of a sweep, that such a round takes."""
        ahead = -round % self.every
        return (self.last - 1 - ahead) % self.sweep_rounds * self.local_steps

    def orders(self, round: int) -> dict[str, Scalar]:
        """Hyper-parameters of a round's tasks."""
        takes, pieces = self.takes_importance(round), dict[str, Scalar]()
        if takes and self.budget_bytes:
            pieces = {"piece_bytes": self.budget_bytes, "first_piece": self.first_part(round)}
        upload = self.reconfigures(round)
        return {"importance": takes, "upload_importance": upload, **pieces}

    def collected(self, round: int, so_far: Params, merged: Fold) -> dict[str, np.ndarray]:
        """Sums by piece, with those of this round."""
        if not self.budget_bytes or not self.takes_importance(round):
            return dict(so_far)
        return added(so_far, merged.statistic(statistic_name(self.first_part(round))))

    def whole(self, collected: Params, merged: Fold) -> Params:
        """Σ g² by tensor at a reconfiguration; {} where nobody has answered to a part of it."""
        if not self.budget_bytes:
            return merged.statistic("importance")
        return joined(self.spec, collected, self.budget_bytes)


@dataclass(frozen=True)
class SizeLimit:
    """D_lim and D_tgt of Sec. VI-E, in (0, 1]; None: no limit, and a target as the limit."""

    rounds: Rounds
    limit: float | None
    target: float | None

    def __post_init__(self) -> None:
        if self.limit is None and self.target is not None:
            raise ValueError("size_target needs a size_limit to start from, got none")

    def density(self, round: int) -> float | None:
        """That is allowed from the end of `round` until the next reconfiguration; None: any."""
        if self.limit is None:
            return None
        total = self.rounds.total
        target = self.limit if self.target is None else self.target
        until = min(total, round + (self.rounds.every or total))
        return min(density_limit(r, total, self.limit, target) for r in (round, until))

    def kept(self, round: int) -> int | None:
        """The same as kept weights."""
        density, spec = self.density(round), self.rounds.spec
        return None if density is None else max_kept(density, spec.param_shapes, spec.prunable)
