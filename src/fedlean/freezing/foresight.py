"""Stages trained under masks: the server prunes the model before the first of them.

The masks are those of `pruning.foresight`: they follow from the model's first weights and need no
data, so that no client takes part.  They stay as they are, and a stage holds those of its tensors,
frozen ones among them.  Nobody has published progressive training of a pruned model: it is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from fedlean.algorithm import Device, FederatedAlgorithm, Server
from fedlean.core import ClientTask, ClientUpdate, Masks, Model, Params, derive_seed
from fedlean.pruning.foresight import Criterion, Scoring, foresight_masks
from fedlean.pruning.global_top import count_at
from fedlean.submodels.parts import Part
from fedlean.train.hyperparameters import at_least, in_range, one_of
from fedlean.tree import apply_mask, read_only

PRUNE = "prune"  # the phase before the first round
WALKED_STEPS = 3  # of a plan, where the whole schedule would take a minute for ResNet-18


@dataclass(frozen=True)
class Foresight:
    """Settings of pruning before the first stage; the same names in every method.

    density: kept share of all prunable weights of the model together; 1: no pruning.  Output
    modules, which the model does not have, stay dense.
    criterion: by which the server prunes, see `pruning.foresight.foresight_masks`.
    prune_steps: of the density schedule, of criteria that prune in steps (SynFlow: 100).
    """

    density: float = 1.0
    criterion: Criterion = "synflow"
    prune_steps: int = 100

    def check(self, server: Server) -> None:
        """Raises ValueError naming the setting that is out of range, or keeps no weight."""
        in_range("density", self.density, 0.0, 1.0, open_low=True)
        count_at(self.density, server.spec)
        one_of("criterion", self.criterion, get_args(Criterion))
        at_least("prune_steps", self.prune_steps, 1)

    def ahead_of(
        self, algorithm: FederatedAlgorithm, server: Server, parts: Sequence[Part]
    ) -> FederatedAlgorithm:
        """`algorithm` after a step in which the server alone prunes the model.

        Its `init` must take a model with masks, and its states have `params` and `masks` of the
        whole model.  With a density of 1 it is `algorithm` itself.

        A run that starts from a model with masks, or whose criterion leaves a part without weights,
        raises ValueError with the remedy.
        """
        if self.density == 1.0:
            return algorithm

        def init(model: Model) -> Any:
            if model.masks:
                raise ValueError(
                    "the model to start from has masks, and density asks for others: leave density "
                    "at 1 to train under those that it has, or start from a dense model"
                )
            return replace(algorithm.init(model), phase=PRUNE)

        def configure(state: Any, devices: Sequence[Device]) -> list[ClientTask]:
            return [] if state.phase == PRUNE else algorithm.configure(state, devices)

        def server_update(state: Any, updates: Iterable[ClientUpdate]) -> Any:
            if state.phase != PRUNE:
                return algorithm.server_update(state, updates)
            return algorithm.init(self._pruned(server, state.params, parts))

        def done(state: Any) -> bool:
            return state.phase != PRUNE and algorithm.done(state)

        return algorithm._replace(
            init=init, configure=configure, server_update=server_update, done=done
        )

    def _pruned(self, server: Server, params: Params, parts: Sequence[Part]) -> Model:
        masks, _ = foresight_masks(
            server.engine,
            server.spec,
            params,
            self.density,
            self.criterion,
            Scoring(self.prune_steps, init=server.init),
            derive_seed(server.seed, 0, 0, PRUNE),
            synflow_steps=self.prune_steps,
        )
        _check_parts(parts, masks, self.density)
        kept = apply_mask(params, masks)
        read_only({name: kept[name] for name in masks})  # frozen ones are hashed once, then
        return Model(server.spec, kept, masks)


def _check_parts(parts: Sequence[Part], masks: Masks, density: float) -> None:
    """Raises ValueError naming a part of which nothing is left."""
    for part in parts:
        own = [mask for name, mask in masks.items() if name in part.tensors]
        if own and not any(mask.any() for mask in own):
            raise ValueError(
                f"density={density:g} leaves no weight of part {part.name!r}, so that its stage "
                "has nothing to train: take a higher density, or another criterion"
            )


def unused(settings: Mapping[str, Any]) -> dict[str, str]:
    """Of these settings, those without effect beside the others, and why."""
    if settings["density"] == 1.0:
        return dict.fromkeys(("criterion", "prune_steps"), "density is 1: nothing is pruned")
    if settings["criterion"] in ("water_filling", "random", "magnitude"):
        why = f"criterion {settings['criterion']!r} prunes in one step"
        return {"prune_steps": why}
    return {}


def walked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a rehearsal sets of them: fewer steps, which keep as many weights."""
    if settings["density"] == 1.0:
        return {}
    scored = {"node_ntk": "ntk", "node": "ntk"}  # scores that need no forward pass of their own
    criterion = scored.get(settings["criterion"], settings["criterion"])
    return {"prune_steps": min(WALKED_STEPS, settings["prune_steps"]), "criterion": criterion}
