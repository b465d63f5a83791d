"""May in-place layers be read as ordinary ones?  On torch.fx nodes, torch is not imported."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import fx

_HARMLESS = ("size", "dim", getattr)  # read no values


def refuse_visible_writes(
    nodes: Iterable[fx.Node],
    *,
    writes: Callable[[fx.Node], bool],
    shares_memory: Callable[[fx.Node], bool],
) -> None:
    """ValueError if a node reads a tensor that an earlier node changed under another name.

    `writes`: the node changes its first input in place and returns it.  `shares_memory`: it may
    return a view of its first input.
    """
    storage: dict[fx.Node, fx.Node] = {}  # node -> the first node with the same memory
    writers: dict[fx.Node, list[fx.Node]] = {}  # that node -> who changed it so far
    position = {node: index for index, node in enumerate(nodes)}
    for node in position:
        for source in node.all_input_nodes:
            late = [w for w in writers.get(storage[source], []) if position[w] > position[source]]
            if late and node.target not in _HARMLESS:
                raise ValueError(
                    f"layer {_label(late[0])!r} changes in place what {_label(node)!r} reads "
                    "later: use inplace=False"
                )
        storage[node] = node
        if node.all_input_nodes and (writes(node) or shares_memory(node)):
            storage[node] = storage[node.all_input_nodes[0]]
            if writes(node):
                writers.setdefault(storage[node], []).append(node)


def _label(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name
