"""A model for inference: BatchNorm joins the layer before it, or is a factor per channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedlean.core import Model
from fedlean.layers import BatchNorm
from fedlean.spec import ModelSpec, Node


@dataclass(frozen=True)
class Folded:
    """nodes: those that are left, each reading the ones before.  values: by node, its tensors.

    A Linear or Conv2d has `weight` and perhaps `bias`; a BatchNorm that is left has `factor` and
    `shift`, (C,) each; others what the spec says.
    """

    spec: ModelSpec
    nodes: Sequence[Node]
    values: Mapping[str, Mapping[str, np.ndarray]]


def folded(model: Model) -> Folded:
    """In float64, rounded once."""
    spec, values = model.spec, {}
    for name, value in model.params.items():
        node, suffix = name.rsplit(".", 1)
        values.setdefault(node, {})[suffix] = value
    weighted = {node.name for node in spec.weighted}
    readers: dict[str, int] = {}
    for node in spec.nodes:
        for source in node.inputs:
            readers[source] = readers.get(source, 0) + 1
    nodes: list[Node] = []
    instead: dict[str, str] = {}  # a norm that is gone -> the layer that does its work
    for node in spec.nodes:
        node = replace(node, inputs=tuple(instead.get(name, name) for name in node.inputs))
        if not isinstance(node.layer, BatchNorm):
            nodes.append(node)
            continue
        factor, shift = _affine(values[node.name], node.layer.eps)
        (source,) = node.inputs
        if source in weighted and readers[source] == 1 and source not in instead.values():
            values[source] = _with(values[source], factor, shift)
            instead[node.name] = source
        else:
            values[node.name] = {"factor": _single(factor), "shift": _single(shift)}
            nodes.append(node)
    return Folded(spec, nodes, values)


def _affine(own: Mapping[str, np.ndarray], eps: float) -> tuple[np.ndarray, np.ndarray]:
    wide = {name: value.astype(np.float64) for name, value in own.items()}
    factor = wide["weight"] / np.sqrt(wide["running_var"] + eps)
    return factor, wide["bias"] - wide["running_mean"] * factor


def _with(
    own: Mapping[str, np.ndarray], factor: np.ndarray, shift: np.ndarray
) -> dict[str, np.ndarray]:
    """A layer whose outputs are multiplied and shifted; a weight that is 0 stays 0."""
    weight = own["weight"].astype(np.float64)
    each = factor.reshape(-1, *(1 for _ in weight.shape[1:]))
    bias = own["bias"] * factor + shift if "bias" in own else shift
    return {"weight": _single(weight * each), "bias": _single(bias)}


def _single(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32)
