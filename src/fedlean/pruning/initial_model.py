"""The model in initial pruning (PruneFL, arXiv 1909.12326, Sec. IV-A), and how far that is.

It stays at that client between tasks, in its client state: `to_state` and `from_state`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from fedlean.core import ClientState, ClientTask, Masks, Params, Scalar, derive_seed
from fedlean.pruning.density import density
from fedlean.pruning.reconfigure import Pruner
from fedlean.tree import num_kept

START_ACCURACY = 1.5  # initial pruning starts at this over the number of classes (authors' code)
STABLE_CHANGE = 0.1  # a reconfiguration that changes the size by at most this share is stable


@dataclass(frozen=True)
class InitialModel:
    """Model and counters."""

    params: Params
    masks: Masks
    importance: Params  # Σ g² since the last reconfiguration; empty: none yet
    passes: int = 0
    since: int = 0  # passes since the last reconfiguration (or since the start)
    stable: int = 0  # reconfigurations in a row that changed the size by at most 10%
    reconfigurations: int = 0
    started: bool = False

    def to_state(self) -> dict[str, np.ndarray]:
        arrays = {
            f"{group}/{name}": value
            for group in ("params", "masks", "importance")
            for name, value in getattr(self, group).items()
        }
        counters = ("passes", "since", "stable", "reconfigurations", "started")
        return arrays | {name: np.array(int(getattr(self, name))) for name in counters}

    @staticmethod
    def from_state(state: ClientState) -> InitialModel | None:
        """None where it was lost."""
        if "passes" not in state:
            return None
        return InitialModel(
            params=_group(state, "params/"),
            masks=_group(state, "masks/"),
            importance=_group(state, "importance/"),
            passes=int(state["passes"]),
            since=int(state["since"]),
            stable=int(state["stable"]),
            reconfigurations=int(state["reconfigurations"]),
            started=bool(state["started"]),
        )

    def after_pass(self, accuracy: float, classes: int) -> InitialModel:
        """`accuracy` on what it trains on; looked at until that is enough to start pruning."""
        if self.started:
            return replace(self, passes=self.passes + 1, since=self.since + 1)
        return replace(self, passes=self.passes + 1, started=accuracy >= START_ACCURACY / classes)

    def with_sums(self, sums: Params) -> InitialModel:
        """With more of Σ g²."""
        if self.importance:
            sums = {name: values + self.importance[name] for name, values in sums.items()}
        return replace(self, importance=sums)

    def due(self, h: Mapping[str, Scalar]) -> bool:
        """Whether a reconfiguration is due; `h`: hyper-parameters of the task."""
        return self.started and self.since >= int(h["initial_passes"])

    def importance_is_due(self, h: Mapping[str, Scalar]) -> bool:
        """Whether the next pass is one of the last before a reconfiguration, which take g²."""
        ahead = int(h["initial_passes"]) - self.since
        return self.started and ahead <= int(h["initial_importance_passes"])

    def stopped(self, h: Mapping[str, Scalar]) -> bool:
        """Whether initial pruning is over: stable, or out of passes."""
        return self.stable >= int(h["initial_stable"]) or self.passes >= int(
            h["initial_max_passes"]
        )

    def exceeds(self, h: Mapping[str, Scalar]) -> bool:
        """Whether it is above the size limit."""
        return 0 <= int(h["limit"]) < num_kept(self.masks)

    def reconfigured(self, task: ClientTask, *, least_fraction: float = 0.0) -> InitialModel:
        """After a reconfiguration with the settings of the task and φ of at least so much."""
        seed = derive_seed(task.seed, self.passes, task.client, "prune")
        pruner = Pruner.from_hparams(task.hparams)
        pruner = replace(pruner, fraction=max(pruner.fraction, least_fraction))
        params, masks = pruner.reconfigure(
            task.spec, self.params, self.masks, self.importance, seed
        )
        before, after = density(self.masks), density(masks)
        change = abs(after - before) / before if before else 0.0
        limit = int(task.hparams["limit"])
        on_its_way = 0 <= limit < num_kept(masks) and after < before  # to the size limit
        return replace(
            self,
            params=params,
            masks=masks,
            importance={},
            since=0,
            stable=self.stable + 1 if change <= STABLE_CHANGE and not on_its_way else 0,
            reconfigurations=self.reconfigurations + 1,
        )


def _group(state: ClientState, prefix: str) -> dict[str, np.ndarray]:
    return {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }
