"""All measurements of a model, taken in turns until the repeats are done or the time is up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from statistics import median

from fedlean.engine.memory import step_memory
from fedlean.engine.protocol import Engine
from fedlean.measure.cases import DENSE, UNIFORM, Case, Plan
from fedlean.measure.machine import available_bytes
from fedlean.measure.visit import Clock, Setting, Visit, visit
from fedlean.spec import ModelSpec

MEMORY_MARGIN = 2  # the allocator keeps what sub-models before have freed, and opening takes more

Tell = Callable[[str, int, int], None]  # what is measured now, visits done, visits planned


@dataclass(frozen=True)
class Point:
    """One sub-model: medians over its visits, in seconds."""

    case: Case
    kept: Mapping[str, int]
    visits: int
    round: float
    session: float
    new_masks: float
    step: float
    forward: float
    importance: float | None


@dataclass(frozen=True)
class Survey:
    """What was measured, in the plan's order, and a line for each thing that was not."""

    plan: Plan
    setting: Setting
    points: tuple[Point, ...]
    left_out: tuple[str, ...]

    def at(self, case: Case) -> Point | None:
        return next((point for point in self.points if point.case == case), None)

    def varying(self, layer: str) -> list[Point]:
        """Those in which `layer` alone varies, its middle density among them, by kept weights."""
        found = [p for p in self.points if p.case.varied == layer or p.case == self.plan.base]
        return sorted(found, key=lambda point: point.kept[layer])

    def uniform(self) -> list[Point]:
        """Those in which all layers have the same density, the dense model last."""
        found = [p for p in self.points if p.case.varied in (UNIFORM, DENSE)]
        return sorted(found, key=lambda point: point.case.density)


def survey(
    engine: Engine,
    spec: ModelSpec,
    plan: Plan,
    setting: Setting,
    *,
    repeats: int,
    budget_seconds: float,
    tell: Tell = lambda what, done, planned: None,
    clock: Clock = time.perf_counter,
    available: Callable[[], int | None] = available_bytes,
) -> Survey:
    """Visits every case `repeats` times, in turns, so that a slow spell of the machine hits all.

    The order is reversed from pass to pass.  When the budget is spent no visit begins any more.
    Raises ValueError saying what to change when not even what a fit needs could be measured.
    """
    began = clock()
    visits: list[list[Visit]] = [[] for _ in plan.cases]
    too_large = _too_large(spec, plan, setting, available())
    order = [
        at
        for turn in range(repeats)
        for at in (range(len(visits)) if turn % 2 == 0 else reversed(range(len(visits))))
        if at not in too_large
    ]
    visit(engine, spec, plan.base, Setting(setting.batch_size, 1), clock)  # loads what is lazy
    for done, at in enumerate(order):
        if clock() - began > budget_seconds:
            _check_enough(plan, visits, too_large, clock() - began, budget_seconds)
            break
        case = plan.cases[at]
        tell(str(case), done, len(order))
        important = case in (plan.base, plan.dense)
        visits[at].append(visit(engine, spec, case, setting, clock, importance=important))
    points = [_point(case, seen) for case, seen in zip(plan.cases, visits, strict=True) if seen]
    return Survey(plan, setting, tuple(points), tuple(_left_out(plan, visits, too_large, repeats)))


def _point(case: Case, visits: Sequence[Visit]) -> Point:
    importance = [one.importance for one in visits if one.importance is not None]
    return Point(
        case,
        visits[0].kept,
        len(visits),
        median(one.round for one in visits),
        median(one.session for one in visits),
        median(one.new_masks for one in visits),
        median(one.step for one in visits),
        median(one.forward for one in visits),
        median(importance) if importance else None,
    )


def _too_large(
    spec: ModelSpec, plan: Plan, setting: Setting, available: int | None
) -> frozenset[int]:
    """Cases for which the device has too little memory: those with something in full, at most.

    Raises ValueError where a case of the sparse range is among them.
    """
    if available is None:
        return frozenset()
    found = set()
    for at, case in enumerate(plan.cases):
        needed = _memory_bytes(spec, case, setting, case in (plan.base, plan.dense))
        if MEMORY_MARGIN * needed <= available:
            continue
        if case.density < 1:
            raise ValueError(
                f"there is too little memory to measure {case} ({available / 1e6:.0f} MB are "
                "left): take lower --densities, a smaller --batch or a smaller --model"
            )
        found.add(at)
    return frozenset(found)


def _memory_bytes(spec: ModelSpec, case: Case, setting: Setting, importance: bool) -> int:
    """Of a visit: the session's plan, and the masks and packed values that it is opened with."""
    sizes = {name: prod(spec.param_shapes[name]) for name in case.densities}
    kept = {name: round(size * case.densities[name]) for name, size in sizes.items()}
    step = step_memory(spec, kept, batch_size=setting.batch_size, importance=importance)
    values = spec.num_params - sum(sizes.values()) + sum(kept.values())
    return step.peak_bytes + sum(sizes.values()) + 4 * values


def _check_enough(
    plan: Plan,
    visits: Sequence[Sequence[Visit]],
    too_large: frozenset[int],
    spent: float,
    budget_seconds: float,
) -> None:
    needed = [at for at in range(plan.needed) if at not in too_large]
    done = sum(1 for at in needed if visits[at])
    if done < len(needed):
        wanted = spent * len(needed) / max(done, 1)
        raise ValueError(
            f"--seconds {budget_seconds:g} was enough for {done} of the {len(needed)} "
            f"measurements that a fit needs: allow at least {wanted:.0f}, or take a smaller --model"
        )


def _left_out(
    plan: Plan, visits: Sequence[Sequence[Visit]], too_large: frozenset[int], repeats: int
) -> Iterator[str]:
    for at in sorted(too_large):
        yield f"{plan.cases[at]}: too little memory"
    never = [plan.cases[at] for at, seen in enumerate(visits) if not seen and at not in too_large]
    if never:
        yield f"no time for {len(never)} of {len(visits)} sub-models, e.g. {never[0]}"
    fewest = min(len(seen) for seen in visits if seen)
    if fewest < repeats:
        yield f"no time for all {repeats} repeats: some sub-models were timed {fewest} times"
