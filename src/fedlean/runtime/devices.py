"""What a run knows of its devices, from their files when it begins and from its folder later."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedlean.cost.profile import Profile, from_document, load_profile, to_document
from fedlean.fleet.fleet import Fleet
from fedlean.fleet.load import load_fleet, recorded
from fedlean.runtime.config import RunConfig


class Devices(NamedTuple):
    profile: Profile  # of those that have none of their own
    fleet: Fleet | None

    def check(self, clients: int) -> None:
        """Raises ValueError where the fleet is of another number of devices."""
        if self.fleet is not None:
            self.fleet.check(clients)


def load_devices(config: RunConfig) -> tuple[Devices, dict[str, Any]]:
    """And what `config.json` keeps of them: their files may change or go.

    Raises ValueError for a profile or a fleet that cannot be read.
    """
    profile = load_profile(config.device)
    kept: dict[str, Any] = {"profile": to_document(profile)}
    if config.fleet is None:
        return Devices(profile, None), kept
    fleet, kept["fleet_content"] = load_fleet(config.fleet, profile)
    return Devices(profile, fleet), kept


def recorded_devices(folder: Path, document: Mapping[str, Any]) -> Devices:
    """What the run began with; of an early run, the profile of that name.

    Raises ValueError where `config.json` is damaged.
    """
    if "profile" not in document:
        return Devices(load_profile(document["device"]), None)
    key = "profile"
    try:
        profile = from_document(document[key])
        if document.get("fleet") is None:
            return Devices(profile, None)
        key = "fleet_content"
        return Devices(profile, recorded(document.get(key), profile))
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} is damaged: {key}: {error}") from None
