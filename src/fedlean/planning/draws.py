"""A fleet in a plan: what devices of it may be like, and which of them each phase fits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedlean import wire
from fedlean.algorithm import Device
from fedlean.cost.profile import Profile
from fedlean.fleet.fleet import Fleet
from fedlean.planning.pricing import choice
from fedlean.planning.records import MethodPlan
from fedlean.planning.rehearse import Walked
from fedlean.planning.walk import Kind
from fedlean.runtime.prices import Prices

DRAWS = 200
CLIENTS = 20  # of a fleet that is of as many devices as a run has
MOST_STEPS = 10_000


def draw(fleet: Fleet, seed: int = 0, count: int = DRAWS) -> list[Device]:
    """`count` times a device that is present in a step, numbered from 0.

    Raises ValueError where none ever is.
    """
    clients = CLIENTS if fleet.size is None else fleet.size
    found: list[Device] = []
    for step in range(1, MOST_STEPS + 1):
        found += fleet.present(seed, step, clients)
        if len(found) >= count:
            break
    if not found:
        raise ValueError(f"no device of the fleet is there in its first {MOST_STEPS} steps")
    return [replace(device, id=number) for number, device in enumerate(found[:count])]


def median_device(devices: Sequence[Device]) -> Device:
    """That of median memory, the smaller of two."""
    ordered = sorted(devices, key=lambda device: (device.memory_bytes or 0, device.id))
    return ordered[(len(ordered) - 1) // 2]


def with_shares(
    plan: MethodPlan, walked: Walked, devices: Sequence[Device], profile: Profile
) -> MethodPlan:
    """With the share of `devices` that can hold each phase, and what the method gives them."""
    prices = Prices(profile, devices)
    phases = tuple(
        replace(phase, share=_share(kind, devices, prices))
        for phase, kind in zip(plan.phases, walked.walk.kinds, strict=True)
    )
    last = [kind for kind in walked.walk.kinds if kind.phase == walked.walk.kinds[-1].phase][-1]
    return replace(plan, phases=phases, choices=_choices(last, devices))


def _share(kind: Kind, devices: Sequence[Device], prices: Prices) -> float:
    """Of those who are asked for what is within their memory and their budgets, over all."""
    if kind.one_client:
        tasks = [replace(kind.task, client=device.id) for device in devices]
    else:
        tasks = kind.algorithm.configure(kind.state, devices)
    able = 0
    for task in tasks:
        works = kind.algorithm.work(task) if kind.algorithm.work else kind.works
        lack = prices.lack(task, works)
        lack = lack or prices.over_budget(task, works, kind.algorithm, wire.Known())
        able += lack is None
    return able / len(devices)


def _choices(kind: Kind, devices: Sequence[Device]) -> Mapping[str, float]:
    """None where there are stages: then the round decides what is trained, not the device."""
    if "stage" in kind.task.hparams:
        return {}
    counts = Counter(choice(task) for task in kind.algorithm.configure(kind.state, devices))
    counts.pop("", None)
    return {name: count / len(devices) for name, count in sorted(counts.items())}
