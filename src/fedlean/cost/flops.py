"""Floating-point operations of a sub-model.

Counted are the multiply-adds of Linear and Conv2d layers, two operations each, with the kept
weights only: those are what pruning saves.  Biases, norms, pooling and activations are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from fedlean.core import Work
from fedlean.layers import Conv2d, Linear
from fedlean.spec import ModelSpec, Node


@dataclass(frozen=True)
class LayerFlops:
    """Operations of one weighted layer for a whole batch.

    PruneFL's count per layer: forward 2·d·n_in·n_out·B, grad-input the same, grad-weight
    2·d·n_in·n_out·B when only kept coordinates are computed.  A layer that reads the model's input
    needs no grad-input.
    """

    forward: int
    grad_input: int
    grad_weight: int
    dense_grad_weight: int  # of all coordinates, which importance needs

    @property
    def step(self) -> int:
        return self.forward + self.grad_input + self.grad_weight


def weight_size(spec: ModelSpec, node: Node) -> int:
    return prod(spec.param_shapes[f"{node.name}.weight"])


def positions(spec: ModelSpec, node: Node) -> int:
    """How often each weight of the layer is used per example."""
    assert isinstance(node.layer, Linear | Conv2d)
    return node.layer.positions(spec.input_shapes(node))


def layer_flops(
    spec: ModelSpec, node: Node, kept: Mapping[str, int], batch_size: int
) -> LayerFlops:
    """`kept` maps masked tensors to their number of kept coordinates; absent means dense."""
    size = weight_size(spec, node)
    uses = positions(spec, node) * batch_size
    forward = 2 * kept.get(f"{node.name}.weight", size) * uses
    grad_input = 0 if spec.reads_input(node) else forward
    return LayerFlops(forward, grad_input, forward, 2 * size * uses)


def forward_flops(spec: ModelSpec, kept: Mapping[str, int], examples: int) -> int:
    return sum(layer_flops(spec, node, kept, examples).forward for node in spec.weighted)


def step_flops(
    spec: ModelSpec, kept: Mapping[str, int], batch_size: int, *, importance: bool = False
) -> int:
    """One training step.  With `importance` the weight gradient is dense: (2+4d)·n_in·n_out·B."""
    total = 0
    for node in spec.weighted:
        flops = layer_flops(spec, node, kept, batch_size)
        total += flops.step
        if importance:
            total += flops.dense_grad_weight - flops.grad_weight
    return total


def work_flops(spec: ModelSpec, work: Work, *, dense_gradient: bool = False) -> int:
    """All operations of a stretch of work.

    With `dense_gradient` every step takes the weights' gradients densely, as the PruneFL paper
    counts: its kernels cannot sample them.
    """
    dense = step_flops(spec, work.kept, work.batch_size, importance=True)
    plain = dense if dense_gradient else step_flops(spec, work.kept, work.batch_size)
    steps = (work.steps - work.importance_steps) * plain + work.importance_steps * dense
    return steps + forward_flops(spec, work.kept, work.forward_examples)
