"""A stretch of a model between two activations, as a model of its own.

Tensors keep their names, so that the parts of a model share its parameters.  Everything here is a
pure function of specs; what adds to a model or rewires it is in `fedlean.submodels.stages`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache

from fedlean.spec import INPUT, ModelSpec

_NEAR = 40  # layers that are tried for a better place to cut


def check_node(spec: ModelSpec, name: str) -> None:
    """ValueError naming the node that the model lacks, and those that it has."""
    if name not in spec.by_name:
        raise ValueError(f"the model has no layer {name!r}; it has {_listed(spec.by_name)}")


def upto(spec: ModelSpec, name: str, *, also: Iterable[str] = ()) -> ModelSpec:
    """The layers that `name` needs; its activation becomes the output.

    Those that `also` names stay too, with what they need: exits and projectors, which nothing
    reads.  Raises ValueError naming a layer that the model lacks, or one that would have to come
    after the output.
    """
    others = tuple(also)
    for one in (name, *others):
        check_node(spec, one)
    kept = _needed(spec, (name, *others))
    nodes = [node for node in spec.nodes if node.name in kept and node.name != name]
    for node in nodes:
        if name in node.inputs:
            raise ValueError(
                f"layer {node.name!r} reads {name!r}, which cannot be the output then: the last "
                f"layer is, and nothing reads it; leave {node.name!r} out"
            )
    return ModelSpec(spec.input_shape, (*nodes, spec.by_name[name]))


def after(spec: ModelSpec, name: str) -> ModelSpec:
    """The layers that `upto(spec, name)` lacks; the activation of `name` is their input.

    Raises ValueError naming the tensors where more than that one crosses the cut, and where there
    is nothing after it.
    """
    check_node(spec, name)
    before = _needed(spec, (name,))
    rest = [node for node in spec.nodes if node.name not in before]
    if not rest or spec.nodes[-1].name == name:
        raise ValueError(f"{name!r} is the output of the model: there is nothing after it")
    if also := [source for source in crossing(spec, before) if source != name]:
        near = _nearest_cut(spec, name)
        remedy = f"cut where one tensor crosses, as at {near!r}" if near else "cut elsewhere"
        raise ValueError(
            f"the model cannot be cut at {name!r}: {_listed(also)} of what lies before is read "
            f"after it, too; {remedy}"
        )
    return ModelSpec(
        spec.shapes[name],
        tuple(
            replace(node, inputs=tuple(INPUT if s == name else s for s in node.inputs))
            for node in rest
        ),
    )


@lru_cache(maxsize=256)
def span(spec: ModelSpec, begin: str = "", end: str = "") -> ModelSpec:
    """From the activation of `begin` to that of `end`; "" is the model's input or output.

    Raises ValueError as `upto` and `after` do, also where `end` does not come after `begin`.
    """
    part = upto(spec, end) if end else spec
    if not begin:
        return part
    check_node(spec, begin)
    if begin not in part.by_name:
        raise ValueError(f"the layer {end!r} does not need {begin!r}: no span between them")
    return after(part, begin)


def crossing(spec: ModelSpec, before: Iterable[str]) -> tuple[str, ...]:
    """Activations (the model's input may be one) of the layers `before` that others read."""
    inside = {INPUT, *before}
    read = {s for node in spec.nodes if node.name not in inside for s in node.inputs}
    return tuple(name for name in (INPUT, *spec.by_name) if name in inside and name in read)


def _nearest_cut(spec: ModelSpec, name: str) -> str | None:
    """A layer near `name` at which one tensor crosses; only a few are tried."""
    names = [node.name for node in spec.nodes[:-1]]
    here = names.index(name)
    near = sorted(range(len(names)), key=lambda i: abs(i - here))[:_NEAR]
    return next(
        (names[i] for i in near if crossing(spec, _needed(spec, (names[i],))) == (names[i],)), None
    )


def _needed(spec: ModelSpec, names: Iterable[str]) -> set[str]:
    """The layers `names` and all that they read, directly or not."""
    kept, waiting = set[str](), list(names)
    while waiting:
        name = waiting.pop()
        if name not in kept and name != INPUT:
            kept.add(name)
            waiting += spec.by_name[name].inputs
    return kept


def _listed(names: Iterable[str]) -> str:
    """The names, and of many the first and the last."""
    quoted = [repr(name) for name in names]
    if len(quoted) > 8:
        quoted = [*quoted[:4], "...", *quoted[-4:]]
    return ", ".join(quoted)
