"""Where each activation lies in one block of memory: what is read no more makes room."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from fedlean.layers import Curve, Dropout, Flatten, ReLU, Scaler
from fedlean.spec import INPUT, ModelSpec, Node

VIEWS = (Flatten, Scaler, Dropout)  # the memory of what they read; two work in training only
IN_PLACE = (ReLU, Curve)  # may write where they read, if nobody else does


@dataclass(frozen=True)
class Buffers:
    """at: offset of each activation, in floats; size: of the block, in floats."""

    at: Mapping[str, int]
    size: int


class _Life(NamedTuple):
    begin: int  # the step that writes it
    end: int  # the last that reads it
    size: int


def buffers(spec: ModelSpec, nodes: Sequence[Node]) -> Buffers:
    """A plan for `nodes` run in that order, of one example, the input among the activations.

    Larger ones first, each at the lowest offset that is free as long as it lives.
    """
    owner = _owners(nodes)
    steps = {INPUT: 0} | {node.name: step for step, node in enumerate(nodes, 1)}
    lives: dict[str, _Life] = {}
    for name, step in steps.items():
        own = owner[name]
        begin = lives[own].begin if own in lives else step
        lives[own] = _Life(begin, step, max(prod(spec.shapes[name]), 1))
    for step, node in enumerate(nodes, 1):
        for source in node.inputs:
            life = lives[owner[source]]
            lives[owner[source]] = life._replace(end=max(life.end, step))
    last = owner[nodes[-1].name]
    lives[last] = lives[last]._replace(end=len(nodes) + 1)
    placed: dict[str, int] = {}
    for name in sorted(lives, key=lambda each: (-lives[each].size, lives[each].begin)):
        placed[name] = _lowest(lives[name], [(placed[each], lives[each]) for each in placed])
    size = max(placed[name] + lives[name].size for name in placed)
    return Buffers({name: placed[own] for name, own in owner.items()}, size)


def _owners(nodes: Sequence[Node]) -> dict[str, str]:
    """By activation, the one whose memory it is."""
    readers: dict[str, int] = {}
    for node in nodes:
        for source in node.inputs:
            readers[source] = readers.get(source, 0) + 1
    owner = {INPUT: INPUT}
    shared: set[str] = set()  # memory that a view and something else read
    for node in nodes:
        first = node.inputs[0]
        alone = readers[first] == 1 and owner[first] not in shared
        if isinstance(node.layer, VIEWS):
            owner[node.name] = owner[first]
            if readers[first] > 1:
                shared.add(owner[first])
        elif isinstance(node.layer, IN_PLACE) and alone:
            owner[node.name] = owner[first]
        else:
            owner[node.name] = node.name
    return owner


def _lowest(life: _Life, others: Sequence[tuple[int, _Life]]) -> int:
    """The lowest offset that nobody has who lives at the same time."""
    beside = sorted(
        (at, other.size)
        for at, other in others
        if other.begin <= life.end and life.begin <= other.end
    )
    free = 0
    for at, size in beside:
        if at - free >= life.size:
            return free
        free = max(free, at + size)
    return free
