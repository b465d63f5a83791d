"""A Flower run configuration as a FedLean one: flat scalars, named as on the command line."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from fedlean.runtime.config import CLIENTS, RunConfig, max_update_norm, user_settings
from fedlean.runtime.configured import configured
from fedlean.runtime.method import nearest
from fedlean.runtime.remote.dispatch import Terms

Flat = Mapping[str, bool | float | int | str]
_TERMS = tuple(field.name for field in fields(Terms))
_OTHERS = ("method", "settings", "out", "state", "accept_changed_data")
# A device that trains the finished model for itself needs no server for it.
_SETTINGS = tuple(name for name in user_settings() if name != "personalize")
KNOWN = {name.replace("_", "-") for name in (*_OTHERS, *_SETTINGS, *_TERMS)}


@dataclass(frozen=True)
class ServerSettings:
    """What the server part of the app needs."""

    config: RunConfig
    terms: Terms
    out: Path
    accept_changed_data: bool = False  # on resuming


def server_settings(flat: Flat) -> ServerSettings:
    """Raises ValueError naming the key that is unknown, missing or wrong."""
    given = {key.replace("-", "_"): value for key, value in flat.items()}
    for key in flat:
        if key not in KNOWN:
            raise ValueError(f"run configuration: no key {key!r}; {nearest(key, sorted(KNOWN))}")
    if not given.get("method") or not given.get("out"):
        raise ValueError(
            "run configuration: 'method' and 'out' (a folder of the server) are needed"
        )
    method = str(given["method"])
    plain = {name: _read(name, given[name]) for name in _SETTINGS if name in given}
    plain = {name: value for name, value in plain.items() if value is not None}
    plain.setdefault("clients", CLIENTS)  # who they are is known only when they join
    config = configured(
        method, settings=shlex.split(str(given.get("settings", ""))), flags={}, options=plain
    )
    terms: dict[str, Any] = {name: _term(name, given[name]) for name in _TERMS if name in given}
    terms["min_clients"] = terms.get("min_clients") or plain["clients"]
    accept = given.get("accept_changed_data", False)
    if not isinstance(accept, bool):
        raise ValueError(f"accept-changed-data must be true or false, got {accept!r}")
    return ServerSettings(config, Terms(**terms), Path(str(given["out"])), accept)


def _read(name: str, value: object) -> Any:
    """A setting of `RunConfig`; None where "" or 0 stands for its default."""
    hint = get_type_hints(RunConfig)[name]
    if name == "max_update_norm":
        return _norm(value)
    if get_origin(hint) is tuple:
        return _numbers(name, str(value))
    if hint is int:
        return _whole(name, value)
    if hint is float:
        return _number(name, value)
    if hint == int | None:
        return _whole(name, value) or None
    return str(value) or None


def _term(name: str, value: object) -> float | int:
    return _whole(name, value) if name.startswith("min_") else _number(name, value)


def _whole(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name.replace('_', '-')} must be a whole number, got {value!r}")
    return value


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name.replace('_', '-')} must be a number, got {value!r}")
    return float(value)


def _norm(value: object) -> float | None:
    text = str(value)
    try:
        return max_update_norm(text) if text else None
    except ValueError as error:
        raise ValueError(f"max-update-norm: {error}") from None


def _numbers(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split())
    except ValueError:
        raise ValueError(
            f"{name.replace('_', '-')} must be numbers like '0.9 0.95', got {text!r}"
        ) from None
