"""A method with its settings, walked through once for all devices that it treats alike."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from fedlean import wire
from fedlean.algorithm import Device, FederatedAlgorithm, Server
from fedlean.core import ClientTask, Model, Scalar
from fedlean.cost.profile import Profile
from fedlean.models.initialise import init_params
from fedlean.planning.dry import DryBatches, DryEngine
from fedlean.planning.pricing import Splits
from fedlean.planning.walk import Walk, together, walk
from fedlean.pruning.equal_density import keep_largest
from fedlean.runtime.method import build, complete, find_method, hyperparameters
from fedlean.spec import ModelSpec
from fedlean.train.rehearsal import Rehearsal
from fedlean.tree import apply_mask, read_only

Settings = Mapping[str, Scalar | None]
LONG = 1000  # rounds of a run for methods of others that the short one is too short for


@dataclass(frozen=True)
class Walked:
    walk: Walk
    bound: bool  # its figures are the most


@dataclass
class Stage:
    """One model, on which methods are walked through; equal questions are answered once."""

    spec: ModelSpec
    seed: int = 0
    examples: int = 100  # of a client
    splits: Splits = field(default_factory=dict)
    _engine: DryEngine = field(default_factory=DryEngine)
    _models: dict[float | None, Model] = field(default_factory=dict)
    _known: dict[Any, list[Walked]] = field(default_factory=dict)

    def walked(
        self,
        method: str,
        settings: Settings,
        device: Device,
        profile: Profile,
        least_bytes: int | None = None,
    ) -> Walked:
        """`profile` is the server's, what it plans by.  Raises what the method raises.

        least_bytes: memory of the smallest device of a fleet, which is there beside it.
        """
        key = (method, *sorted(settings.items(), key=str), id(profile))
        known = self._known.setdefault(key, [])
        pair = _pair(device, least_bytes)
        for one in known:
            if _treats_alike(one, pair):
                return one
        function = find_method(method)
        module = sys.modules.get(getattr(function, "__module__", None) or "")
        say = getattr(module, "rehearsals", None)
        short: Sequence[Rehearsal] = say(complete(method, settings)) if say else [Rehearsal()]
        walks = [self._walk(method, settings, each, pair, profile) for each in short]
        found = Walked(together(walks), any(each.bound for each in short))
        known.append(found)
        return found

    def prepare(self) -> None:
        """Draws what all methods share, before several threads ask for it."""
        self._model(None)
        self._engine.generic(self.spec)

    def _walk(
        self,
        method: str,
        settings: Settings,
        short: Rehearsal,
        pair: Sequence[Device],
        profile: Profile,
    ) -> Walk:
        return walk(
            self._built(method, {**settings, **short.settings}, short.rounds, profile),
            self._model(short.density),
            pair,
            engine=self._engine,
            batches=DryBatches(
                self.spec.input_shape,
                self.spec.output_shape[0],
                self.examples,
                one=short.one_batch,
            ),
            until=short.until,
            steps=short.steps,
            merged=short.merged,
            new_masks=short.new_masks,
        )

    def _model(self, density: float | None) -> Model:
        """What a run starts from, perhaps with so much of every prunable tensor."""
        if None not in self._models:
            self._models[None] = Model(self.spec, read_only(init_params(self.spec, self.seed)))
        if density not in self._models:
            params = self._models[None].params
            masks = keep_largest(params, {}, density or 1.0, self.spec.prunable)
            self._models[density] = Model(self.spec, read_only(apply_mask(params, masks)), masks)
        return self._models[density]

    def _built(
        self, method: str, settings: Settings, rounds: int, profile: Profile
    ) -> FederatedAlgorithm:
        known = hyperparameters(find_method(method))
        if "cohort" in known:
            settings = {**settings, "cohort": None}  # whoever is drawn does the same

        def built(rounds: int) -> FederatedAlgorithm:
            server = Server(self.spec, self._engine, self.seed, rounds, profile)
            return build(method, server, settings)

        try:
            return built(rounds)
        except ValueError:
            with suppress(ValueError):  # a method of somebody's own may ask for more rounds
                return built(LONG)
            raise


def _pair(device: Device, least_bytes: int | None) -> list[Device]:
    """Two alike: what only one of them is asked for is asked of one client.

    Of a fleet its smallest comes third, for methods whose every client does as that one can.
    """
    pair = [replace(device, id=client) for client in range(2)]
    return pair if least_bytes is None else [*pair, replace(device, id=2, memory_bytes=least_bytes)]


def _treats_alike(walked: Walked, pair: Sequence[Device]) -> bool:
    """Whether the method would ask the same of these devices, in every state of the walk."""
    for kind in walked.walk.kinds:
        tasks = kind.algorithm.configure(kind.state, pair)
        if not tasks or _asked(tasks[0]) != _asked(kind.task):
            return False
    return True


def _asked(task: ClientTask) -> Any:
    pattern = wire.pattern_hash(task.sub_model.masks)
    return task.phase, task.spec.hash, pattern, task.sub_model.frozen, dict(task.hparams)
