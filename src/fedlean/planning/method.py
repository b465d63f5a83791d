"""One method on one device: as it is set, or as large as it fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

from fedlean.algorithm import Device
from fedlean.core import Scalar
from fedlean.cost.profile import Profile
from fedlean.planning.pricing import Search, peak_bytes, phases, pricer
from fedlean.planning.records import Knob, MethodPlan
from fedlean.planning.rehearse import Settings, Stage, Walked
from fedlean.planning.search import largest, value_at
from fedlean.planning.walk import Kind
from fedlean.report.units import human
from fedlean.runtime.method import complete

KNOBS = ("density", "size_limit")  # settings in (0, 1] that say how much of the model is kept
BASE = 0.2  # density of a walk from which those of others are found, where nothing is pruned
TRIES = 8
TINY = 0.01


def plan_method(
    stage: Stage,
    method: str,
    settings: Settings,
    device: Device,
    profile: Profile,
    least_bytes: int | None = None,
) -> tuple[MethodPlan, Walked | None]:
    """`profile`: the server's.  What a method refuses is why it is not planned.

    least_bytes: memory of the smallest device of a fleet of which `device` is one.  What is kept is
    then what fits that one, where there is such.
    """

    def planner(device: Device, settings: Settings) -> _Planner:
        return _Planner(stage, method, settings, device, profile, least_bytes)

    try:
        if least_bytes is not None:
            small, _ = planner(replace(device, memory_bytes=least_bytes), settings).planned()
            if small.fits and small.settings:
                one, walked = planner(device, {**settings, **small.settings}).planned()
                return replace(one, settings=small.settings, knob=small.knob), walked
        return planner(device, settings).planned()
    except ValueError as error:
        return MethodPlan(method, why=" ".join(str(error).split())), None
    except Exception as error:  # of code of somebody's own, which costs its own lines only
        said = f"{type(error).__name__}: {error}"
        return MethodPlan(method, why=" ".join(said.split())), None


class _Planner:
    def __init__(
        self,
        stage: Stage,
        method: str,
        settings: Settings,
        device: Device,
        profile: Profile,
        least_bytes: int | None,
    ):
        self.least_bytes = least_bytes
        self.stage, self.method, self.settings = stage, method, settings
        self.device, self.profile = device, profile
        self.pricer = pricer(device, profile, stage.splits)
        self.limit = self.pricer.profile.memory_bytes
        complete_settings: Mapping[str, Scalar | None] = complete(method, settings)
        self.knob = next((name for name in KNOBS if name in complete_settings), None)
        self.value = complete_settings[self.knob] if self.knob else None

    def planned(self) -> tuple[MethodPlan, Walked]:
        walked = self._walked({})
        if not walked.walk.kinds:
            raise ValueError("no client is asked for anything in the first rounds")
        fits = self._need(walked) <= self.limit
        if self.knob is None:
            return self._record(walked, {}, None), walked
        value = None if self.value is None else float(self.value)
        found = self._largest(walked)
        if found is None:
            knob = Knob(self.knob, value, None)
            return self._record(
                walked, {}, knob, None if fits else self._least_need(walked)
            ), walked
        largest_value, smaller = found
        if fits and (self.knob in self.settings or largest_value == 1.0):
            return self._record(walked, {}, Knob(self.knob, value, largest_value)), walked
        knob = Knob(self.knob, largest_value, largest_value)
        return self._record(smaller, {self.knob: largest_value}, knob), smaller

    def _walked(self, changed: Settings) -> Walked:
        settings = {**self.settings, **changed}
        return self.stage.walked(self.method, settings, self.device, self.profile, self.least_bytes)

    def _need(self, walked: Walked) -> int:
        return peak_bytes(_all_clients(walked.walk.kinds), self.pricer)

    def _need_at(self, base: Walked, density: float, value: float) -> int:
        """Of what was walked at `density`, had it been another."""
        kinds = _all_clients(base.walk.kinds)
        return peak_bytes(kinds, self.pricer, density=density, value=value)

    def _base(self, walked: Walked) -> tuple[Walked, float]:
        """A walk in which something is masked, and its density."""
        masked = any(work.kept for kind in walked.walk.kinds for work in kind.works)
        if masked or self.knob is None:
            return walked, _density(walked) if self.value is None else float(self.value)
        return self._walked({self.knob: BASE}), BASE

    def _largest(self, walked: Walked) -> tuple[float, Walked] | None:
        """The largest value that fits, found from what was walked and held against a walk of it.

        A mask of another density may be spread otherwise over the layers: then again from there.
        """
        assert self.knob is not None
        if self.value == 1.0 and self._need(walked) <= self.limit:
            return 1.0, walked  # without a walk of what is pruned
        base, density = self._base(walked)
        if not base.walk.kinds:
            raise ValueError(
                f"walking through it with {self.knob}={density:g} takes too long to say what fits: "
                f"give it a {self.knob} of your own"
            )
        for _ in range(TRIES):
            found = largest(Search(_all_clients(base.walk.kinds), self.pricer, density).fits)
            if found is None:
                return None
            if found == 1.0:  # what is dense was walked, too
                return found, walked
            base, density = self._walked({self.knob: found}), found
            if self._need(base) <= self.limit:
                return found, base
        fits = self.value is not None and self._need(walked) <= self.limit
        return (float(self.value), walked) if fits and self.value is not None else None

    def _least_need(self, walked: Walked) -> int:
        """Of the smallest model there is; what stays whole, whatever the setting, a walk shows."""
        assert self.knob is not None
        base, density = self._base(walked)
        least = self._need_at(base, density, value_at(0))
        return least if least > self.limit else self._need(self._walked({self.knob: TINY}))

    def _record(
        self, walked: Walked, changed: Settings, knob: Knob | None, needs: int | None = None
    ) -> MethodPlan:
        kinds = walked.walk.kinds
        needed = self._need(walked)
        least = needed if needs is None else needs
        fits = needed <= self.limit
        why = "" if fits else f"needs {human(least, 'bytes')}, has {human(self.limit, 'bytes')}"
        return MethodPlan(
            method=self.method,
            phases=phases(kinds, self.stage.spec, self.pricer),
            settings=dict(changed),
            knob=knob,
            fits=fits,
            needs_bytes=least,
            why=why,
            bound=walked.bound,
            complete=walked.walk.complete,
        )


def _density(walked: Walked) -> float:
    """Of what was walked under masks: the kept share of the tensors that have one."""
    shares = [1.0]
    for kind in walked.walk.kinds:
        shapes = kind.task.spec.param_shapes
        for work in kind.works:
            if work.kept:
                whole = sum(prod(shapes[name]) for name in work.kept)
                shares.append(sum(work.kept.values()) / whole)
    return min(shares)


def _all_clients(kinds: Sequence[Kind]) -> list[Kind]:
    return [kind for kind in kinds if not kind.one_client]
