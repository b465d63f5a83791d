"""Where gradients flow in a model with frozen tensors: engines and costs agree on it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from fedlean.spec import INPUT, ModelSpec


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
