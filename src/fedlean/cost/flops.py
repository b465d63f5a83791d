"""Floating-point operations of a sub-model.

Counted are the multiply-adds of Linear and Conv2d layers, two operations each, with the kept
weights only: those are what pruning saves.  Biases, norms, pooling, scalers and activations are not
counted.  A frozen weight (`frozen` names tensors that are not trained) takes no gradient of its
own, and where nothing below a layer trains, none flows to its input.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from fedlean.core import Work
from fedlean.cost.stretch import stretch
from fedlean.engine.gradient_flow import needs_gradient
from fedlean.engine.pieces import Importance, Part, dense_rows, parts_taken, pieces_of
from fedlean.layers import Conv2d, Linear
from fedlean.spec import ModelSpec, Node


@dataclass(frozen=True)
class LayerFlops:
    """Operations of one weighted layer for a whole batch.

    PruneFL's count per layer: forward 2·d·n_in·n_out·B, grad-input the same, grad-weight
    2·d·n_in·n_out·B when only kept coordinates are computed.  A layer that reads the model's input
    needs no grad-input, nor does one below which nothing trains; a frozen weight no grad-weight.
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
    return _uses(spec)[node.name][1]


@lru_cache(maxsize=64)
def _uses(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """(size, positions) of each weighted layer: prices of many masks ask for the same."""
    found = {}
    for node in spec.weighted:
        assert isinstance(node.layer, Linear | Conv2d)
        found[node.name] = weight_size(spec, node), node.layer.positions(spec.input_shapes(node))
    return found


def layer_flops(
    spec: ModelSpec,
    node: Node,
    kept: Mapping[str, int],
    batch_size: int,
    frozen: frozenset[str] = frozenset(),
) -> LayerFlops:
    """`kept` maps masked tensors to their number of kept coordinates; absent means dense."""
    return _of_layer(spec, node, kept, batch_size, frozen, needs_gradient(spec, frozen))


def flops_by_layer(
    spec: ModelSpec, kept: Mapping[str, int], batch_size: int, frozen: frozenset[str] = frozenset()
) -> Iterator[tuple[Node, LayerFlops]]:
    """`layer_flops` of all weighted layers, in their order."""
    flow = needs_gradient(spec, frozen)
    for node in spec.weighted:
        yield node, _of_layer(spec, node, kept, batch_size, frozen, flow)


def _of_layer(
    spec: ModelSpec,
    node: Node,
    kept: Mapping[str, int],
    batch_size: int,
    frozen: frozenset[str],
    flow: Mapping[str, bool],
) -> LayerFlops:
    forward = _pass_flops(spec, node, kept, batch_size)
    grad_input = forward if flow[node.inputs[0]] else 0
    if f"{node.name}.weight" in frozen:
        return LayerFlops(forward, grad_input, 0, 0)
    return LayerFlops(forward, grad_input, forward, _pass_flops(spec, node, {}, batch_size))


def _pass_flops(spec: ModelSpec, node: Node, kept: Mapping[str, int], examples: int) -> int:
    """Each kept weight at each of its positions, once."""
    size, uses = _uses(spec)[node.name]
    return 2 * kept.get(f"{node.name}.weight", size) * uses * examples


def forward_flops(spec: ModelSpec, kept: Mapping[str, int], examples: int) -> int:
    return sum(_pass_flops(spec, node, kept, examples) for node in spec.weighted)


def step_flops(
    spec: ModelSpec,
    kept: Mapping[str, int],
    batch_size: int,
    *,
    importance: Importance = False,
    frozen: frozenset[str] = frozenset(),
) -> int:
    """One training step.  With `importance` the weight gradient is dense: (2+4d)·n_in·n_out·B.

    Where it names pieces, the gradients of their rows are.
    """
    total, taken = 0, dense_rows(pieces_of(spec, frozen, importance))
    for node, flops in flops_by_layer(spec, kept, batch_size, frozen):
        name = f"{node.name}.weight"
        more = flops.dense_grad_weight - flops.grad_weight
        total += flops.step + more * taken.get(name, 0) // spec.param_shapes[name][0]
    return total


def importance_parts(
    spec: ModelSpec, work: Work, frozen: frozenset[str] = frozenset()
) -> tuple[Part, ...]:
    """What the importance steps of `work` took one after another.  Raises as `parts_taken`."""
    return parts_taken(spec, work.importance_steps, work.piece_bytes, work.first_piece, frozen)


def importance_share(
    spec: ModelSpec, pieces: Importance, frozen: frozenset[str] = frozenset()
) -> float:
    """Of the operations of all dense gradients of weights, those that a step with pieces takes."""
    taken = dense_rows(pieces_of(spec, frozen, pieces))
    part = whole = 0.0
    for node, flops in flops_by_layer(spec, {}, 1, frozen):
        name = f"{node.name}.weight"
        part += flops.dense_grad_weight * taken.get(name, 0) / spec.param_shapes[name][0]
        whole += flops.dense_grad_weight
    return part / whole if whole else 0.0


def work_flops(
    spec: ModelSpec,
    work: Work,
    *,
    dense_gradient: bool = False,
    frozen: frozenset[str] = frozenset(),
) -> int:
    """All operations of a stretch of work.

    With `dense_gradient` every step takes the weights' gradients densely, as the PruneFL paper
    counts: its kernels cannot sample them.
    """
    spec, work, frozen = stretch(spec, work, frozen)

    def step(importance: Importance) -> int:
        dense = True if dense_gradient else importance
        return step_flops(spec, work.kept, work.batch_size, importance=dense, frozen=frozen)

    steps = (work.steps - work.importance_steps) * step(False)
    for pieces, count in importance_parts(spec, work, frozen):
        steps += count * step(pieces)
    return steps + forward_flops(spec, work.kept, work.forward_examples)
