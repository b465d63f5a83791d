"""What a round of training on a model takes of a device: for methods that choose by it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from fedlean import wire
from fedlean.algorithm import Device, profile_of
from fedlean.core import ClientTask, Masks, SubModel, Work
from fedlean.cost.price import Model, cost
from fedlean.cost.profile import Profile
from fedlean.cost.time import link_seconds
from fedlean.cost.way import peak_memory_bytes
from fedlean.spec import ModelSpec

HPARAMS_BYTES = 512  # room for what a task says beside its model


def has_limits(device: Device) -> bool:
    """Whether anything is known that a task may exceed."""
    limits = (device.memory_bytes, device.budget_bytes, device.budget_seconds)
    return any(limit is not None for limit in limits)


@dataclass(frozen=True)
class Needs:
    """Of a client that is sent a model, does `works` and sends back what it trained.

    Each figure is worked out when it is asked for.  Bytes are those of the round in which the
    model's structure travels, no less than what the runtime holds a task to; statistics are not in
    them.
    """

    spec: ModelSpec
    works: tuple[Work, ...]
    masks: Masks = field(default_factory=dict)  # those of `works` count kept weights

    @cached_property
    def memory_bytes(self) -> int:
        """The native engine's plan, to the byte."""
        return peak_memory_bytes(self.spec, self.works)

    @cached_property
    def downlink_bytes(self) -> int:
        return wire.task_bytes(self._task) + HPARAMS_BYTES

    @cached_property
    def uplink_bytes(self) -> int:
        return wire.answer_bytes(self._task, {}, self.works)

    @property
    def traffic_bytes(self) -> int:
        """Both ways."""
        return self.downlink_bytes + self.uplink_bytes

    @property
    def _task(self) -> ClientTask:
        nothing, shapes = np.float32(0), self.spec.tensor_shapes
        values = {name: np.broadcast_to(nothing, shape) for name, shape in shapes.items()}
        return ClientTask(1, "train", 0, 0, self.spec, values, SubModel(self.masks), {})

    def seconds(self, profile: Profile) -> float:
        """Of the works and both ways of the link."""
        computing = cost(Model(self.spec, SubModel()), self.works, profile).seconds
        return computing + link_seconds(self.downlink_bytes, self.uplink_bytes, profile)

    def within(self, device: Device, fallback: Profile) -> bool:
        """Whether memory and budgets of the device are enough, where they are known.

        fallback: the profile of a device that has none of its own.
        """
        if device.memory_bytes is not None and self.memory_bytes > device.memory_bytes:
            return False
        if device.budget_bytes is not None and self.traffic_bytes > device.budget_bytes:
            return False
        if device.budget_seconds is None:
            return True
        return self.seconds(profile_of(device, fallback)) <= device.budget_seconds
