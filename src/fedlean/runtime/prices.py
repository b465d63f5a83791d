"""What work costs on the devices of one step, each by its own profile, and who lacks the memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

from fedlean.algorithm import Device, profile_of
from fedlean.core import ClientTask, Work
from fedlean.cost.price import Cost, cost
from fedlean.cost.profile import Profile
from fedlean.printable import megabytes


@dataclass(frozen=True)
class Lack:
    """What a task takes and its device has not."""

    needed_bytes: int
    memory_bytes: int

    def __str__(self) -> str:
        return f"needs {megabytes(self.needed_bytes)}, has {megabytes(self.memory_bytes)}"


class Prices:
    """Equal work on equal devices is priced once.

    fallback: the profile of devices that have none of their own, and of clients not in `devices`.
    """

    def __init__(self, fallback: Profile, devices: Sequence[Device] = ()):
        self._fallback = fallback
        self._devices = {device.id: device for device in devices}
        self._profiles: dict[int, Profile] = {}  # of those that were asked for
        self._known: dict[tuple[Any, ...], Cost] = {}

    def device(self, client: int) -> Device:
        return self._devices.get(client, Device(client))

    def profile(self, client: int) -> Profile:
        if client not in self._devices:
            return self._fallback
        if client not in self._profiles:
            self._profiles[client] = profile_of(self._devices[client], self._fallback)
        return self._profiles[client]

    def of(self, task: ClientTask, works: Sequence[Work]) -> Cost:
        """The price of `works` on the task's device."""
        profile = self.profile(task.client)
        masked = any(work.kept for work in works)  # where memory decides between two ways
        key = (
            task.spec.hash,
            task.sub_model.frozen,
            *map(_key, works),
            *_rates(profile, with_memory=masked),
        )
        if key not in self._known:
            self._known[key] = cost(task, works, profile)
        return self._known[key]

    def lack(self, task: ClientTask, works: Sequence[Work]) -> Lack | None:
        """Where the task's device has a limit that `works` exceed."""
        has = self.device(task.client).memory_bytes
        if has is None:
            return None
        needs = self.of(task, works).peak_memory_bytes
        return Lack(needs, has) if needs > has else None


def _key(work: Work) -> tuple[Any, ...]:
    return tuple(
        tuple(sorted(each.items())) if isinstance(each, Mapping) else each
        for each in vars(work).values()
    )


def _rates(profile: Profile, *, with_memory: bool) -> tuple[Any, ...]:
    """What seconds depend on; measured times by the object, which lives as long as the profile."""
    plain = replace(profile, measured=None, memory_bytes=profile.memory_bytes if with_memory else 1)
    return (*astuple(plain), id(profile.measured))
