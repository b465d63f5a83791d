"""Early exits: a classifier at the end of each block, and the models that end at one of them."""

from __future__ import annotations

from typing import NamedTuple

from fedlean.layers import Add, GlobalAvgPool, Linear
from fedlean.spans import crossing, upto
from fedlean.spec import ModelSpec, Node
from fedlean.submodels.cut import Cut, whole_index
from fedlean.submodels.parts import block_ends
from fedlean.submodels.stages import graft

PREFIX, ENSEMBLE = "exit_", "ensemble"


class Exits(NamedTuple):
    """`spec` has every exit, the last of which is the model's own output; `names` go downwards."""

    spec: ModelSpec
    names: tuple[str, ...]


def with_exits(spec: ModelSpec) -> Exits:
    """The model with an exit after each block but the first and the last.

    A block qualifies where it ends in one activation that all later layers read the model through,
    and holds weights.  An exit is global average pooling and a linear layer; of a vector the linear
    layer alone.  The first block is left out (a stem is no classifier) where others remain.  In a
    model of one block each layer with weights counts as one.

    Raises ValueError for a model without such a block.

    >>> from fedlean.models.resnet import resnet18
    >>> with_exits(resnet18((3, 32, 32), 10)).names
    ('exit_stage1', 'exit_stage2', 'exit_stage3', 'fc')
    """
    ends = block_ends(spec)
    output = spec.nodes[-1].name
    found = {
        block: end
        for block, end in ends.items()
        if end != output and crossing(spec, upto(spec, end).by_name) == (end,)
    }
    if len(found) > 1 and _is_last_before(spec, list(found.values())[-1]):
        found.popitem()  # its exit would be the model's own head
    if len(found) > 1 and next(iter(found)) == next(iter(ends)):
        del found[next(iter(found))]
    if not found:
        raise ValueError(
            "the model has no block after which it could end: it needs two blocks or more, each "
            "read through its last layer only"
        )
    for block, end in found.items():
        spec = graft(spec, _exit(spec, block, end), at=end)
    return Exits(spec, (*(f"{PREFIX}{block}" for block in found), output))


def ending_at(exits: Exits, count: int) -> Cut:
    """The model with the first `count` exits; its output is the sum of their logits.

    So no exit is a dead end: engines, costs and limits see all of them in a plain step.
    """
    *before, last = names = exits.names[:count]
    small = upto(exits.spec, last, also=before)
    if before:
        small = graft(small, [Node(ENSEMBLE, Add(), names, ENSEMBLE)], output=True)
    return Cut(small, whole_index(small), exits.spec)


def _exit(spec: ModelSpec, block: str, end: str) -> list[Node]:
    """Nodes that read "input"."""
    name, of = f"{PREFIX}{block}", PREFIX.rstrip("_")
    pool = Node(f"{name}_pool", GlobalAvgPool(), ("input",), of)
    image = len(spec.shapes[end]) > 1
    source = pool.name if image else "input"
    logits = Node(name, Linear(spec.output_shape[0]), (source,), of, prunable=False)
    return [pool, logits] if image else [logits]


def _is_last_before(spec: ModelSpec, end: str) -> bool:
    """Whether only a classifier follows: one layer with weights."""
    before = upto(spec, end).by_name
    return sum(node.name not in before for node in spec.weighted) == 1
