"""Where the first masks of PruneFL (arXiv 1909.12326) come from: the settings of that.

The paper has one client prune alone (Sec. IV-A).  A foresight criterion in its place is OURS.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fedlean.algorithm import Server
from fedlean.core import Masks, Params, Scalar, derive_seed
from fedlean.pruning.foresight import Scoring, foresight_masks
from fedlean.pruning.global_top import count_at
from fedlean.pruning.rescale import rescale_kept
from fedlean.train.cohort import check_client
from fedlean.train.hyperparameters import at_least, in_range, one_of
from fedlean.tree import apply_mask

Initial = Literal["client", "snip", "synflow", "ntk"]
DENSITY = 0.1  # that a criterion keeps where nothing says it


@dataclass(frozen=True)
class InitialPruning:
    """What the run does before its first round.

    initial_pruning: prune before the first round; False: begin with all weights.
    initial: who says what is pruned.  "client": one client, which prunes alone (the paper).  OURS:
    "snip": the clients, by a gradient at the first model, as `pruning.connection_sensitivity` says.
    "synflow", "ntk": the server, without data, as `pruning.foresight` says.
    initial_density: what a criterion keeps, of all prunable weights together; None: what the size
    limit allows, 0.1 without one.  A client finds its own size.
    initial_rescale: what it keeps grows by 1/√(the kept share of its layer).
    initial_client: the one that prunes alone; it should have examples of all classes, since with
    few it keeps too little.  None: the first that has the memory.
    initial_batches: batches of a pass of it (paper: 10).  Of "snip": of a client's gradient.
    initial_examples: of its examples, from which they are drawn (paper: 200); 0: all it has.
    initial_passes: passes between two initial reconfigurations (paper's code: 50).
    initial_importance_passes: passes before one in which g² accumulates; 0: all (paper).
    initial_stable: initial pruning ends after so many reconfigurations in a row that change the
    size by at most 10% (paper's code: 5).
    initial_max_passes: passes after which it ends whatever happens (1000).
    """

    initial_pruning: bool = True
    initial: Initial = "client"
    initial_density: float | None = None
    initial_rescale: bool = False
    initial_client: int | None = None
    initial_batches: int = 5
    initial_examples: int = 0
    initial_passes: int = 1
    initial_importance_passes: int = 1
    initial_max_passes: int = 1000
    initial_stable: int = 5

    def check(self, server: Server) -> None:
        """Raises ValueError naming the setting that is out of range."""
        one_of("initial", self.initial, get_args(Initial))
        if self.initial_density is not None:
            in_range("initial_density", self.initial_density, 0.0, 1.0, open_low=True)
        if self.initial_client is not None:
            check_client("initial_client", self.initial_client, server)
        at_least("initial_batches", self.initial_batches, 1)
        at_least("initial_examples", self.initial_examples, 0)
        at_least("initial_passes", self.initial_passes, 1)
        at_least("initial_importance_passes", self.initial_importance_passes, 0)
        at_least("initial_max_passes", self.initial_max_passes, 1)
        at_least("initial_stable", self.initial_stable, 1)
        if self.initial_passes > self.initial_max_passes:
            raise ValueError(
                f"initial_passes must be at most initial_max_passes ({self.initial_max_passes}), "
                f"got {self.initial_passes}: nothing would be pruned"
            )

    @property
    def by_criterion(self) -> bool:
        """Whether a criterion chooses the first masks."""
        return self.initial_pruning and self.initial != "client"

    @property
    def phase(self) -> str:
        """In which a run begins that starts from no masks."""
        if not self.initial_pruning:
            return "train"
        return {"client": "initial", "snip": "score"}.get(self.initial, "prune")

    def density(self, server: Server, limit: float | None) -> float:
        """That a criterion keeps, 1 without one; limit: that of the first rounds, or None.

        Raises ValueError where it is above the limit, or keeps no weight.
        """
        if not self.by_criterion:
            return 1.0
        density = self.initial_density
        if density is None:
            density = DENSITY if limit is None else limit
        if limit is not None and density > limit:
            raise ValueError(
                f"initial_density={density:g} is above what the size limit allows until the first "
                f"reconfiguration, {limit:g}: lower it, or raise size_limit"
            )
        try:
            count_at(density, server.spec)
        except ValueError as error:
            raise ValueError(f"initial_density: {error}") from None
        return density

    def pruned(self, params: Params, masks: Masks) -> Params:
        """What the run begins with; params: dense."""
        return (rescale_kept if self.initial_rescale else apply_mask)(params, masks)

    def masks(self, server: Server, params: Params, density: float) -> Masks:
        """By the criterion that needs no client; params: dense."""
        criterion = "synflow" if self.initial == "synflow" else "ntk"
        seed = derive_seed(server.seed, 0, 0, "prune")
        scoring = Scoring(init=server.init)
        masks, _ = foresight_masks(
            server.engine, server.spec, params, density, criterion, scoring, seed
        )
        return masks

    def hparams(self) -> dict[str, Scalar]:
        """What the client is told that prunes alone."""
        return {
            "initial_batches": self.initial_batches,
            "initial_examples": self.initial_examples,
            "initial_passes": self.initial_passes,
            "initial_importance_passes": self.initial_importance_passes or self.initial_passes,
            "initial_max_passes": self.initial_max_passes,
            "initial_stable": self.initial_stable,
        }


def walked_density(settings: Mapping[str, Any]) -> float:
    """At which a rehearsal walks the masks of a criterion: the size limit may be what is sought."""
    density, limit = settings["initial_density"], settings["size_limit"]
    return min(one for one in (density or limit or DENSITY, limit) if one is not None)


_ALONE = ("client", "examples", "passes", "importance_passes", "max_passes", "stable")


def unused_initial(settings: Mapping[str, Any]) -> dict[str, str]:
    """Those of `InitialPruning` without effect beside the others, and why."""
    if not settings["initial_pruning"]:
        found = {name for name in settings if name.startswith("initial")} - {"initial_pruning"}
        return dict.fromkeys(found, "initial_pruning is false")
    initial = settings["initial"]
    if initial == "client":
        why = "initial is 'client', and the client finds its own size (size_limit bounds it)"
        return dict.fromkeys(("initial_density", "initial_rescale"), why)
    found = {f"initial_{name}" for name in _ALONE}
    if initial != "snip":
        found |= {"initial_batches"}
    return dict.fromkeys(found, f"initial is {initial!r}: no client prunes alone")
