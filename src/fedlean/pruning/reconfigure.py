"""One reconfiguration of PruneFL (arXiv 1909.12326, Sec. IV): P, the maximum of Γ, the weights.

A client (initial pruning) and the server (further pruning) run the same code; `to_hparams` and
`from_hparams` carry its settings in a task.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from fedlean.core import Masks, Params, Scalar, generator
from fedlean.cost.price import round_seconds
from fedlean.cost.profile import Profile, from_document
from fedlean.cost.time import linear_round_time
from fedlean.pruning.empirical_risk import maximise_linear
from fedlean.pruning.general_time import maximise_general
from fedlean.pruning.prunable_set import removable
from fedlean.pruning.regrow import apply_masks
from fedlean.pruning.units import protect_units
from fedlean.spec import ModelSpec


@dataclass(frozen=True)
class Pruner:
    """Settings of a reconfiguration; the time model is that of a round on `profile`."""

    time_model: str
    profile: Profile
    batch_size: int
    local_steps: int
    fraction: float  # φ_r
    limit: int | None  # kept weights allowed
    readd_scale: float

    def reconfigure(
        self,
        spec: ModelSpec,
        params: Params,
        masks: Masks,
        importance: Params,
        seed: int,
        *,
        known: Masks | None = None,
    ) -> tuple[Params, Masks]:
        """New (params, masks) from importance = Σ g² of every trainable tensor.

        known: by prunable tensor, True where its importance is; None: everywhere.  OURS: what is
        not known, 0 there, keeps its mask.
        """
        candidates = removable(params, masks, self.fraction, spec.prunable)  # P
        if known is not None:  # a pruned coordinate of importance 0 does not come back
            candidates = {
                name: may_go & (known[name] | ~masks[name]) for name, may_go in candidates.items()
            }
        prunable = {name: importance[name] for name in spec.prunable}
        if self.limit is not None:
            candidates = protect_units(prunable, masks, candidates)
        # eq. (6): coordinates that are never pruned add to Δ as well
        fixed = sum(
            float(np.sum(values, dtype=np.float64))
            for name, values in importance.items()
            if name not in prunable
        )
        if self.time_model == "linear":
            time = linear_round_time(
                spec, self.profile, batch_size=self.batch_size, local_steps=self.local_steps
            )
            kept = maximise_linear(
                prunable, candidates, time, fixed_delta=fixed, max_kept=self.limit
            )
        else:

            def seconds(kept: Mapping[str, int]) -> float:
                return round_seconds(
                    spec,
                    kept,
                    self.profile,
                    batch_size=self.batch_size,
                    local_steps=self.local_steps,
                )

            kept = maximise_general(
                prunable, candidates, seconds, fixed_delta=fixed, max_kept=self.limit
            )
        new_params = apply_masks(
            params,
            masks,
            kept,
            scale=self.readd_scale,
            rng_for=lambda name: generator(seed, 0, 0, f"regrow/{name}"),
        )
        return new_params, kept

    def to_hparams(self) -> dict[str, Scalar]:
        """For the initial client; only what it needs beside the SGD settings."""
        device = {
            f"device/{f.name}": getattr(self.profile, f.name)
            for f in fields(Profile)
            if f.type in ("float", "int")
        }
        if not self.profile.dense_way:
            device["device/dense_way"] = False
        if self.profile.measured is not None:
            measured = replace(self.profile.measured, conditions={})  # no business of a client
            device["device/measured"] = json.dumps(asdict(measured))
        return {
            **device,
            "time_model": self.time_model,
            "fraction": self.fraction,
            "limit": -1 if self.limit is None else self.limit,
            "readd_scale": self.readd_scale,
        }

    @staticmethod
    def from_hparams(h: Mapping[str, Scalar]) -> Pruner:
        device: dict[str, Any] = {
            key.removeprefix("device/"): value
            for key, value in h.items()
            if key.startswith("device/")
        }
        if "measured" in device:
            device["measured"] = json.loads(str(device["measured"]))
        return Pruner(
            time_model=str(h["time_model"]),
            profile=from_document({"name": "task", "description": "", "source": "", **device}),
            batch_size=int(h["batch_size"]),
            local_steps=int(h["local_steps"]),
            fraction=float(h["fraction"]),
            limit=None if int(h["limit"]) < 0 else int(h["limit"]),
            readd_scale=float(h["readd_scale"]),
        )
