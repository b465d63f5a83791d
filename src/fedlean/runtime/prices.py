"""What work costs on the devices of a step, each by its own profile, and what they lack for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any, Literal

from fedlean import wire
from fedlean.algorithm import Device, FederatedAlgorithm, profile_of
from fedlean.core import ClientTask, Work
from fedlean.cost.price import Cost, cost
from fedlean.cost.profile import Profile
from fedlean.cost.time import link_seconds
from fedlean.printable import megabytes


@dataclass(frozen=True)
class Lack:
    """What a task takes and its device has not: bytes, or seconds."""

    needs: float
    has: float
    of: Literal["memory", "traffic", "time"] = "memory"

    def __str__(self) -> str:
        on_the_link = " of traffic" if self.of == "traffic" else ""
        return f"needs {self.shown(self.needs)}{on_the_link}, has {self.shown(self.has)}"

    def shown(self, amount: float) -> str:
        return f"{amount:.3g} s" if self.of == "time" else megabytes(amount)


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

    def over_budget(
        self,
        task: ClientTask,
        works: Sequence[Work] | None,
        algorithm: FederatedAlgorithm,
        known: wire.Known,
    ) -> Lack | None:
        """Where a round of `task` exceeds what may travel for its device, or how long it may take.

        Counted are its message to a device that holds `known` and the largest answer.  works: None
        where the method does not say what it takes, so that its time is not known.
        """
        device = self.device(task.client)
        if device.budget_bytes is None and device.budget_seconds is None:
            return None
        forms, with_params = algorithm.statistics(task), algorithm.sends_params(task)
        down = wire.task_bytes(task, known)
        up = wire.answer_bytes(task, forms, works or (), params=with_params)
        if device.budget_bytes is not None and down + up > device.budget_bytes:
            return Lack(down + up, device.budget_bytes, "traffic")
        if device.budget_seconds is None or works is None:
            return None
        link = link_seconds(down, up, self.profile(task.client))
        seconds = self.of(task, works).seconds + link
        over = seconds > device.budget_seconds
        return Lack(seconds, device.budget_seconds, "time") if over else None


def _key(work: Work) -> tuple[Any, ...]:
    return tuple(
        tuple(sorted(each.items())) if isinstance(each, Mapping) else each
        for each in vars(work).values()
    )


def _rates(profile: Profile, *, with_memory: bool) -> tuple[Any, ...]:
    """What seconds depend on; measured times by the object, which lives as long as the profile."""
    plain = replace(profile, measured=None, memory_bytes=profile.memory_bytes if with_memory else 1)
    return (*astuple(plain), id(profile.measured))
