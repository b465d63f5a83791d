"""`plan`: what each method would cost on given devices, what fits, and what to choose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from math import isfinite
from multiprocessing import get_context

from fedlean.algorithm import Device, profile_of
from fedlean.cost.profile import Profile, other_model
from fedlean.fleet.fleet import Fleet
from fedlean.planning.choose import recommend
from fedlean.planning.draws import draw, median_device, with_shares
from fedlean.planning.method import plan_method
from fedlean.planning.records import DevicePlan, MethodPlan, Plan
from fedlean.planning.rehearse import Settings, Stage
from fedlean.runtime.method import available, find_method, hyperparameters
from fedlean.spec import ModelSpec

COUNTS = ("batch_size", "local_steps")  # settings without which no method trains
THREADS = 2  # large models are arrays of many MB, on which NumPy leaves the interpreter free
# methods that are not planned unless they are named, and why
LEFT_OUT = {"fixed_mask": "it trains the masks of a finished run, which a plan does not have"}


def _silent(line: str) -> None:
    """Nobody watches."""


def plan(
    models: ModelSpec | Mapping[str, ModelSpec],
    devices: Sequence[Device] = (),
    *,
    profile: Profile,
    methods: Sequence[str] | None = None,
    settings: Settings | None = None,
    fleet: Fleet | None = None,
    seed: int = 0,
    examples: int = 100,
    watch: Callable[[str], None] = _silent,
    processes: int = 1,
) -> Plan:
    """A block for each of `models`, by name, on each of `devices`, and on a `fleet`, if any.

    devices: profile and memory count; without its own a device has `profile`, which is what the
    server plans by, and that profile's memory.  methods: names or package.module:function; None:
    the built-in ones.  settings: of every method that has them.  seed: of the first weights, on
    which a mask may depend, and of the fleet's draws.  examples: of a client.  processes: in which
    the models are planned, of their own where there are several (`watch` then hears of none).

    Raises ValueError where a method is unknown, a setting is of none of them, or a model's input
    or classes are not those of the first.
    """
    specs = {"model": models} if isinstance(models, ModelSpec) else dict(models)
    names, left_out = _methods(methods)
    asked = _settings(names, settings or {})
    first = next(iter(specs.values()), None)
    if first is None or not (devices or fleet):
        raise ValueError("a plan needs a model, and a device or a fleet")
    drawn = draw(fleet, seed) if fleet else []
    one = partial(
        _of_model,
        devices=devices,
        asked=asked,
        profile=profile,
        drawn=drawn,
        seed=seed,
        examples=examples,
    )
    if processes > 1 and len(specs) > 1:
        # the interpreter runs one thread at a time; "spawn", since a fork has no threads of NumPy's
        with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
            found = list(pool.map(one, specs, specs.values()))
    else:
        found = [one(name, spec, watch=watch) for name, spec in specs.items()]
    blocks = tuple(block for blocks in found for block in blocks)
    return Plan(tuple(first.input_shape), first.output_shape[0], blocks, left_out)


def _of_model(
    name: str,
    spec: ModelSpec,
    *,
    devices: Sequence[Device],
    asked: Mapping[str, Settings],
    profile: Profile,
    drawn: Sequence[Device],
    seed: int,
    examples: int,
    watch: Callable[[str], None] = _silent,
) -> list[DevicePlan]:
    """The blocks of one model; `drawn` are the devices of the fleet."""
    stage, blocks = Stage(spec, seed, examples), []
    for device in devices:
        watch(f"{name} on {label(device, profile)}")
        blocks.append(_block(stage, name, device, asked, profile, ()))
    if drawn:
        watch(f"{name} on the fleet")
        blocks.append(_block(stage, name, median_device(drawn), asked, profile, drawn))
    return blocks


def label(device: Device, profile: Profile) -> str:
    """A device by its profile's name; its memory is said beside it."""
    return (device.profile or profile).name


def _block(
    stage: Stage,
    model: str,
    device: Device,
    asked: Mapping[str, Settings],
    profile: Profile,
    drawn: Sequence[Device],
) -> DevicePlan:
    server = device.profile or profile
    own = profile_of(device, profile)
    device = replace(device, profile=server, memory_bytes=own.memory_bytes)
    least = min((profile_of(one, server).memory_bytes for one in drawn), default=None)

    def planned(method: str) -> MethodPlan:
        one, walked = plan_method(stage, method, asked[method], device, server, least)
        return with_shares(one, walked, drawn, server) if drawn and walked else one

    stage.prepare()
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(planned, asked))
    recommended, reason = recommend(found)
    return DevicePlan(
        model=model,
        parameters=stage.spec.num_params,
        device=f"the fleet's median device, {label(device, profile)}"
        if drawn
        else label(device, profile),
        memory_bytes=own.memory_bytes,
        downlink_bytes_per_s=own.downlink_bytes_per_s,
        uplink_bytes_per_s=own.uplink_bytes_per_s,
        methods=tuple(found),
        recommended=recommended,
        reason=reason,
        device_steps=len(drawn) if drawn else None,
        note=other_model(own, stage.spec) or "",
    )


def _methods(asked: Sequence[str] | None) -> tuple[list[str], Mapping[str, str]]:
    if asked is None:
        return [name for name in available() if name not in LEFT_OUT], LEFT_OUT
    for name in asked:
        find_method(name)
    return list(dict.fromkeys(asked)), {}


def _settings(names: Sequence[str], settings: Settings) -> dict[str, Settings]:
    """Of each method those that it has.  Raises ValueError for one that none has or can have."""
    known = {name: hyperparameters(find_method(name)).keys() for name in names}
    for key, value in settings.items():
        if isinstance(value, float) and not isfinite(value):
            raise ValueError(f"{key:.60} must be a finite number, got {value}")
        if key in COUNTS and isinstance(value, int | float) and value < 1:
            raise ValueError(f"{key} must be at least 1, got {value}")
    for key in settings:
        if not any(key in own for own in known.values()):
            near = get_close_matches(key, sorted(set().union(*known.values())), n=3, cutoff=0.5)
            hint = f"nearest: {', '.join(near)}" if near else "see the pages of the methods"
            raise ValueError(f"none of the planned methods has a setting {key!r:.60}; {hint}")
    return {
        name: {key: value for key, value in settings.items() if key in own}
        for name, own in known.items()
    }
