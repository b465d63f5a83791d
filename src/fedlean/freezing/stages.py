"""The stages of progressive training: at each one part of the model trains behind frozen ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fedlean.core import ClientUpdate, Masks, Model, Params
from fedlean.freezing.output_module import output_module
from fedlean.models.initialise import init_params
from fedlean.spec import ModelSpec
from fedlean.submodels.parts import Part
from fedlean.submodels.stages import graft, upto
from fedlean.tree import Fold, fold, read_only


@dataclass(frozen=True)
class Stage:
    """What clients hold while part `number` (from 0) trains."""

    number: int
    name: str  # of the part
    spec: ModelSpec  # the model up to the part, and an output module; the last is the whole model
    frozen: frozenset[str]  # parameters and buffers of the parts before it
    own: frozenset[str]  # of the part
    module: frozenset[str]  # of the output module; none in the last stage

    @property
    def own_params(self) -> frozenset[str]:
        """Of the part, without running statistics."""
        return self.own.intersection(self.spec.param_shapes)


def stage(
    spec: ModelSpec,
    parts: Sequence[Part],
    number: int,
    *,
    prefix: str = "surrogate",
    fc: str | None = None,
    norm: bool = False,
) -> Stage:
    """Stage `number` (from 0) of a model in `parts`; the last one has the model's own output.

    prefix, fc, norm: of `output_module`, which raises ValueError.
    """
    part, before = parts[number], parts[:number]
    frozen = frozenset[str]().union(*(one.tensors for one in before))
    if number == len(parts) - 1:
        return Stage(number, part.name, spec, frozen, part.tensors, frozenset())
    added = output_module(spec, parts, number, prefix=prefix, fc=fc, norm=norm)
    small = graft(upto(spec, part.end), added, output=True)
    module = frozenset(small.tensor_shapes).difference(frozen, part.tensors)
    return Stage(number, part.name, small, frozen, part.tensors, module)


def module_params(one: Stage, seed: int, init: str) -> dict[str, np.ndarray]:
    """First values of the tensors of its output module, drawn as `init` says."""
    return dict(init_params(one.spec, seed, init, only=one.module))


def stage_model(one: Stage, params: Params, extra: Params, masks: Masks | None = None) -> Model:
    """The stage's model: tensors and masks of the whole one, and of `extra` what that lacks."""
    names = one.spec.tensor_shapes
    return Model(
        one.spec,
        {name: params[name] if name in params else extra[name] for name in names},
        {name: mask for name, mask in (masks or {}).items() if name in names},
    )


def merge_stage(
    spec: ModelSpec, params: Params, extra: Params, updates: Iterable[ClientUpdate]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """`params` of the whole model and `extra`, those of modules, with the answers merged into them.

    Tensors that no answer trains are the same arrays as before.  The others are read-only, so that
    those of a part that is frozen from now on are hashed once and not for every message.
    """
    before = {**params, **extra}
    merged = settled(before, fold(before, updates, variances=spec.variances))
    return {name: merged[name] for name in params}, {name: merged[name] for name in extra}


def settled(before: Params, merge: Fold) -> dict[str, np.ndarray]:
    """What the merge into `before` gives, of which new arrays are read-only."""
    merged = merge.params()
    read_only({name: value for name, value in merged.items() if value is not before[name]})
    return merged


def check_rounds(count: int, rounds: int) -> None:
    """Raises ValueError with the remedy where `count` stages have not a round each."""
    if rounds < count:
        raise ValueError(
            f"{count} stages need {count} rounds or more, got {rounds}: take more rounds, or "
            "divide the model into fewer parts with ends"
        )


def deadline(number: int, count: int, rounds: int) -> int:
    """The round after which stage `number` (from 0) of `count` ends at the latest.

    Every stage may take an equal share of the rounds and what the ones before it have left, so that
    none is starved (ours).

    >>> [deadline(number, 4, 10) for number in range(4)]
    [2, 5, 7, 10]
    """
    return rounds * (number + 1) // count
