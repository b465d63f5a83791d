"""How much of a model's backward pass is left where some of its tensors are frozen.

A time that was measured is one of the whole model.  OURS: of what a step takes longer than a
forward pass, a layer keeps the share of its operations that it still does, and the rest of the
model the share of its activations that still take a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from fedlean.cost.flops import LayerFlops, flops_by_layer
from fedlean.engine.gradient_flow import needs_gradient
from fedlean.layers import Flatten
from fedlean.spec import ModelSpec

FORWARD_SHARE = 1 / 3  # of a step's work on activations; ours, no measurement is published


@dataclass(frozen=True)
class BackwardLeft:
    """Shares from 0 (nothing runs backward) to 1 (all of it, as without frozen tensors)."""

    layers: Mapping[str, float]  # by weight
    operations: float  # of all layers together
    activations: float
    importance: float  # of the dense gradients of the weights


@dataclass(frozen=True)
class Activations:
    """Outputs of all layers but Flatten (a view), per example."""

    trained: int  # those that take a gradient
    passed: int  # those that only run forward

    @property
    def of_a_step(self) -> float:
        """In outputs that run forward and backward."""
        return self.trained + self.passed * FORWARD_SHARE


@lru_cache(maxsize=64)
def activations_of(spec: ModelSpec, frozen: frozenset[str] = frozenset()) -> Activations:
    flow, counts = needs_gradient(spec, frozen), {True: 0, False: 0}
    for node in spec.nodes:
        if not isinstance(node.layer, Flatten):
            counts[flow[node.name]] += prod(spec.shapes[node.name])
    return Activations(counts[True], counts[False])


@lru_cache(maxsize=64)
def backward_left(spec: ModelSpec, frozen: frozenset[str]) -> BackwardLeft | None:
    """None where no tensor that could be trained is frozen."""
    if not frozen & spec.param_shapes.keys():
        return None
    whole, left = (dict(_by_weight(spec, names)) for names in (frozenset[str](), frozen))
    return BackwardLeft(
        layers={name: _share(_backward(left[name]), _backward(whole[name])) for name in whole},
        operations=_share(sum(map(_backward, left.values())), sum(map(_backward, whole.values()))),
        activations=_share(activations_of(spec, frozen).trained, activations_of(spec).trained),
        importance=_share(
            sum(flops.dense_grad_weight for flops in left.values()),
            sum(flops.dense_grad_weight for flops in whole.values()),
        ),
    )


def _by_weight(spec: ModelSpec, frozen: frozenset[str]) -> list[tuple[str, LayerFlops]]:
    return [(f"{node.name}.weight", flops) for node, flops in flops_by_layer(spec, {}, 1, frozen)]


def _backward(flops: LayerFlops) -> int:
    return flops.grad_input + flops.grad_weight


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
