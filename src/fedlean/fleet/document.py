"""A fleet as a TOML or JSON document: how many devices of which kinds, or a trace with defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from fedlean.cost.profile import Profile
from fedlean.fleet.fleet import QUANTITIES, Fleet, Member, Timeline, always
from fedlean.fleet.quantity import quantity_from
from fedlean.fleet.table import MAX_DEVICES, parse_table

KIND = ("profile", *QUANTITIES)  # what a document says of devices
TOP = ("devices", "trace", "round_seconds", *KIND)
ROUND_SECONDS = (1e-6, 1e12)


def parse_document(
    document: Any,
    *,
    profiles: Callable[[str], Profile],
    fallback: Profile,
    read: Callable[[str], str],
) -> Fleet:
    """profiles: by name; fallback: of devices that name none; read: the text of another file.

    Raises ValueError naming the key and what was expected there.
    """
    if not isinstance(document, Mapping):
        raise ValueError(f"expected keys and values, got a {type(document).__name__}")
    _check_keys(document, TOP, "")
    defaults = _member(document, Member(fallback), profiles, "")
    devices = document.get("devices")
    if "trace" in document:
        if devices is not None:
            raise ValueError("devices and trace say the same: keep one of them")
        return _traced(document, profiles, defaults, read)
    if "round_seconds" in document:
        raise ValueError("round_seconds is of a trace, and there is none")
    if devices is None:
        return Fleet((always(defaults),), None)
    if isinstance(devices, list):
        return _of_kinds(devices, profiles, defaults)
    return Fleet((always(defaults),) * _count(devices, "devices"), _count(devices, "devices"))


def _of_kinds(devices: list[Any], profiles: Callable[[str], Profile], defaults: Member) -> Fleet:
    """One table per device, or per `count` of them that are alike; numbered as they come."""
    timelines: list[Timeline] = []
    for position, kind in enumerate(devices):
        where = f"devices[{position}]"
        if not isinstance(kind, Mapping):
            raise ValueError(f"{where} is {kind!r:.60}, expected a table")
        _check_keys(kind, ("count", *KIND), f"{where}: ")
        count = _count(kind.get("count", 1), f"{where}: count")
        timelines += [always(_member(kind, defaults, profiles, f"{where}: "))] * count
        _count(len(timelines), "devices in all")
    if not timelines:
        raise ValueError("devices is empty, expected a number, or a table for each kind")
    return Fleet(tuple(timelines), len(timelines))


def _traced(
    document: Mapping[str, Any],
    profiles: Callable[[str], Profile],
    defaults: Member,
    read: Callable[[str], str],
) -> Fleet:
    name, seconds = document["trace"], document.get("round_seconds")
    if not isinstance(name, str) or not name:
        raise ValueError(f"trace is {name!r:.60}, expected the name of a CSV file")
    low, high = ROUND_SECONDS
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if seconds is not None and not (number and low <= seconds <= high):
        raise ValueError(f"round_seconds is {seconds!r:.60}, expected seconds from {low:g}")
    text = read(name)
    try:
        return parse_table(text, profiles=profiles, defaults=defaults, round_seconds=seconds)
    except ValueError as error:
        raise ValueError(f"trace {name!r}: {error}") from None


def _member(
    given: Mapping[str, Any], defaults: Member, profiles: Callable[[str], Profile], where: str
) -> Member:
    own = dict(defaults.own)
    for name in QUANTITIES.keys() & given.keys():
        value = given[name]
        if name == "present" and isinstance(value, bool):
            value = int(value)
        try:
            own[name] = quantity_from(value, QUANTITIES[name])
        except ValueError as error:
            raise ValueError(f"{where}{name} {error}") from None
    name = given.get("profile")
    if name is None:
        return Member(defaults.profile, own)
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}profile is {name!r:.60}, expected a name from 'fedlean devices'")
    return Member(profiles(name), own)


def _check_keys(given: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"{where}no key {name!r:.60}; {hint}known: {', '.join(known)}")


def _count(value: Any, what: str) -> int:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not 1 <= value <= MAX_DEVICES:
        raise ValueError(f"{what} is {value!r:.60}, expected a number from 1 to {MAX_DEVICES}")
    return value
