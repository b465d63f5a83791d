"""HeteroFL's scaler (Diao et al., ICLR 2021, arXiv 2010.01264, Section 3).

A slice that keeps a share r of a layer's outputs multiplies them by 1/r while it trains, as
inverted dropout does, so that sums over them are of the full model's size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fedlean.layers import Scaler
from fedlean.spec import ModelSpec, Node


def with_scalers(spec: ModelSpec, factors: Mapping[str, float]) -> ModelSpec:
    """`spec` with a `Scaler(factor)` right after each node that `factors` names.

    The scaler of layer "conv1" is the node "conv1_scaler", of the same block; what read the layer
    reads the scaler.  A depthwise convolution takes none: it sums over no channels, and what it
    reads is at full size already (ours; HeteroFL's models have none).
    """
    renamed = {name: f"{name}_scaler" for name in factors}
    nodes: list[Node] = []
    for node in spec.nodes:
        sources = tuple(renamed.get(source, source) for source in node.inputs)
        nodes.append(replace(node, inputs=sources))
        if node.name in factors:
            scaler = Scaler(factors[node.name])
            nodes.append(Node(renamed[node.name], scaler, (node.name,), node.block))
    return ModelSpec(spec.input_shape, tuple(nodes))
