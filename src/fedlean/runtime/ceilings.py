"""What devices have shown that they cannot hold, whatever they say of their memory.

A node says what is left of its limit before a task comes; the message and what it decodes into take
some of that.  Asked for as much as it says, it would refuse each time, and say the same again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from fedlean.algorithm import Device


class _Ceiling(NamedTuple):
    said_bytes: int | None  # when it refused; None: no limit
    most_bytes: int


class Ceilings:
    """By client, until its device says that it has more than when it refused."""

    def __init__(self) -> None:
        self._ceilings: dict[int, _Ceiling] = {}
        self._said: dict[int, int | None] = {}  # by client, as of the last devices

    def under(self, devices: Iterable[Device]) -> list[Device]:
        """The devices, each with no more memory than it can be taken to have."""
        devices = list(devices)
        self._said = {device.id: device.memory_bytes for device in devices}
        return [self._lowered(device) for device in devices]

    def lower(self, client: int, needed_bytes: int) -> None:
        """Its device cannot hold a task of `needed_bytes`."""
        most_bytes = max(0, needed_bytes - 1)
        self._ceilings[client] = _Ceiling(self._said.get(client), most_bytes)

    def _lowered(self, device: Device) -> Device:
        ceiling = self._ceilings.get(device.id)
        if ceiling is None:
            return device
        said, before = device.memory_bytes, ceiling.said_bytes
        if before is not None and (said is None or said > before):
            del self._ceilings[device.id]
            return device
        most = ceiling.most_bytes if said is None else min(said, ceiling.most_bytes)
        return replace(device, memory_bytes=most)
