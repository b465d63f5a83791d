"""Seconds of computation and of transport on a device profile."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from math import prod

from fedlean.core import Work
from fedlean.cost.backward import FORWARD_SHARE, BackwardLeft, activations_of, backward_left
from fedlean.cost.flops import (
    flops_by_layer,
    forward_flops,
    importance_parts,
    importance_share,
    layer_flops,
    step_flops,
)
from fedlean.cost.measured import MeasuredTime
from fedlean.cost.measured_part import profile_of_part
from fedlean.cost.profile import Profile
from fedlean.cost.stretch import stretch
from fedlean.engine.pieces import Importance, dense_rows, pieces_of
from fedlean.layers import Conv2d
from fedlean.spec import ModelSpec, Node

VALUE_BYTES = 4


@dataclass(frozen=True)
class LinearTime:
    """PruneFL's T(M) = c + Σ_j t_j, with t_j equal within a tensor."""

    constant_seconds: float
    seconds_per_weight: Mapping[str, float]


def activations(spec: ModelSpec) -> int:
    """Outputs of all layers but Flatten (a view), per example."""
    counts = activations_of(spec)
    return counts.trained + counts.passed


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
    importance: Importance = False,
    frozen: frozenset[str] = frozenset(),
    dense_too: bool = True,
    slower: Collection[str] = (),
) -> float:
    """One training step, the shorter of the sparse and the dense way where the profile has both.

    A model without masks runs densely.  With `importance` the sparse way takes the weight gradient
    densely, at the dense rate, or those rows of it; the dense way has it already.  What is `frozen`
    takes no gradient, and nothing runs backward below what trains.  Without `dense_too` the way is
    the sparse one.  Where the engine decides layer by layer (no `dense_way`), those in `slower`
    take the longer of what their two forms take.  A profile that was measured on this model gives
    what was measured, here and below.
    """
    dense_too = dense_too and profile.dense_way
    if measured := _measured(spec, profile):
        left = backward_left(spec, frozen)
        share = importance_share(spec, importance, frozen) if importance else 0.0
        return measured.step_seconds(
            kept,
            _sizes(spec),
            batch_size,
            share,
            left=left,
            dense_too=dense_too,
            slower=_weights_of(slower, profile),
        )
    dense = step_flops(spec, {}, batch_size, frozen=frozen) / profile.dense_flops_per_s
    if not kept:
        return dense
    sparse = _activation_seconds(spec, profile, batch_size, frozen)
    taken = dense_rows(pieces_of(spec, frozen, importance))
    for node, flops in flops_by_layer(spec, kept, batch_size, frozen):
        rate, name = _seconds_per_flop(profile, node), f"{node.name}.weight"
        share = taken.get(name, 0) / spec.param_shapes[name][0]
        layer = (flops.step - share * flops.grad_weight) * rate
        dense_gradient = share * flops.dense_grad_weight / profile.dense_flops_per_s
        if not profile.dense_way:
            full = layer_flops(spec, node, {}, batch_size, frozen).step
            form = _form_seconds(node, slower)
            layer = form(layer + dense_gradient, full / profile.dense_flops_per_s)
            dense_gradient = 0.0
        sparse = sparse + layer + dense_gradient
    return min(sparse, dense) if dense_too else sparse


def _form_seconds(node: Node, slower: Collection[str]) -> Callable[[float, float], float]:
    """Ours: where the model has no dense way, each of its layers has one, and takes the shorter."""
    return max if node.name in slower else min


def _weights_of(slower: Collection[str], profile: Profile) -> frozenset[str]:
    """None, where a device's sparse way has one form for all layers."""
    return frozenset() if profile.dense_way else frozenset(f"{name}.weight" for name in slower)


def _activation_seconds(
    spec: ModelSpec, profile: Profile, examples: int, frozen: frozenset[str]
) -> float:
    """Work on activations of a step of the sparse way."""
    outputs = activations_of(spec, frozen).of_a_step
    return profile.sparse_seconds_per_activation * outputs * examples


