"""Further pruning of PruneFL (arXiv 1909.12326): its settings, and what the server decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from fedlean.algorithm import Server
from fedlean.core import Masks, Params, Scalar, derive_seed
from fedlean.pruning.budget import fraction_to
from fedlean.pruning.prunable_set import fraction_at
from fedlean.pruning.reconfiguration_rounds import Rounds, SizeLimit
from fedlean.pruning.reconfigure import Pruner
from fedlean.train.hyperparameters import at_least, in_range, one_of
from fedlean.train.local_sgd import LocalSGD
from fedlean.tree import num_kept


@dataclass(frozen=True)
class FurtherPruning:
    """When and how the masks move during training; the same names in every method.

    reconfigure_every: rounds between reconfigurations (paper: 50); 0: no further pruning.
    importance_rounds: rounds before a reconfiguration in which g² accumulates; 0: all (paper).
    importance_multiple: so many times the kept weights of a layer are the sums that go up, the
    largest ones; 0: all (paper).
    importance_dtype: in which the sums go up, "bf16" (two bytes each) or "fp32" (four).
    prunable_fraction: φ, share of a layer's smallest weights that may be dropped at once (paper's
    code: 0.3).
    prunable_half_life_rounds: rounds in which φ halves (paper's code: 10000).
    size_limit, size_target: D_lim and D_tgt of Sec. VI-E, densities in (0, 1]; None: no limit; the
    target defaults to the limit.  The limit acts at reconfigurations, which never drop a unit's
    last weight: far below what the units need it is not reached.  Initial pruning by a client
    approaches it by φ of each layer at a time and, where its passes are over, at once; without
    initial pruning it is exceeded until the first reconfiguration.
    readd_scale: standard deviation of re-added weights over the RMS of the layer's kept ones.
    time_model: "linear", T(M) = c + Σ t_j with Algorithm 2; "device", the device's whole round time
    with its dense fall-back (monotone, not linear) with Algorithm 3.
    """

    reconfigure_every: int = 50
    importance_rounds: int = 1
    importance_multiple: float = 1.5
    importance_dtype: Literal["bf16", "fp32"] = "bf16"
    prunable_fraction: float = 0.3
    prunable_half_life_rounds: float = 10000.0
    size_limit: float | None = None
    size_target: float | None = None
    readd_scale: float = 0.1
    time_model: Literal["linear", "device"] = "linear"

    def check(self, server: Server) -> None:
        """Raises ValueError naming the setting that is out of range."""
        at_least("reconfigure_every", self.reconfigure_every, 0)
        at_least("importance_rounds", self.importance_rounds, 0)
        in_range("prunable_fraction", self.prunable_fraction, 0.0, 1.0)
        in_range(
            "prunable_half_life_rounds", self.prunable_half_life_rounds, 0.0, 1e12, open_low=True
        )
        in_range("readd_scale", self.readd_scale, 0.0, 10.0)
        for name, value in (("size_limit", self.size_limit), ("size_target", self.size_target)):
            if value is not None:
                in_range(name, value, 0.0, 1.0, open_low=True)
        in_range("importance_multiple", self.importance_multiple, 0.0, 1e9)
        one_of("importance_dtype", self.importance_dtype, ("bf16", "fp32"))
        one_of("time_model", self.time_model, ("linear", "device"))


@dataclass(frozen=True)
class Reconfigurations:
    """Those of a run.  Raises ValueError where the settings do not go with the run's.

    budget_bytes: for Σ g² at a client at a time (`Rounds`); 0: all coordinates.
    """

    server: Server
    sgd: LocalSGD
    settings: FurtherPruning
    budget_bytes: int = 0

    def __post_init__(self) -> None:
        self.size  # noqa: B018  (says what is wrong with it)

    @cached_property
    def rounds(self) -> Rounds:
        own = self.settings
        return Rounds(
            *(self.server.spec, self.server.rounds, own.reconfigure_every, own.importance_rounds),
            *(self.sgd.local_steps, self.budget_bytes),
        )

    @cached_property
    def size(self) -> SizeLimit:
        return SizeLimit(self.rounds, self.settings.size_limit, self.settings.size_target)

    def pruner(self, round: int, masks: Masks | None = None) -> Pruner:
        """For the reconfiguration after `round`, of `masks` if it is to reach the limit at once."""
        own, sgd = self.settings, self.sgd
        fraction = fraction_at(
            round, initial=own.prunable_fraction, half_life_rounds=own.prunable_half_life_rounds
        )
        limit = self.size.kept(round)
        if masks and limit is not None:
            fraction = max(fraction, fraction_to(limit, masks))
        steps, profile = sgd.local_steps, self.server.profile
        return Pruner(
            own.time_model, profile, sgd.batch_size, steps, fraction, limit, own.readd_scale
        )

    def hparams(self, round: int, so_far: int) -> dict[str, Scalar]:
        """What the clients of a round are told; so_far: reconfigurations before it."""
        return {
            **self.rounds.orders(round),
            "importance_multiple": self.settings.importance_multiple,
            "importance_dtype": self.settings.importance_dtype,
            "reconfigurations": so_far,
        }

    def after(
        self,
        round: int,
        params: Params,
        masks: Masks,
        importance: Params,
        *,
        known: Masks | None = None,
    ) -> tuple[Params, Masks] | None:
        """(params, masks) after the reconfiguration that follows `round`; None: it changes nothing.

        importance: Σ g² of every trainable tensor; {}: nobody has answered, and w² stands for it
        where the size limit has fallen below the size
        known: as `Pruner.reconfigure` takes it
        """
        due = self.pruner(round, masks)
        if not importance:
            if due.limit is None or num_kept(masks) <= due.limit:
                return None
            importance, known = {n: np.square(params[n]) for n in self.server.spec.prunable}, None
        seed = derive_seed(self.server.seed, round, 0, "prune")
        spec = self.server.spec
        return due.reconfigure(spec, params, masks, importance, seed, known=known)  # (7)


def unused_further(settings: Mapping[str, Any], otherwise: str) -> dict[str, str]:
    """Those of `FurtherPruning` without effect beside the others, and why.

    otherwise: why masks do not move without reconfigurations; "": a client prunes by these settings
    """
    if settings["reconfigure_every"]:
        return {}
    importance = {name for name in settings if name.startswith("importance_")}
    found = dict.fromkeys((*importance, "prunable_half_life_rounds"), "reconfigure_every is 0")
    if otherwise:
        pruning = ("prunable_fraction", "size_limit", "size_target", "readd_scale", "time_model")
        found |= dict.fromkeys(pruning, otherwise)
    return found
