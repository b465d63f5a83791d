"""When PruneFL (arXiv 1909.12326) reconfigures and takes g², and how large the model may be."""

from __future__ import annotations

from dataclasses import dataclass

from fedlean.pruning.budget import density_limit, max_kept
from fedlean.spec import ModelSpec


@dataclass(frozen=True)
class Rounds:
    """`every` 0: never; `importance` 0: g² in all rounds."""

    total: int
    every: int
    importance: int

    def reconfigures(self, round: int) -> bool:
        """Not after the last round: nothing would train what comes of it."""
        return bool(self.every) and round % self.every == 0 and round < self.total

    def takes_importance(self, round: int) -> bool:
        """In the last rounds before a reconfiguration."""
        if not self.every:
            return False
        ahead = -round % self.every
        return self.reconfigures(round + ahead) and (not self.importance or ahead < self.importance)


@dataclass(frozen=True)
class SizeLimit:
    """D_lim and D_tgt of Sec. VI-E."""

    spec: ModelSpec
    rounds: Rounds
    limit: float | None
    target: float | None

    def kept(self, round: int) -> int | None:
        """Kept weights allowed from the end of `round` until the next reconfiguration."""
        if self.limit is None:
            return None
        total = self.rounds.total
        target = self.limit if self.target is None else self.target
        until = min(total, round + (self.rounds.every or total))
        ends = (density_limit(r, total, self.limit, target) for r in (round, until))
        return max_kept(min(ends), self.spec.param_shapes, self.spec.prunable)
