"""`cost`: what a client pays to compute, for the run's clock and for methods that plan by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import NamedTuple, Protocol

from fedlean.core import SubModel, Work
from fedlean.cost.flops import work_flops
from fedlean.cost.profile import Profile
from fedlean.cost.time import VALUE_BYTES, link_seconds, work_seconds
from fedlean.cost.way import Done, as_done, peak_memory_bytes
from fedlean.spec import ModelSpec


class Priced(Protocol):
    """What of a task its price depends on; a `ClientTask` is one."""

    @property
    def spec(self) -> ModelSpec: ...
    @property
    def sub_model(self) -> SubModel: ...


class Model(NamedTuple):
    """A task before there is one: what is priced to plan by."""

    spec: ModelSpec
    sub_model: SubModel


@dataclass(frozen=True)
class Cost:
    """Of one client's computation, nothing sent; each figure is computed when it is asked for."""

    spec: ModelSpec
    frozen: frozenset[str]
    done: tuple[Done, ...]  # the stretches of work as the device does them

    @property
    def seconds(self) -> float:
        return sum(one.seconds for one in self.done)

    @cached_property
    def flops(self) -> int:
        return sum(work_flops(self.spec, one.work, frozen=self.frozen) for one in self.done)

    @cached_property
    def flops_dense_gradient(self) -> int:
        """With the weights' gradients taken densely, as PruneFL counts."""
        return sum(
            work_flops(self.spec, one.work, dense_gradient=True, frozen=self.frozen)
            for one in self.done
        )

    @cached_property
    def peak_memory_bytes(self) -> int:
        """Of the neediest stretch, with those that stay in memory beside it."""
        works, slower = [one.work for one in self.done], [one.slower for one in self.done]
        return peak_memory_bytes(self.spec, works, frozen=self.frozen, slower=slower)


def cost(task: Priced, works: Sequence[Work], device: Profile) -> Cost:
    """The price on `device` of the `works` that a client did, or would do, for `task`.

    Masks are the works' own (`Work.kept`); of the task count its model and what is frozen.  Work on
    a span of the model is priced as work on that part alone.  Raises ValueError where it speaks of
    a span that the model does not have.
    """
    frozen = task.sub_model.frozen
    done = tuple(as_done(task.spec, work, device, frozen) for work in works)
    return Cost(task.spec, frozen, done)


def round_seconds(
    spec: ModelSpec,
    kept: Mapping[str, int],
    profile: Profile,
    *,
    batch_size: int,
    local_steps: int,
    frozen: frozenset[str] = frozenset(),
) -> float:
    """PruneFL's T(M) of a values-only round, as it is charged: monotone in every count, not linear.

    `kept` maps masked tensors to kept coordinates; the link is included.  Ours: on a profile
    without `dense_way` layers take their faster forms here, whatever the memory.  A layer that
    keeps more may be back in its faster form, and T would fall.
    """
    work = Work(local_steps, batch_size, kept=kept)
    if profile.dense_way:
        compute = cost(Model(spec, SubModel(frozen=frozen)), (work,), profile).seconds
    else:
        compute = work_seconds(spec, work, profile, frozen=frozen)
    values = sum(
        kept.get(name, prod(shape)) * VALUE_BYTES for name, shape in spec.tensor_shapes.items()
    )
    return compute + link_seconds(values, values, profile)
