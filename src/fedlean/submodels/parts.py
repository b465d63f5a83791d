"""A model divided into consecutive parts, for training one at a time and for early exits."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from fedlean.spans import crossing, upto
from fedlean.spec import ModelSpec

HEAD = "head"  # of a last part that is not one block of images


@dataclass(frozen=True)
class Part:
    """Consecutive layers; all that comes after reads the model through the activation of `end`."""

    name: str  # of its last block, or of the layer after which it ends
    end: str
    layers: tuple[str, ...]
    tensors: frozenset[str]  # parameters and buffers of its layers


def parts(spec: ModelSpec, ends: str = "") -> tuple[Part, ...]:
    """The parts of a model, the first of which has the input and the last the output.

    ends: blocks or layers after which it is divided, as "stage1 stage3"; "" divides it after each
    of its blocks that later layers read through one activation.  Then a block without weights
    belongs to the part before it, and a first block of one layer before a block of several (a stem)
    to the part after it.  What follows the last image is one part, and belongs to the part before
    it unless it has more than half of the model's parameters; without images that is so of a lone
    classifier.  A model of one block counts each layer with weights as a block.

    Raises ValueError naming an end that the model lacks or cannot be divided at, or before which
    nothing is left to train, and for a model that cannot be divided at all.

    >>> from fedlean.models.resnet import resnet18
    >>> [part.name for part in parts(resnet18((3, 32, 32), 10))]
    ['stage1', 'stage2', 'stage3', 'stage4']
    >>> [part.name for part in parts(resnet18((3, 32, 32), 10), "stage1 stage3")]
    ['stage1', 'stage3', 'stage4']
    """
    named = bool(ends.strip())
    found = _named(spec, ends) if named else _own(spec)
    made, before = [], set[str]()
    for name, end in found.items():
        own = upto(spec, end).by_name.keys() - before
        made.append(_part(spec, name, end, _in_order(spec, own)))
        before |= own
    rest = _in_order(spec, spec.by_name.keys() - before)
    divided = (*made, _part(spec, _last_name(spec, rest), spec.nodes[-1].name, rest))
    if named:
        _all_train(divided, list(found))
    return divided


def _all_train(divided: Sequence[Part], ends: Sequence[str]) -> None:
    """Raises ValueError for a part without weights, of those that end at `ends` and the last."""
    for number, part in enumerate(divided):
        if not part.tensors:
            after = f"after {ends[number - 1]!r}" if number else "at the beginning"
            until = f"up to {ends[number]!r}" if number < len(ends) else "to the end"
            raise ValueError(
                f"the model has no weights to train {after} {until}: of the ends "
                f"{' '.join(ends)!r}, leave one of these out"
            )


def _in_order(spec: ModelSpec, layers: set[str]) -> tuple[str, ...]:
    return tuple(name for name in spec.by_name if name in layers)


def _part(spec: ModelSpec, name: str, end: str, layers: tuple[str, ...]) -> Part:
    own = frozenset(tensor for tensor in spec.tensor_shapes if tensor.rsplit(".", 1)[0] in layers)
    return Part(name, end, layers, own)


def _last_name(spec: ModelSpec, layers: tuple[str, ...]) -> str:
    """Of its only block with images and weights, or HEAD."""
    weighted = [node for node in spec.weighted if node.name in layers]
    blocks = {node.block for node in weighted if len(spec.shapes[node.name]) > 1}
    return blocks.pop() if len(blocks) == 1 and len(spec.blocks) > 1 else HEAD


def _named(spec: ModelSpec, ends: str) -> dict[str, str]:
    found = {}
    for name in ends.replace(",", " ").split():
        if name in spec.blocks:
            end = spec.blocks[name][-1].name
        elif name in spec.by_name:
            end = name
        else:
            near = difflib.get_close_matches(name, [*spec.blocks, *spec.by_name], n=2)
            hint = f" (nearest: {' and '.join(near)})" if near else ""
            raise ValueError(
                f"ends: the model has no block or layer {name!r} to be divided after{hint}"
                f"{_able(spec)}"
            )
        if end == spec.nodes[-1].name:
            raise ValueError(
                f"ends: the model cannot be divided after {name!r}, its last layer: nothing follows"
                f"{_able(spec)}"
            )
        if not _alone(spec, end):
            raise ValueError(
                f"ends: the model cannot be divided after {name!r}: what follows must read the "
                f"model through one activation, and here reads several{_able(spec)}"
            )
        found[name] = end
    order = [node.name for node in spec.nodes]
    return dict(sorted(found.items(), key=lambda item: order.index(item[1])))


def _able(spec: ModelSpec) -> str:
    """Where the model can be divided, for a message: blocks, or layers where there are none."""

    def divides(end: str) -> bool:
        weighted = len(upto(spec, end).weighted)
        return 0 < weighted < len(spec.weighted) and _alone(spec, end)

    able = [name for name, nodes in spec.blocks.items() if divides(nodes[-1].name)]
    able = able or [name for name in spec.by_name if divides(name)]
    return f"; it can be divided after {', '.join(able)}" if able else ""


def _alone(spec: ModelSpec, end: str) -> bool:
    return crossing(spec, upto(spec, end).by_name) == (end,)


def _own(spec: ModelSpec) -> dict[str, str]:
    """Where the model's own blocks end, but for the last part."""
    output = spec.nodes[-1].name
    found = {
        name: end for name, end in block_ends(spec).items() if end != output and _alone(spec, end)
    }
    images = {name: end for name, end in found.items() if len(spec.shapes[end]) > 1}
    found = images or found
    after = spec.num_params - _num_params(spec, list(found.values())[-1]) if found else 0
    small = 2 * after <= spec.num_params if images else _num_weighted(spec, found) == 1
    if len(found) > 1 and small:
        found.popitem()
    if len(found) > 1 and _begins_with_stem(spec, *list(found.values())[:2]):
        del found[next(iter(found))]
    if not found:
        raise ValueError(
            "the model cannot be divided into parts: it needs two blocks or more with weights, "
            f"each read through its last layer only, and has {', '.join(spec.blocks)}: train it "
            f"with fedavg, or name layers as ends{_able(spec)}"
        )
    return found


def _num_params(spec: ModelSpec, end: str) -> int:
    return upto(spec, end).num_params


def _num_weighted(spec: ModelSpec, found: dict[str, str]) -> int:
    """Layers with weights after the last end."""
    if not found:
        return 0
    return len(spec.weighted) - len(upto(spec, list(found.values())[-1]).weighted)


def _begins_with_stem(spec: ModelSpec, first: str, second: str) -> bool:
    """Whether the first part is one layer and the second several."""
    counts = [len(upto(spec, end).weighted) for end in (first, second)]
    return counts[0] == 1 and counts[1] > 2


def block_ends(spec: ModelSpec) -> dict[str, str]:
    """The last layer of each block that holds weights, by block.

    A model of one block is taken layer by layer: each with what follows it up to the next weights.
    """
    if len(spec.blocks) > 1:
        weighted = {node.block for node in spec.weighted}
        return {b: nodes[-1].name for b, nodes in spec.blocks.items() if b in weighted}
    ends, owner = {}, ""
    for node in spec.nodes:
        owner = node.name if node in spec.weighted else owner
        if owner:
            ends[owner] = node.name
    return ends
