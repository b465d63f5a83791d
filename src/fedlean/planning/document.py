"""A plan as JSON values; docs/plan.md has the keys."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fedlean.planning.records import DevicePlan, MethodPlan, Phase, Plan

FORMAT = 1


def to_document(plan: Plan) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "input_shape": list(plan.input_shape),
        "classes": plan.classes,
        "left_out": dict(plan.left_out),
        "devices": [_device(one) for one in plan.devices],
    }


def _device(one: DevicePlan) -> dict[str, Any]:
    document = asdict(one)
    return {**document, "methods": [_method(method) for method in one.methods]}


def _method(one: MethodPlan) -> dict[str, Any]:
    document = asdict(one)
    document["phases"] = [_phase(phase) for phase in one.phases]
    seconds = one.typical.seconds if one.planned else None
    return {**document, "planned": one.planned, "seconds_per_round": seconds}


def _phase(one: Phase) -> dict[str, Any]:
    document = asdict(one)
    document["memory"]["peak_bytes"] = one.memory.peak_bytes
    return {**document, "seconds": one.seconds}
