"""From measurements to a device profile: the fit of each operation, and rates for other models."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from math import prod
from pathlib import Path
from typing import Any

import fedlean
from fedlean.cost.flops import layer_flops, step_flops
from fedlean.cost.measured import MeasuredTime, OperationTime
from fedlean.cost.profile import Profile, load_profile, to_document
from fedlean.cost.time import activations
from fedlean.engine.protocol import Engine
from fedlean.layers import Conv2d, Linear
from fedlean.measure import machine
from fedlean.measure.fit import fit_operation
from fedlean.measure.link import Link
from fedlean.measure.survey import Point, Survey
from fedlean.spec import ModelSpec

ASSUMED_LINK = "raspberry_pi_4"  # whose link a profile gets when none was measured


@dataclass(frozen=True)
class Measurement:
    """All of one `fedlean profile`."""

    profile: Profile
    spec: ModelSpec
    survey: Survey
    round: OperationTime  # the fit of whole rounds, for readers: the profile has its parts
    link: Link | None

    @property
    def measured(self) -> MeasuredTime:
        assert self.profile.measured is not None
        return self.profile.measured


def measurement(
    name: str,
    model: str,
    spec: ModelSpec,
    survey: Survey,
    link: Link | None,
    *,
    engine: Engine,
    threads: int,
) -> Measurement:
    """The profile `name` of what was measured on `model`, built as `spec`."""
    measured = _measured(model, spec, survey, _conditions(engine, threads, survey))
    step, batch = measured.step, survey.setting.batch_size
    conv = _seconds_per_flop(spec, step, batch, Conv2d)
    linear = _seconds_per_flop(spec, step, batch, Linear)
    either = linear if conv is None else conv  # for a kind of layer that the model lacks
    assert either is not None  # the plan refuses a model without prunable layers
    assumed = load_profile(ASSUMED_LINK)
    where = f"{measured.conditions['machine']}, {threads} thread{'s' if threads > 1 else ''}"
    whose = "measured" if link else f"assumed to be that of {ASSUMED_LINK}"
    profile = Profile(
        name=name,
        description=f"{where}; measured on {model}",
        source=f"fedlean profile, {measured.conditions['date']}; link {whose}",
        dense_flops_per_s=step_flops(spec, {}, batch) / _dense_seconds(spec, step),
        sparse_conv_seconds_per_flop=either if conv is None else conv,
        sparse_linear_seconds_per_flop=either if linear is None else linear,
        sparse_seconds_per_activation=step.constant_seconds / (activations(spec) * batch),
        uplink_bytes_per_s=link.uplink_bytes_per_s if link else assumed.uplink_bytes_per_s,
        downlink_bytes_per_s=link.downlink_bytes_per_s if link else assumed.downlink_bytes_per_s,
        memory_bytes=machine.memory_bytes(),
        measured=measured,
        dense_way=False,  # it is the native engine that was measured
    )
    steps = survey.setting.local_steps
    whole = fit_operation(survey, lambda p: p.session + steps * p.step)
    return Measurement(profile, spec, survey, whole, link)


def write(path: Path, result: Measurement) -> None:
    """The profile file: the old one or the new one, never half of one."""
    document: dict[str, Any] = to_document(result.profile)
    document["derivation"] = {
        "link": None if result.link is None else asdict(result.link),
        "left_out": list(result.survey.left_out),
        "points": [_point(point) for point in result.survey.points],
    }
    # a name that nobody can have put a link at, in a folder that others may write
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("x") as file:
            file.write(json.dumps(document, indent=1, allow_nan=False) + "\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _importance_seconds(point: Point | None) -> float | None:
    """What g² of all coordinates adds to a step, where that was measured."""
    if point is None or point.importance is None:
        return None
    return max(0.0, point.importance - point.step)


def _measured(
    model: str, spec: ModelSpec, survey: Survey, conditions: Mapping[str, str | int | float]
) -> MeasuredTime:
    base, dense = survey.at(survey.plan.base), survey.at(survey.plan.dense)
    sparse = _importance_seconds(base) or 0.0
    whole = _importance_seconds(dense)
    return MeasuredTime(
        model=model,
        spec_hash=spec.hash,
        batch_size=survey.setting.batch_size,
        session=fit_operation(survey, lambda p: p.session),
        step=fit_operation(survey, lambda p: p.step),
        forward=fit_operation(survey, lambda p: p.forward),
        importance_seconds=sparse,
        dense_importance_seconds=sparse if whole is None else whole,  # memory was short for it
        conditions=conditions,
    )


def _conditions(engine: Engine, threads: int, survey: Survey) -> dict[str, str | int | float]:
    return {
        "machine": machine.processor(),
        "cores": machine.cores(),
        "threads": threads,
        "engine": engine.name,
        "instruction_set": engine.instruction_set,
        "fedlean": fedlean.__version__,
        "date": datetime.now(UTC).date().isoformat(),
        "local_steps": survey.setting.local_steps,
        "middle_density": survey.plan.base.density,
        "fewest_repeats": min(point.visits for point in survey.points),
    }


def _seconds_per_flop(
    spec: ModelSpec, step: OperationTime, batch_size: int, kind: type
) -> float | None:
    """Of all layers of a kind together; None where the model has none that is prunable."""
    nodes = [n for n in spec.weighted if isinstance(n.layer, kind) and n.prunable]
    if not nodes:
        return None
    flops = sum(layer_flops(spec, node, {}, batch_size).step for node in nodes)
    return sum(_linear_seconds(spec, step, f"{node.name}.weight") for node in nodes) / flops


def _dense_seconds(spec: ModelSpec, step: OperationTime) -> float:
    """Of the dense step; where memory was too small for it, the fit at 100%."""
    if step.dense_seconds is not None:
        return step.dense_seconds
    return step.constant_seconds + sum(_linear_seconds(spec, step, name) for name in step.layers)


def _linear_seconds(spec: ModelSpec, step: OperationTime, name: str) -> float:
    """Of a whole tensor, by its slope."""
    return step.layers[name].seconds_per_weight * prod(spec.param_shapes[name])


def _point(point: Point) -> dict[str, Any]:
    values = asdict(point)
    del values["case"]
    return {"varied": point.case.varied, "density": point.case.density, **values}
