"""What of a model a pass runs, and where gradients flow: engines and costs agree on it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import lru_cache

from fedlean.layers import BatchNorm
from fedlean.spec import INPUT, ModelSpec, Node


@lru_cache(maxsize=64)
def needs_gradient(spec: ModelSpec, frozen: frozenset[str] = frozenset()) -> Mapping[str, bool]:
    """For the input and every node's output, whether a trained tensor is at or below it.

    `frozen` names tensors that are not trained.  Nothing below an output without a gradient runs
    backward.
    """
    needs = {INPUT: False}
    for node in spec.nodes:
        own = (f"{node.name}.weight", f"{node.name}.bias")
        trains = any(name in spec.param_shapes and name not in frozen for name in own)
        needs[node.name] = trains or any(needs[source] for source in node.inputs)
    return needs


def needed(
    spec: ModelSpec,
    taps: Collection[str] = (),
    *,
    training: bool = False,
    frozen: Collection[str] = (),
) -> set[str]:
    """The nodes that a pass runs: those on which the output, a tap or a moving statistic depends.

    Branches that end in nothing are left out: exits and projectors that nobody asked for.
    """
    names = {spec.nodes[-1].name, *taps}
    for node in reversed(spec.nodes):
        if training and moves_statistics(node, frozen):
            names.add(node.name)
        if node.name in names:
            names.update(node.inputs)
    return names - {INPUT}


def moves_statistics(node: Node, frozen: Collection[str]) -> bool:
    """In training."""
    return isinstance(node.layer, BatchNorm) and f"{node.name}.running_mean" not in frozen
