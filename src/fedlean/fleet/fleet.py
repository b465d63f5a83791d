"""The devices of a run, step by step: a pure function of the seed and the step."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedlean.algorithm import Device
from fedlean.core import generator
from fedlean.cost.profile import Profile, faster
from fedlean.fleet.quantity import Bounds, Quantity

# What may differ from the profile of a device.  `present` is the probability that it is there.
QUANTITIES: Mapping[str, Bounds] = {
    "memory_bytes": Bounds("bytes", 1, 1e18),
    "uplink_bytes_per_second": Bounds("bytes per second", 1e-3, 1e18),
    "downlink_bytes_per_second": Bounds("bytes per second", 1e-3, 1e18),
    "budget_bytes": Bounds("bytes", 1, 1e18),
    "budget_seconds": Bounds("seconds", 1e-6, 1e12),
    "compute_factor": Bounds("a speed relative to the profile's", 1e-6, 1e6),
    "present": Bounds("a probability", 0, 1),
}


@dataclass(frozen=True)
class Member:
    """What is known of one device for some time: its profile, and what differs from that."""

    profile: Profile
    own: Mapping[str, Quantity] = field(default_factory=dict)  # by a name of QUANTITIES

    def at(self, seed: int, step: int, device: int) -> Device | None:
        """The device at one step; None where it is away."""
        drawn = {name: each.value(seed, step, device, name) for name, each in self.own.items()}
        if "present" in drawn:
            share = float(generator(seed, step, device, "fleet is there").random())
            if share >= drawn["present"]:
                return None
        profile = faster(self.profile, drawn.get("compute_factor", 1.0))
        up, down = (f"{way}link_bytes_per_second" for way in ("up", "down"))
        if up in drawn or down in drawn:
            profile = replace(
                profile,
                uplink_bytes_per_s=drawn.get(up, profile.uplink_bytes_per_s),
                downlink_bytes_per_s=drawn.get(down, profile.downlink_bytes_per_s),
            )
        bytes_a_round = drawn.get("budget_bytes")
        return Device(
            device,
            profile=profile,
            memory_bytes=int(drawn.get("memory_bytes", profile.memory_bytes)),
            budget_bytes=None if bytes_a_round is None else int(bytes_a_round),
            budget_seconds=drawn.get("budget_seconds"),
        )


@dataclass(frozen=True)
class Timeline:
    """What is known of one device, from which step on; before the first of them it is away."""

    begins: tuple[int, ...]  # ascending
    members: tuple[Member, ...]

    def at(self, step: int) -> Member | None:
        position = bisect_right(self.begins, step)
        return self.members[position - 1] if position else None


def always(member: Member) -> Timeline:
    return Timeline((0,), (member,))


@dataclass(frozen=True)
class Fleet:
    """size: how many devices it is of; None: of as many as a run has, all of the one timeline."""

    timelines: Sequence[Timeline]
    size: int | None

    def present(self, seed: int, step: int, clients: int) -> list[Device]:
        """Those of devices 0 to `clients` - 1 that are there at a step (from 1), by number.

        Raises ValueError for another number of clients than it is of.
        """
        self.check(clients)
        found = []
        for device in range(clients):
            timeline = self.timelines[0 if self.size is None else device]
            member = timeline.at(step)
            if member is not None and (one := member.at(seed, step, device)) is not None:
                found.append(one)
        return found

    def check(self, clients: int) -> None:
        """Raises ValueError for another number of clients than it is of."""
        if self.size not in (None, clients):
            raise ValueError(
                f"the fleet has {self.size} devices, the run has {clients} clients: choose "
                f"--clients {self.size}, or change the fleet"
            )