def forward_seconds(
    spec: ModelSpec,
    kept: Mapping[str, int],
    examples: int,
    profile: Profile,
    *,
    dense_too: bool = True,
    slower: Collection[str] = (),
) -> float:
    """Of so many examples, the shorter of the two ways as in `step_seconds`."""
    dense_too = dense_too and profile.dense_way
    if measured := _measured(spec, profile):
        forms = _weights_of(slower, profile)
        return measured.forward_seconds(
            kept, _sizes(spec), examples, dense_too=dense_too, slower=forms
        )
    dense = forward_flops(spec, {}, examples) / profile.dense_flops_per_s
    if not kept:
        return dense
    sparse = profile.sparse_seconds_per_activation * activations(spec) * examples * FORWARD_SHARE
    for node, flops in flops_by_layer(spec, kept, examples):
        layer = flops.forward * _seconds_per_flop(profile, node)
        if not profile.dense_way:
            full = layer_flops(spec, node, {}, examples).forward / profile.dense_flops_per_s
            layer = _form_seconds(node, slower)(layer, full)
        sparse += layer
    return min(sparse, dense) if dense_too else sparse


def work_seconds(
    spec: ModelSpec,
    work: Work,
    profile: Profile,
    *,
    frozen: frozenset[str] = frozenset(),
    dense_too: bool = True,
    slower: Collection[str] = (),
) -> float:
    """Computation of one stretch of work, without the link; it opens one session of the engine."""
    own = stretch(spec, work, frozen)
    if work.width == 1:  # a narrower model is another one, which was not measured
        profile = profile_of_part(profile, spec, own.spec)
    spec, work, frozen = own

    def step(importance: Importance) -> float:
        return step_seconds(
            spec,
            work.kept,
            work.batch_size,
            profile,
            importance=importance,
            frozen=frozen,
            dense_too=dense_too,
            slower=slower,
        )

    plain = work.steps - work.importance_steps
    seconds = plain * step(False) if plain else 0.0
    for pieces, count in importance_parts(spec, work, frozen):
        seconds += count * step(pieces)
    if work.forward_examples:
        examples = work.forward_examples
        seconds += forward_seconds(
            spec, work.kept, examples, profile, dense_too=dense_too, slower=slower
        )
    opens = work.steps > 0 or work.forward_examples > 0
    return seconds + (_session_seconds(spec, work.kept, profile) if opens else 0.0)


def link_seconds(downlink_bytes: int, uplink_bytes: int, profile: Profile) -> float:
    return downlink_bytes / profile.downlink_bytes_per_s + uplink_bytes / profile.uplink_bytes_per_s


def linear_round_time(
    spec: ModelSpec,
    profile: Profile,
    *,
    batch_size: int,
    local_steps: int,
    frozen: frozenset[str] = frozenset(),
) -> LinearTime:
    """T(M) of a values-only round of `local_steps` sparse steps, link included (PruneFL, Sec. V).

    Per kept weight: its operations, and its value down and up.  Constant: work on activations and
    the tensors that are never pruned.  It is `price.cost` without the dense way, as a line.
    """
    per_byte = 1 / profile.uplink_bytes_per_s + 1 / profile.downlink_bytes_per_s
    per_value = VALUE_BYTES * per_byte
    if measured := _measured(spec, profile):
        left = backward_left(spec, frozen)
        return _measured_round_time(spec, measured, per_value, batch_size, local_steps, left)
    outputs = activations_of(spec, frozen).of_a_step
    constant = local_steps * batch_size * outputs * profile.sparse_seconds_per_activation
    constant += per_value * _unprunable_values(spec)
    per_weight: dict[str, float] = {}
    for node, flops in flops_by_layer(spec, {}, batch_size * local_steps, frozen):
        name = f"{node.name}.weight"
        size = prod(spec.param_shapes[name])
        seconds = flops.step // size * _seconds_per_flop(profile, node)  # operations of one weight
        if name in spec.prunable:
            per_weight[name] = seconds + per_value
        else:
            constant += seconds * size
    return LinearTime(constant, per_weight)


def _unprunable_values(spec: ModelSpec) -> int:
    return sum(
        prod(shape) for name, shape in spec.tensor_shapes.items() if name not in spec.prunable
    )


def _measured_round_time(
    spec: ModelSpec,
    measured: MeasuredTime,
    per_value: float,
    batch_size: int,
    local_steps: int,
    left: BackwardLeft | None,
) -> LinearTime:
    """The fit as it was measured: what a layer takes in full does not bound a line."""
    session = measured.session
    steps = local_steps * batch_size / measured.batch_size
    constant = session.constant_seconds + steps * measured.constant_seconds(left)
    per_weight = {
        name: session.layers[name].seconds_per_weight
        + steps * measured.seconds_per_weight(name, left)
        + per_value
        for name in spec.prunable
    }
    return LinearTime(constant + per_value * _unprunable_values(spec), per_weight)
