"""From what a walk has seen to what it costs on a device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from fedlean.algorithm import Device, profile_of
from fedlean.core import ClientTask, Masks, Work
from fedlean.cost.price import Cost
from fedlean.cost.profile import Profile
from fedlean.cost.split import MemorySplit, memory_split
from fedlean.cost.time import link_seconds
from fedlean.layers import Shape
from fedlean.planning.records import Binds, Phase
from fedlean.planning.uneven import uneven
from fedlean.planning.walk import Kind
from fedlean.pruning.density import density
from fedlean.runtime.prices import Prices
from fedlean.spec import ModelSpec
from fedlean.tree import kept_count

# settings of a task that say which part it is of
CHOICES = ("width", "depth", "density", "stage", "block")


Splits = dict[Any, MemorySplit]  # what memory is made of, by the work as it is done


@dataclass(frozen=True)
class Pricer:
    """Of tasks on one device; `splits` are shared by those of other devices."""

    device: Device  # numbered 0
    profile: Profile  # its own, with its memory
    prices: Prices
    splits: Splits

    def price(self, task: ClientTask, works: Sequence[Work]) -> tuple[Cost, MemorySplit]:
        cost = self.prices.of(task, works)
        done, frozen = [one.work for one in cost.done], task.sub_model.frozen
        slower = [one.slower for one in cost.done]
        key = (task.spec.hash, frozen, *map(repr, done), *slower)
        if key not in self.splits:
            self.splits[key] = memory_split(task.spec, done, frozen=frozen, slower=slower)
        return cost, self.splits[key]


def pricer(device: Device, fallback: Profile, splits: Splits) -> Pricer:
    """fallback: the profile of a device that has none of its own."""
    here = replace(device, id=0)
    return Pricer(here, profile_of(here, fallback), Prices(fallback, [here]), splits)


def phases(kinds: Sequence[Kind], whole: ModelSpec, pricer: Pricer) -> tuple[Phase, ...]:
    """`kinds` on a device; `whole` is the model that is to be trained."""
    last = kinds[-1].phase if kinds else ""
    always = set.intersection(*(set(kind.statistics) for kind in kinds)) if kinds else set()
    names = [_about(kind, always) for kind in kinds]
    several = len({kind.phase for kind in kinds}) < len(kinds)
    return tuple(
        _phase(kind, about if several or choice(kind.task) else "", last, whole, pricer)
        for kind, about in zip(kinds, names, strict=True)
    )


def _phase(kind: Kind, about: str, last: str, whole: ModelSpec, pricer: Pricer) -> Phase:
    price, split = pricer.price(kind.task, kind.works)
    fits = split.peak_bytes <= pricer.profile.memory_bytes
    link = link_seconds(kind.downlink_bytes, kind.uplink_bytes, pricer.profile)
    slower: Binds = "link" if link > price.seconds else "compute"
    return Phase(
        name=kind.phase,
        about=about,
        # a stage has rounds of its own, whatever its phase is called
        recurring=kind.phase == last or "stage" in kind.task.hparams,
        one_client=kind.one_client,
        model_share=_share(kind.task, whole),
        memory=split,
        downlink_first_bytes=kind.downlink_first_bytes,
        downlink_bytes=kind.downlink_bytes,
        uplink_bytes=kind.uplink_bytes,
        flops=price.flops,
        compute_seconds=price.seconds,
        link_seconds=link,
        fits=fits,
        binds=slower if fits else "memory",
        forward_only=not any(work.steps for work in kind.works),
    )


def peak_bytes(
    kinds: Sequence[Kind], pricer: Pricer, *, density: float = 1.0, value: float | None = None
) -> int:
    """The most that one of `kinds` takes, however its masks are split over the layers.

    With `value`: if masks of `density` had that instead.
    """
    cases = _cases(kinds, density, value)
    return max((pricer.price(kind.task, way)[1].peak_bytes for kind, way in cases), default=0)


@dataclass
class Search:
    """Whether `kinds`, walked with masks of `density`, fit with others, however those are split."""

    kinds: Sequence[Kind]
    pricer: Pricer
    density: float
    _needy: int = 0  # the case that did not fit at the last value that did not

    def fits(self, value: float) -> bool:
        """Whether `peak_bytes` there is within the memory; the first case that is not tells."""
        cases = list(_cases(self.kinds, self.density, value))
        for at in sorted(range(len(cases)), key=lambda at: at != self._needy):  # that one first
            kind, way = cases[at]
            peak = self.pricer.price(kind.task, way)[1].peak_bytes
            if peak > self.pricer.profile.memory_bytes:
                self._needy = at
                return False
        return True


def _cases(
    kinds: Sequence[Kind], density: float, value: float | None
) -> Iterator[tuple[Kind, Sequence[Work]]]:
    """Every kind as walked, and where it has masks in each other split of them.

    Not of masks that the method makes for the device, of a density that it chose for it.
    """
    for kind in kinds:
        works, spec = kind.works, kind.task.spec
        if value is not None:
            works = [moved(work, spec.tensor_shapes, density, value) for work in works]
        yield kind, works
        if any(work.kept for work in works) and "density" not in kind.task.hparams:
            for way in zip(*(uneven(work, spec) for work in works), strict=True):
                yield kind, way


def moved(work: Work, shapes: Mapping[str, Shape], density: float, value: float) -> Work:
    """Masked tensors at another density: fewer in proportion, or so much nearer to all of them.

    >>> half = Work(1, 8, kept={"w": 30})
    >>> [moved(half, {"w": (100,)}, 0.5, value).kept["w"] for value in (0.25, 0.5, 0.75, 1.0)]
    [15, 30, 65, 100]
    """
    if not work.kept or value == density:
        return work
    kept = {}
    for name, count in work.kept.items():
        size = prod(shapes[name])
        if value < density:
            kept[name] = max(1, round(count * value / density))
        else:
            kept[name] = round(count + (size - count) * (value - density) / (1 - density))
    return replace(work, kept=kept)


def choice(task: ClientTask) -> str:
    """Which part of the model a task is of, as its method says; "" where it says nothing."""
    said = []
    for name in CHOICES:
        if (value := task.hparams.get(name)) is not None:
            short = str(value).removesuffix(".0")  # a number, or text that is one
            said.append(short if short.startswith(name) else f"{name} {short}")
    return ", ".join(said)


def _about(kind: Kind, always: set[str]) -> str:
    """always: statistics that tell no kind from another."""
    masks = kind.task.sub_model.masks
    parts = [choice(kind.task)] if choice(kind.task) else []
    if not parts:
        parts.append(f"{100 * density(masks):.3g}% kept" if masks else "dense")
    measured = kind.task.hparams.get("measure")
    parts += [f"+ {name}" for name in kind.statistics if name not in always]
    if measured:
        parts.append("+ losses")
    return " ".join(parts)


def _share(task: ClientTask, whole: ModelSpec) -> float:
    """At most 1: exits and heads are no part of the whole."""
    held = _values(task.spec, task.sub_model.masks)
    return min(1.0, held / _values(whole, {}))


def _values(spec: ModelSpec, masks: Masks) -> int:
    return sum(
        kept_count(masks[name]) if name in masks else prod(shape)
        for name, shape in spec.tensor_shapes.items()
    )
