"""Slicing a model by depth: residual units and other blocks that keep the shape are left out.

Dynamic model selection (Yao, arXiv 2409.08858) keeps a prefix of the units of each stage.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from fedlean.layers import Add
from fedlean.spec import INPUT, ModelSpec, Node
from fedlean.submodels.cut import Cut, whole_index

_UNIT = re.compile(r"(.+)_\d+")  # a block that is one of several in a stage: stage2_1


def depth(spec: ModelSpec, keep: int | Mapping[str, int]) -> Cut:
    """The model with the first `keep` units of each stage, or so many of the stages named.

    The units of a stage are the blocks STAGE_1, STAGE_2, ...: build residual models with
    blocks="unit".  A stage that is not named, or has no more units than that, stays whole.  Raises
    ValueError naming the stage that does not exist or the unit that cannot go, and for a count
    below 1.

    >>> from fedlean.models.resnet import resnet18
    >>> spec = resnet18((3, 32, 32), 10, blocks="unit")
    >>> list(depth(spec, {"stage2": 1, "stage3": 1}).spec.blocks)
    ['stem', 'stage1_1', 'stage1_2', 'stage2_1', 'stage3_1', 'stage4_1', 'stage4_2', 'head']
    """
    found = stages(spec)
    wanted = keep if isinstance(keep, Mapping) else dict.fromkeys(found, keep)
    if not found:
        raise ValueError(
            f"depth needs blocks named STAGE_1, STAGE_2, ..., got {', '.join(spec.blocks)}: build "
            'the model with blocks="unit", or name the blocks to `drop_blocks`'
        )
    for stage, count in wanted.items():
        if stage not in found:
            raise ValueError(f"no stage {stage!r} to shorten; there are {', '.join(found)}")
        if isinstance(count, bool) or count < 1:
            raise ValueError(f"a stage keeps 1 unit or more, got {count!r} of {stage!r}")
    return drop_blocks(spec, [u for stage, count in wanted.items() for u in found[stage][count:]])


def stages(spec: ModelSpec) -> dict[str, tuple[str, ...]]:
    """The blocks of each stage, in their order; blocks outside of stages are left out.

    >>> from fedlean.models.resnet import resnet18
    >>> stages(resnet18((3, 32, 32), 10, blocks="unit"))["stage3"]
    ('stage3_1', 'stage3_2')
    """
    found: dict[str, tuple[str, ...]] = {}
    for block in spec.blocks:
        if match := _UNIT.fullmatch(block):
            found[match[1]] = (*found.get(match[1], ()), block)
    return found


def drop_blocks(spec: ModelSpec, names: Iterable[str]) -> Cut:
    """The model without these blocks: what read one of them reads what it read.

    Of a block that is a residual unit and layers after it that change the shape, the unit goes and
    those layers stay (mobilenetv3_small's last convolution).  Raises ValueError naming the block
    that is unknown, that gives the model's output, that reads or gives more than one activation, or
    that changes the shape, as units that down-sample do.
    """
    small = spec
    for name in dict.fromkeys(names):
        if name not in spec.blocks:
            raise ValueError(f"no block {name!r} to drop; there are {', '.join(spec.blocks)}")
        small = _without(small, name)
    return Cut(small, whole_index(small), spec)


def _without(spec: ModelSpec, block: str) -> ModelSpec:
    gone = {node.name for node in spec.blocks[block]}
    entering, leaving = _ends(spec, gone)
    if len(entering) != 1 or len(leaving) > 1:
        raise ValueError(
            f"block {block!r} cannot be dropped: it must read one activation and give one, it "
            f"reads {', '.join(entering) or 'none'} and gives {', '.join(leaving) or 'none'}"
        )
    (source,), result = entering, leaving[0] if leaving else spec.nodes[-1].name
    if not leaving or spec.shapes[source] != spec.shapes[result]:
        unit = _residual_part(spec, block, source)
        if unit is None:
            raise ValueError(
                f"block {block!r} cannot be dropped: it must keep the shape of its input and have "
                f"layers after it, it turns {spec.shapes[source]} into {spec.shapes[result]}"
                f"{'' if leaving else ' and gives the output'}: drop another block"
            )
        gone, result = unit
    kept = (node for node in spec.nodes if node.name not in gone)
    return ModelSpec(spec.input_shape, tuple(_reading(node, {result: source}) for node in kept))


def _residual_part(spec: ModelSpec, block: str, source: str) -> tuple[set[str], str] | None:
    """The largest beginning of the block that ends where `source` itself is added, and its end."""
    for end in reversed(spec.blocks[block]):
        if isinstance(end.layer, Add) and source in end.inputs:
            part = {end.name}
            for node in reversed(spec.nodes):
                if node.name in part:
                    part |= {s for s in node.inputs if s != source}
            if _ends(spec, part) == ([source], [end.name]):
                return part, end.name
    return None


def _ends(spec: ModelSpec, inside: set[str]) -> tuple[list[str], list[str]]:
    """What nodes inside read from outside, and what nodes outside read from inside."""
    entering, leaving = set(), set()
    for node in spec.nodes:
        for source in node.inputs:
            if node.name in inside and source not in inside:
                entering.add(source)
            elif node.name not in inside and source in inside:
                leaving.add(source)
    order = [INPUT, *spec.by_name]
    return sorted(entering, key=order.index), sorted(leaving, key=order.index)


def _reading(node: Node, renamed: Mapping[str, str]) -> Node:
    return replace(node, inputs=tuple(renamed.get(source, source) for source in node.inputs))
