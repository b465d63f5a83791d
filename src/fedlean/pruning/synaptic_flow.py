"""Iterative synaptic flow pruning: no data, no loss, no collapsed layer.

Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic flow",
NeurIPS 2020, arXiv 2006.05467: the loss R_SF, its synaptic saliency, and Algorithm 1.  What the
linearised network does with each layer is in `linearised`.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite

import numpy as np

from fedlean.core import Masks, Params
from fedlean.pruning.density import full_masks
from fedlean.pruning.global_top import count_at, keep_largest
from fedlean.pruning.linearised import Pull, linear_map, magnitudes
from fedlean.spec import INPUT, ModelSpec
from fedlean.tree import num_kept


def synaptic_flow(
    spec: ModelSpec, held: Mapping[str, np.ndarray]
) -> tuple[float, dict[str, np.ndarray]]:
    """R and the scores ∂R/∂θ ⊙ θ of the prunable weights, float64 in their shapes.

    held: `magnitudes` of the spec, 0 where a weight is pruned

    R = 1ᵀ (Π_l |θ_l|) 1: the sum of all outputs for an input of ones.  Conservation: the scores of
    weights that every path from input to output crosses once, a layer of a chain, add up to R.
    """
    values = {INPUT: np.ones(spec.input_shape)}
    pulls: dict[str, Pull] = {}
    for node in spec.nodes:
        inputs = [values[source] for source in node.inputs]
        values[node.name], pulls[node.name] = linear_map(node, inputs, held)
    flow = float(values[spec.nodes[-1].name].sum())
    flowing = {name: np.zeros_like(value) for name, value in values.items()}
    flowing[spec.nodes[-1].name][...] = 1.0
    scores = {}
    for node in reversed(spec.nodes):
        to_inputs, to_weight = pulls[node.name](flowing.pop(node.name))
        for source, gradient in zip(node.inputs, to_inputs, strict=True):
            flowing[source] += gradient
        name = f"{node.name}.weight"
        if to_weight is not None and name in spec.prunable:
            scores[name] = np.multiply(to_weight, held[name], out=to_weight)
    return flow, {name: scores[name] for name in spec.prunable}


def prune_by_flow(spec: ModelSpec, params: Params, density: float, steps: int) -> Masks:
    """Algorithm 1: in step k of `steps` the top density^(k/steps) of the weights are kept.

    params: all tensors of the spec; density in (0, 1], of all prunable weights together.  The count
    is rounded down, and a pruned weight never comes back.  Raises ValueError when the density keeps
    no weight, or when no flow is left, or more than float64 can hold.
    """
    held, masks = magnitudes(spec, params), full_masks(spec)
    for step in range(1, steps + 1):
        count = count_at(density ** (step / steps), spec)
        if count == num_kept(masks):
            continue
        flow, scores = synaptic_flow(spec, held)
        if not (isfinite(flow) and flow > 0):
            raise ValueError(
                f"the synaptic flow is {flow} with {num_kept(masks)} weights left, expected a "
                "positive number: either no path of non-zero weights from input to output is left "
                "(choose a higher density or more steps), or the model is too deep for float64"
            )
        masks = keep_largest(scores, count, masks)
        for name, mask in masks.items():
            held[name] *= mask
    return masks
