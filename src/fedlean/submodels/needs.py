"""What a client's round on a sub-model takes, held against what a device has for it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

from fedlean.algorithm import Device, profile_of
from fedlean.core import SubModel, Work
from fedlean.cost.price import Model, cost
from fedlean.cost.profile import Profile
from fedlean.cost.time import VALUE_BYTES, link_seconds
from fedlean.cost.way import peak_memory_bytes
from fedlean.spec import ModelSpec

# Of a message beside its values: names and shapes of tensors, settings, digests (ours, generous)
_TENSOR_BYTES, _MESSAGE_BYTES = 96, 4096


@dataclass(frozen=True)
class Needs:
    """Of `work` on `spec` under its masks; each figure is computed when it is asked for."""

    spec: ModelSpec
    work: Work

    @cached_property
    def memory_bytes(self) -> int:
        """The peak, to the byte what the native engine plans."""
        return peak_memory_bytes(self.spec, [self.work])

    @cached_property
    def message_bytes(self) -> int:
        """One way, at the most; of parameters, no statistics."""
        return _MESSAGE_BYTES + sum(
            _tensor_bytes(prod(shape), self.work.kept.get(name))
            for name, shape in self.spec.tensor_shapes.items()
        )

    def seconds(self, profile: Profile) -> float:
        """Of computing and of both ways of the link."""
        computing = cost(Model(self.spec, SubModel()), [self.work], profile).seconds
        return computing + link_seconds(self.message_bytes, self.message_bytes, profile)

    def within(self, device: Device, fallback: Profile) -> bool:
        """Whether it exceeds no limit that is known of the device."""
        return (
            (device.memory_bytes is None or self.memory_bytes <= device.memory_bytes)
            and (device.budget_bytes is None or 2 * self.message_bytes <= device.budget_bytes)
            and (
                device.budget_seconds is None
                or self.seconds(profile_of(device, fallback)) <= device.budget_seconds
            )
        )


def _tensor_bytes(size: int, kept: int | None) -> int:
    """Of its kept values and, where it has a mask, of the mask's bits."""
    if kept is None:
        return _TENSOR_BYTES + VALUE_BYTES * size
    return _TENSOR_BYTES + VALUE_BYTES * kept + size // 8 + 1
