"""A fleet from its file, or from what a run folder has recorded of that file."""

from __future__ import annotations

import csv
import os
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedlean.cost.profile import Profile, available, from_document, load_profile, to_document
from fedlean.fleet.document import parse_document
from fedlean.fleet.fleet import Fleet, Member
from fedlean.fleet.table import parse_table
from fedlean.jsonfile import parse_json, read_bytes

MAX_BYTES = 8 << 20  # of a file: it is kept in config.json
ENDINGS = (".toml", ".json", ".csv")


class Loaded(NamedTuple):
    """A fleet and all of its files as JSON values, of which `recorded` makes the same fleet."""

    fleet: Fleet
    content: dict[str, Any]


def load_fleet(path: str | Path, fallback: Profile) -> Loaded:
    """The fleet of a TOML, JSON or CSV file; fallback: the profile of devices that name none.

    Other files are looked for beside it.  Raises ValueError naming the file, the line or key, and
    what was expected there.
    """
    place = Path(os.path.expanduser(path))  # noqa: PTH111 - Path's raises for an unknown user
    texts: dict[str, str] = {}
    used: dict[str, Any] = {}

    def read(name: str) -> str:
        texts[name] = _text(place.parent / name)
        return texts[name]

    def profiles(name: str) -> Profile:
        beside = place.parent / os.path.expanduser(name)  # noqa: PTH111
        profile = load_profile(
            str(beside) if beside.is_file() and name not in available() else name
        )
        used[name] = to_document(profile)
        return profile

    fleet = _parsed(place.name, read, profiles, fallback, str(path))
    return Loaded(fleet, {"name": place.name, "texts": texts, "profiles": used})


def recorded(content: Any, fallback: Profile) -> Fleet:
    """The fleet that `load_fleet` gave with this content.  Raises ValueError where it is none."""
    try:
        name, texts, used = content["name"], content["texts"], content["profiles"]
        found = {name: from_document(document) for name, document in used.items()}
        return _parsed(name, texts.__getitem__, found.__getitem__, fallback, name)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _parsed(
    name: str,
    read: Callable[[str], str],
    profiles: Callable[[str], Profile],
    fallback: Profile,
    shown: str,
) -> Fleet:
    try:
        ending = Path(name).suffix.lower()
        if ending not in ENDINGS:
            raise ValueError(f"expected a file whose name ends in {', '.join(ENDINGS)}")
        text = read(name)
        if ending == ".csv":
            return parse_table(text, profiles=profiles, defaults=Member(fallback))
        document = parse_json(text) if ending == ".json" else _toml(text)
        return parse_document(document, profiles=profiles, fallback=fallback, read=read)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"fleet {shown!r}: {error}") from None


def _toml(text: str) -> Mapping[str, Any]:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"not TOML: {error}") from None


def _text(path: Path) -> str:
    try:
        return read_bytes(path, MAX_BYTES).decode("utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text in UTF-8") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
