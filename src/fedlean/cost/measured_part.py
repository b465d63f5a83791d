"""Times that were measured on a model, as times of one span of it.

OURS: a layer of the span takes what it took in the whole, less the gradient of its input where the
span has none; what is of no one layer is shared out by activations, weights or operations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

from fedlean.cost.backward import activations_of
from fedlean.cost.flops import LayerFlops, flops_by_layer
from fedlean.cost.measured import LayerTime, MeasuredTime, OperationTime, with_backward
from fedlean.cost.profile import Profile
from fedlean.spec import ModelSpec


def profile_of_part(profile: Profile, spec: ModelSpec, part: ModelSpec) -> Profile:
    """For work on `part`, a span of `spec`; the same profile where it was not measured on that."""
    measured = profile.measured
    if part is spec or measured is None or not measured.of(spec):
        return profile
    return replace(profile, measured=_part(measured, spec, part))


def _part(measured: MeasuredTime, spec: ModelSpec, part: ModelSpec) -> MeasuredTime:
    whole, own = _layers(spec), _layers(part)
    activations = _activations(part) / _activations(spec)
    values = part.num_params / spec.num_params
    dense_gradients = _share(own, whole, "dense_grad_weight")
    forward = _restricted(measured.forward, part, activations, _share(own, whole, "forward"))
    step = _restricted(measured.step, part, activations, _share(own, whole, "step"))
    left = {name: _backward(own[name]) / _backward(whole[name]) for name in step.layers}
    step = replace(
        step,
        layers={
            name: _with_backward(left[name], forward.layers[name], layer)
            for name, layer in step.layers.items()
        },
    )
    return replace(
        measured,
        spec_hash=part.hash,
        session=_restricted(measured.session, part, values, values),
        step=step,
        forward=forward,
        importance_seconds=dense_gradients * measured.importance_seconds,
        dense_importance_seconds=dense_gradients * measured.dense_importance_seconds,
    )


def _restricted(
    whole: OperationTime, part: ModelSpec, of_constant: float, of_dense: float
) -> OperationTime:
    dense = whole.dense_seconds
    return OperationTime(
        of_constant * whole.constant_seconds,
        None if dense is None else of_dense * dense,
        {name: whole.layers[name] for name in part.prunable},
    )


def _with_backward(share: float, forward: LayerTime, step: LayerTime) -> LayerTime:
    full = step.full_seconds
    if full is not None and forward.full_seconds is not None:
        full = with_backward(share, forward.full_seconds, full)
    per_weight = with_backward(share, forward.seconds_per_weight, step.seconds_per_weight)
    return replace(step, seconds_per_weight=per_weight, full_seconds=full)


@lru_cache(maxsize=64)
def _layers(spec: ModelSpec) -> Mapping[str, LayerFlops]:
    return {f"{node.name}.weight": flops for node, flops in flops_by_layer(spec, {}, 1)}


def _activations(spec: ModelSpec) -> int:
    counts = activations_of(spec)
    return counts.trained + counts.passed


def _share(own: Mapping[str, LayerFlops], whole: Mapping[str, LayerFlops], what: str) -> float:
    """Of the whole's operations of one kind."""
    total = sum(getattr(flops, what) for flops in whole.values())
    return sum(getattr(flops, what) for flops in own.values()) / total if total else 0.0


def _backward(flops: LayerFlops) -> int:
    return flops.grad_input + flops.grad_weight
