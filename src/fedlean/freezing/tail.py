"""The tail of a part: its last layer with weights, and the norm after it."""

from __future__ import annotations

from fedlean.layers import BatchNorm, GroupNorm
from fedlean.spec import INPUT, ModelSpec
from fedlean.submodels.parts import Part


def tail(spec: ModelSpec, part: Part) -> frozenset[str]:
    """Tensors of the part's last convolution or linear layer and of the norm that reads it.

    The last is the one with most such layers on the way to it: of a residual block the second
    convolution, not the one on the shortcut.  NeuLite's authors train the same of the part before
    (github.com/Wuxiaobo315/NeuLiteCode, update.py).  Raises ValueError for a part without one.
    """
    weighted = {node.name for node in spec.weighted}
    depths = {INPUT: 0}
    for node in spec.nodes:
        below = max(depths[source] for source in node.inputs)
        depths[node.name] = below + (node.name in weighted)
    inside = [name for name in part.layers if name in weighted]
    if not inside:
        raise ValueError(
            f"part {part.name!r} has no convolution or linear layer to train: divide the model "
            "elsewhere by ends"
        )
    last = max(reversed(inside), key=depths.__getitem__)
    norms = (
        node.name
        for node in spec.nodes
        if node.inputs == (last,) and isinstance(node.layer, BatchNorm | GroupNorm)
    )
    layers = {last, *norms}
    return frozenset(name for name in part.tensors if name.rsplit(".", 1)[0] in layers)
