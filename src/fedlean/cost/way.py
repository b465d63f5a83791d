"""Which of its ways a device computes: the shorter of those that it has and that fit its memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from fedlean.core import Work
from fedlean.cost.flops import importance_parts
from fedlean.cost.profile import Profile
from fedlean.cost.stretch import held_bytes, is_span, stretch
from fedlean.cost.time import work_seconds
from fedlean.engine.forms import NONE, enough_bytes, forward_forms, step_forms
from fedlean.engine.memory import ForwardMemory, StepMemory, forward_memory, step_memory
from fedlean.spec import ModelSpec


class Done(NamedTuple):
    work: Work  # without masks where it was done densely
    seconds: float
    slower: frozenset[str] = NONE  # layers in the slower of their two forms (`engine.forms`)


def as_done(
    spec: ModelSpec, work: Work, profile: Profile, frozen: frozenset[str] = frozenset()
) -> Done:
    """The work as the device does it, so that its memory and its FLOPs are of one execution.

    Its seconds, too, but for sparse steps with the dense weight gradient: those take the shorter
    way each.  It is the shorter of the sparse and the dense way where both fit the device's memory,
    and otherwise the one that fits; where neither does, the sparse one, which so never takes less
    time for keeping more.  A profile without `dense_way` has the sparse one only, whose layers take
    their slower forms where the device's memory asks for it, as they do in the engine.
    """
    if not work.kept:
        return Done(work, work_seconds(spec, work, profile, frozen=frozen))
    if not profile.dense_way:
        return _sparse_way(spec, work, profile, frozen)
    dense = replace(work, kept={})
    own = stretch(spec, work, frozen)
    held = _dense_memory(own.spec, *_of(own.work), own.frozen)
    room = profile.memory_bytes - held_bytes(spec, work)
    if held.peak_bytes > room:
        return _sparse_way(spec, work, profile, frozen, dense_too=False)
    dense_seconds = work_seconds(spec, dense, profile, frozen=frozen)
    sparse = _sparse_way(spec, work, profile, frozen)
    if sparse.seconds < dense_seconds and _sparse_fits(*own, room, held, sparse.slower):
        return sparse
    return Done(dense, dense_seconds)


def _sparse_way(
    spec: ModelSpec,
    work: Work,
    profile: Profile,
    frozen: frozenset[str],
    *,
    dense_too: bool = True,
) -> Done:
    slower = _forms(*stretch(spec, work, frozen), profile.memory_bytes)
    seconds = work_seconds(spec, work, profile, frozen=frozen, dense_too=dense_too, slower=slower)
    return Done(work, seconds, slower)


def _forms(
    spec: ModelSpec, work: Work, frozen: frozenset[str], memory_bytes: int
) -> frozenset[str]:
    """Of the span that the work ran, as the session that it opens takes them."""
    if not work.steps:
        return forward_forms(spec, work.kept, memory_bytes, batch_size=work.batch_size)
    return step_forms(
        spec,
        work.kept,
        memory_bytes,
        batch_size=work.batch_size,
        optimizer_floats=work.optimizer_floats,
        frozen=frozen,
    )


def work_memory_bytes(
    spec: ModelSpec,
    work: Work,
    *,
    frozen: frozenset[str] = frozenset(),
    sparse: bool = True,
    slower: frozenset[str] = NONE,
) -> int:
    """Modelled peak of a device that stores only what it trains (see `engine.memory`).

    It is that of the stretch alone, with what it holds outside the engine.  Work of
    forward passes alone needs no more than those: what is frozen may be perturbed in them, unless
    they are of a span.  `slower`: as of `Done`.
    """
    own = stretch(spec, work, frozen)
    return stretch_memory(*own, sparse, slower).peak_bytes + held_bytes(spec, work)


def peak_memory_bytes(
    spec: ModelSpec,
    works: Sequence[Work],
    *,
    frozen: frozenset[str] = frozenset(),
    sparse: bool = True,
    slower: Sequence[frozenset[str]] | None = None,
) -> int:
    """Of the neediest stretch, with those before it that stay in memory beside it.

    slower: as of `Done`, for each of the works; None: the faster forms.
    """
    alone = [
        work_memory_bytes(spec, work, frozen=frozen, sparse=sparse, slower=forms)
        for work, forms in zip(works, slower or [NONE] * len(works), strict=True)
    ]
    together = (sum(alone[max(0, i - work.beside) : i + 1]) for i, work in enumerate(works))
    return max(together, default=0)


def stretch_memory(
    spec: ModelSpec,
    work: Work,
    frozen: frozenset[str],
    sparse: bool = True,
    slower: frozenset[str] = NONE,
) -> StepMemory | ForwardMemory:
    """`spec` and `frozen` are of the span that the work ran."""
    if not work.steps:
        return forward_memory(
            spec,
            work.kept,
            batch_size=work.batch_size,
            frozen=frozen if is_span(work) else frozenset(),
            taps=work.taps,
            sparse=sparse,
            slower=slower,
        )
    return step_memory(
        spec,
        work.kept,
        batch_size=work.batch_size,
        optimizer_floats=work.optimizer_floats,
        frozen=frozen,
        importance=work.importance_steps > 0,
        taps=work.taps,
        pieces=[one.pieces for one in importance_parts(spec, work, frozen)],
        sparse=sparse,
        slower=slower,
    )


def _of(work: Work) -> tuple[int, bool, int, int, int, int, bool, tuple[str, ...]]:
    """What its memory depends on beside the masks and the model."""
    return (
        work.batch_size,
        work.steps > 0,
        work.importance_steps if work.piece_bytes else int(work.importance_steps > 0),
        work.optimizer_floats,
        work.piece_bytes,
        work.first_piece,
        is_span(work),
        work.taps,
    )


@lru_cache(maxsize=64)
def _dense_memory(
    spec: ModelSpec,
    batch_size: int,
    steps: bool,
    importance_steps: int,
    optimizer_floats: int,
    piece_bytes: int,
    first_piece: int,
    of_span: bool,
    taps: tuple[str, ...],
    frozen: frozenset[str],
) -> StepMemory | ForwardMemory:
    """Once for all masks: a time model asks for thousands."""
    work = Work(
        int(steps),
        batch_size,
        importance_steps,
        optimizer_floats=optimizer_floats,
        piece_bytes=piece_bytes,
        first_piece=first_piece,
        end=spec.nodes[-1].name if of_span else "",
        taps=taps,
    )
    return stretch_memory(spec, work, frozen)


def _sparse_fits(
    spec: ModelSpec,
    work: Work,
    frozen: frozenset[str],
    room: int,
    dense: StepMemory | ForwardMemory,
    slower: frozenset[str],
) -> bool:
    if not slower and enough_bytes(dense, work.kept) <= room:  # most devices need no plan
        return True
    return stretch_memory(spec, work, frozen, slower=slower).peak_bytes <= room
