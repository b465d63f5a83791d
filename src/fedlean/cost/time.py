"""Seconds of computation and of transport on a device profile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

from fedlean.core import Work
from fedlean.cost.flops import forward_flops, layer_flops, positions, step_flops
from fedlean.cost.measured import MeasuredTime
from fedlean.cost.profile import Profile
from fedlean.layers import Conv2d, Flatten
from fedlean.spec import ModelSpec, Node

FORWARD_SHARE = 1 / 3  # of a step's work on activations; ours, no measurement is published
VALUE_BYTES = 4


@dataclass(frozen=True)
class LinearTime:
    """PruneFL's T(M) = c + Σ_j t_j, with t_j equal within a tensor."""

    constant_seconds: float
    seconds_per_weight: Mapping[str, float]


def activations(spec: ModelSpec) -> int:
    """Outputs of all layers but Flatten (a view), per example."""
    return sum(
        prod(spec.shapes[node.name]) for node in spec.nodes if not isinstance(node.layer, Flatten)
    )


def _seconds_per_flop(profile: Profile, node: Node) -> float:
    if isinstance(node.layer, Conv2d):
        return profile.sparse_conv_seconds_per_flop
    return profile.sparse_linear_seconds_per_flop


def _measured(spec: ModelSpec, profile: Profile) -> MeasuredTime | None:
    """What was measured, if it was on this model."""
    return profile.measured if profile.measured and profile.measured.of(spec) else None


def _sizes(spec: ModelSpec) -> dict[str, int]:
    return {name: prod(spec.param_shapes[name]) for name in spec.prunable}


def _session_seconds(spec: ModelSpec, kept: Mapping[str, int], profile: Profile) -> float:
    """Opening the engine's session and reading it back; known of measured profiles only."""
    measured = _measured(spec, profile)
    return measured.session.seconds(kept, _sizes(spec)) if measured else 0.0


def step_seconds(
    spec: ModelSpec,
    kept: Mapping[str, int],
    batch_size: int,
    profile: Profile,
    *,
    importance: bool = False,
) -> float:
    """One training step, the shorter of the sparse and the dense way.

    A model without masks runs densely.  With `importance` the sparse way takes the weight gradient
    densely, at the dense rate; the dense way has it already.  A profile that was measured on this
    model gives what was measured, here and below.
    """
    if measured := _measured(spec, profile):
        return measured.step_seconds(kept, _sizes(spec), batch_size, importance)
    dense = step_flops(spec, {}, batch_size) / profile.dense_flops_per_s
    if not kept:
        return dense
    sparse = profile.sparse_seconds_per_activation * activations(spec) * batch_size
    for node in spec.weighted:
        flops = layer_flops(spec, node, kept, batch_size)
        if importance:
            sparse += (flops.step - flops.grad_weight) * _seconds_per_flop(profile, node)
            sparse += flops.dense_grad_weight / profile.dense_flops_per_s
        else:
            sparse += flops.step * _seconds_per_flop(profile, node)
    return min(sparse, dense)


def forward_seconds(
    spec: ModelSpec, kept: Mapping[str, int], examples: int, profile: Profile
) -> float:
    if measured := _measured(spec, profile):
        return measured.forward_seconds(kept, _sizes(spec), examples)
    dense = forward_flops(spec, {}, examples) / profile.dense_flops_per_s
    if not kept:
        return dense
    sparse = profile.sparse_seconds_per_activation * activations(spec) * examples * FORWARD_SHARE
    for node in spec.weighted:
        flops = layer_flops(spec, node, kept, examples)
        sparse += flops.forward * _seconds_per_flop(profile, node)
    return min(sparse, dense)


def work_seconds(spec: ModelSpec, work: Work, profile: Profile) -> float:
    """Computation of one stretch of work, without the link; it opens one session of the engine."""
    plain = step_seconds(spec, work.kept, work.batch_size, profile)
    with_importance = step_seconds(spec, work.kept, work.batch_size, profile, importance=True)
    steps = (work.steps - work.importance_steps) * plain + work.importance_steps * with_importance
    forward = forward_seconds(spec, work.kept, work.forward_examples, profile)
    opens = work.steps > 0 or work.forward_examples > 0
    return steps + forward + (_session_seconds(spec, work.kept, profile) if opens else 0.0)


def as_done(spec: ModelSpec, work: Work, profile: Profile) -> Work:
    """The work as the device does it: without masks where the dense way is the shorter.

    FLOPs, memory and seconds are priced on this, so that they are of one and the same execution.
    """
    dense = replace(work, kept={})
    sparse_wins = work_seconds(spec, work, profile) < work_seconds(spec, dense, profile)
    return work if sparse_wins else dense


def link_seconds(downlink_bytes: int, uplink_bytes: int, profile: Profile) -> float:
    return downlink_bytes / profile.downlink_bytes_per_s + uplink_bytes / profile.uplink_bytes_per_s


def linear_round_time(
    spec: ModelSpec, profile: Profile, *, batch_size: int, local_steps: int
) -> LinearTime:
    """T(M) of a values-only round of `local_steps` sparse steps, link included (PruneFL, Sec. V).

    Per kept weight: its operations, and its value down and up.  Constant: work on activations and
    the tensors that are never pruned.
    """
    per_byte = 1 / profile.uplink_bytes_per_s + 1 / profile.downlink_bytes_per_s
    per_value = VALUE_BYTES * per_byte
    if measured := _measured(spec, profile):
        return _measured_round_time(spec, measured, per_value, batch_size, local_steps)
    constant = local_steps * batch_size * activations(spec) * profile.sparse_seconds_per_activation
    constant += per_value * _unprunable_values(spec)
    per_weight: dict[str, float] = {}
    for node in spec.weighted:
        passes = 2 if spec.reads_input(node) else 3  # forward, grad-weight, and grad-input if any
        flops = 2 * passes * positions(spec, node) * batch_size * local_steps
        seconds = flops * _seconds_per_flop(profile, node)
        name = f"{node.name}.weight"
        if name in spec.prunable:
            per_weight[name] = seconds + per_value
        else:
            constant += seconds * prod(spec.param_shapes[name])
    return LinearTime(constant, per_weight)


def _unprunable_values(spec: ModelSpec) -> int:
    return sum(
        prod(shape) for name, shape in spec.tensor_shapes.items() if name not in spec.prunable
    )


def _measured_round_time(
    spec: ModelSpec, measured: MeasuredTime, per_value: float, batch_size: int, local_steps: int
) -> LinearTime:
    """The fit as it was measured: what a layer takes in full does not bound a line."""
    session, step = measured.session, measured.step
    steps = local_steps * batch_size / measured.batch_size
    constant = session.constant_seconds + steps * step.constant_seconds
    per_weight = {
        name: session.layers[name].seconds_per_weight
        + steps * step.layers[name].seconds_per_weight
        + per_value
        for name in spec.prunable
    }
    return LinearTime(constant + per_value * _unprunable_values(spec), per_weight)


def round_seconds(
    spec: ModelSpec,
    kept: Mapping[str, int],
    profile: Profile,
    *,
    batch_size: int,
    local_steps: int,
) -> float:
    """T(M) of the same round with the dense fall-back: monotone in every count, not linear."""
    values = sum(
        kept.get(name, prod(shape)) * VALUE_BYTES for name, shape in spec.tensor_shapes.items()
    )
    compute = min(
        _session_seconds(spec, counts, profile)
        + local_steps * step_seconds(spec, counts, batch_size, profile)
        for counts in (kept, {})
    )
    return compute + link_seconds(values, values, profile)
