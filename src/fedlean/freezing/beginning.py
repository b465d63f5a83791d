"""What of a model is frozen, and the beginning that is frozen as a whole as a model of its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from fedlean.spans import after, crossing, upto
from fedlean.spec import INPUT, ModelSpec


class Split(NamedTuple):
    """A model in two: the output of `beginning` is the activation of `name`, the rest's input."""

    beginning: ModelSpec
    rest: ModelSpec
    name: str


def frozen_blocks(spec: ModelSpec, blocks: Iterable[str]) -> frozenset[str]:
    """Parameters and buffers of those blocks: a BatchNorm among them keeps its statistics.

    Raises ValueError naming a block that the model lacks.
    """
    wanted = set(blocks)
    for block in sorted(wanted - spec.blocks.keys()):
        raise ValueError(f"the model has no block {block!r}; it has {', '.join(spec.blocks)}")
    layers = {node.name for node in spec.nodes if node.block in wanted}
    return frozenset(name for name in spec.tensor_shapes if name.rsplit(".", 1)[0] in layers)


def frozen_beginning(spec: ModelSpec, frozen: Iterable[str]) -> tuple[str, ...]:
    """The layers that hold nothing that trains, nor does anything below them, in their order.

    A BatchNorm trains unless its running statistics are frozen, too.
    """
    held, inside = set(frozen), {INPUT}
    trained = {name.rsplit(".", 1)[0] for name in spec.tensor_shapes if name not in held}
    for node in spec.nodes:
        if node.name not in trained and inside.issuperset(node.inputs):
            inside.add(node.name)
    return tuple(node.name for node in spec.nodes if node.name in inside)


def split(spec: ModelSpec, frozen: Iterable[str], *, at: str = "") -> Split:
    """The model cut after its largest frozen beginning, or at a layer of that, `at`.

    Raises ValueError where nothing is frozen at the beginning or everything is, and naming the
    tensors where more than one crosses the cut.
    """
    layers = frozen_beginning(spec, frozen)
    if not layers:
        raise ValueError(
            f"no beginning is frozen: layer {spec.nodes[0].name!r} or one beside it trains; open "
            "one session of the whole model"
        )
    if spec.nodes[-1].name in layers:
        raise ValueError("every layer that the output needs is frozen: there is nothing to train")
    if at and at not in layers:
        raise ValueError(
            f"{at!r} is not in the frozen beginning, which reaches to {layers[-1]!r} in the order "
            "of the layers: cut earlier, or freeze more"
        )
    name = at or _only(spec, layers)
    return Split(upto(spec, name), after(spec, name), name)


def split_alone(spec: ModelSpec, frozen: Iterable[str]) -> Split:
    """As `split`, but cut earlier where more than one tensor leaves the frozen beginning.

    That is so where the end of a residual block trains: its shortcut crosses, too.  What is frozen
    after the cut belongs to the rest, where it stays as it is.  Raises ValueError as `split`, where
    there is no earlier layer that all later ones read the model through.
    """
    frozen = frozenset(frozen)
    return split(spec, frozen, at=_last_alone(spec, frozen_beginning(spec, frozen)))


def _only(spec: ModelSpec, layers: tuple[str, ...]) -> str:
    """The one activation that leaves the beginning."""
    across = crossing(spec, layers)
    if len(across) == 1 and across[0] in layers:
        return across[0]
    remedy = f"cut at {name!r}" if (name := _last_alone(spec, layers)) else "freeze more or less"
    raise ValueError(
        f"more than one tensor leaves the frozen beginning: {', '.join(map(repr, across))}; "
        f"{remedy}, so that one tensor does"
    )


def _last_alone(spec: ModelSpec, layers: tuple[str, ...]) -> str:
    """The last of `layers` through which all later layers read the model; "" where none is."""
    return next((name for name in reversed(layers) if _crosses_alone(spec, name)), "")


def _crosses_alone(spec: ModelSpec, name: str) -> bool:
    return crossing(spec, upto(spec, name).by_name) == (name,)
