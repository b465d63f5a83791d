"""Stages of a model: its beginning with another end, dead ends beside it, parts that stand in.

Pure functions of specs, for training block by block and for models with several exits.  Tensors
keep their names.  `upto`, `after` and `span` are those of `fedlean.spans`, which costs use, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from fedlean.spans import after, check_node, span, upto
from fedlean.spec import INPUT, ModelSpec, Node

__all__ = ["after", "graft", "reroute", "span", "upto"]


def graft(
    spec: ModelSpec, nodes: Iterable[Node], *, at: str = "", output: bool = False
) -> ModelSpec:
    """The model with `nodes` added, in an order in which each comes after what it reads.

    at: the layer whose activation `nodes` read as "input"; "" is the model's own input.
    output: whether the last of `nodes` becomes the output; otherwise they are dead ends.

    Raises ValueError naming a name that the model has already, a layer that it lacks, and a dead
    end that reads the output, which nothing may.
    """
    added = tuple(nodes)
    if not added:
        raise ValueError("there are no nodes to graft")
    for node in added:
        if node.name in spec.by_name or node.name == INPUT:
            raise ValueError(f"the model has a layer {node.name!r} already: graft a new name")
    if at:
        check_node(spec, at)
        added = tuple(_reading(node, INPUT, at) for node in added)
    if output:
        return ModelSpec(spec.input_shape, (*spec.nodes, *added))
    *others, last = spec.nodes
    _check_unread(last.name, added)
    return ModelSpec(spec.input_shape, (*others, *added, last))


def reroute(spec: ModelSpec, old: str, new: str, *, keep: bool = False) -> ModelSpec:
    """The model in which who read `old` reads `new`; where `old` was the output, `new` becomes it.

    What `new` itself needs reads `old` as before.  Layers that nobody reads any more because of
    this go, unless `keep`: `old`, and what only `old` needed.  Layers are put into an order in
    which each comes after what it reads.

    Raises ValueError naming a layer that the model lacks, one that would read the output, and one
    whose inputs do not fit.
    """
    for name in (old, new):
        check_node(spec, name)
    if old == new:
        raise ValueError(f"{old!r} cannot be read in place of itself: name two layers")
    own = upto(spec, new).by_name
    nodes = [node if node.name in own else _reading(node, old, new) for node in spec.nodes]
    output = new if spec.nodes[-1].name == old else spec.nodes[-1].name
    if not keep:
        nodes = _without(nodes, old, output)
    return ModelSpec(spec.input_shape, _in_order(nodes, output))


def _check_unread(output: str, nodes: Iterable[Node]) -> None:
    """ValueError naming the node that would have to come after the output."""
    for node in nodes:
        if output in node.inputs:
            raise ValueError(
                f"layer {node.name!r} would read {output!r}, the output, which nothing may: make "
                "another layer the output, or read an earlier one"
            )


def _reading(node: Node, old: str, new: str) -> Node:
    return replace(node, inputs=tuple(new if s == old else s for s in node.inputs))


def _without(nodes: Sequence[Node], old: str, output: str) -> list[Node]:
    """Without `old` where nobody reads it, and without what only it needed."""
    kept, waiting = {node.name: node for node in nodes}, [old]
    while waiting:
        name = waiting.pop()
        read = name == output or any(name in node.inputs for node in kept.values())
        if name in kept and not read:
            waiting += kept.pop(name).inputs
    return list(kept.values())


def _in_order(nodes: Sequence[Node], output: str) -> tuple[Node, ...]:
    """Each after what it reads, `output` last, otherwise as they are."""
    _check_unread(output, nodes)
    by_name = {node.name: node for node in nodes}
    ordered: dict[str, Node] = {}

    def place(name: str) -> None:
        waiting = [name]
        while waiting:
            node = by_name[waiting[-1]]
            missing = [s for s in node.inputs if s != INPUT and s not in ordered]
            waiting += missing
            if not missing:
                ordered[waiting.pop()] = node

    for name in by_name:
        if name != output:
            place(name)
    ordered.pop(output, None)
    return (*ordered.values(), by_name[output])
