"""A stretch of work as what it ran: a span of the task's model, or a narrower one."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import NamedTuple

from fedlean.core import Work
from fedlean.narrowed import narrowed
from fedlean.spans import span
from fedlean.spec import ModelSpec

FLOAT_BYTES = 4


class Stretch(NamedTuple):
    spec: ModelSpec  # that ran
    work: Work  # its masks and taps are those of `spec`
    frozen: frozenset[str]


def stretch(spec: ModelSpec, work: Work, frozen: frozenset[str] = frozenset()) -> Stretch:
    """The work in the terms of the span or slice that it ran; the whole model's is as it was.

    Raises ValueError naming the layer where `work` speaks of none of the model's spans, for a width
    that the model cannot have, and for masks on a narrower model.
    """
    if work.width != 1:
        if work.kept:
            raise ValueError(f"work on {work.width:g} of the channels is dense, got masks")
        spec = narrowed(spec, work.width)
    if not is_span(work):
        return Stretch(spec, work, frozen)
    part = span(spec, work.begin, work.end)
    kept = {name: count for name, count in work.kept.items() if name in part.tensor_shapes}
    taps = tuple(name for name in work.taps if name in part.by_name)
    return Stretch(part, replace(work, kept=kept, taps=taps), _within(part, frozen))


def is_span(work: Work) -> bool:
    return bool(work.begin or work.end)


def held_bytes(spec: ModelSpec, work: Work) -> int:
    """Of the arrays that lie outside the engine; `spec` is the task's model."""
    if not work.held_examples:
        return FLOAT_BYTES * work.held_floats
    spec = spec if work.width == 1 else narrowed(spec, work.width)
    shape = spec.shapes[work.begin or work.end or spec.nodes[-1].name]
    return FLOAT_BYTES * (work.held_examples * prod(shape) + work.held_floats)


@lru_cache(maxsize=256)
def _within(part: ModelSpec, frozen: frozenset[str]) -> frozenset[str]:
    """The same object for the same span: caches are asked with it."""
    return frozen.intersection(part.tensor_shapes)
