"""A Flower run configuration as a FedLean one: flat scalars, named as on the command line."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fedlean.runtime.config import CLIENTS, RunConfig, max_update_norm
from fedlean.runtime.method import given_settings, nearest
from fedlean.runtime.remote.dispatch import Terms

Flat = Mapping[str, bool | float | int | str]
_NUMBERS = ("clients", "rounds", "seed", "threads", "eval_every")
_TEXTS = ("dataset", "model", "inputs", "init", "partition", "engine", "device", "fleet", "start")
_TERMS = tuple(field.name for field in fields(Terms))
_OTHERS = (
    "method",
    "settings",
    "out",
    "state",
    "target_accuracy",
    "eval_examples",
    "max_update_norm",
    "start_weights",
    "accept_changed_data",
)
KNOWN = {name.replace("_", "-") for name in (*_OTHERS, *_NUMBERS, *_TEXTS, *_TERMS)}


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
    plain: dict[str, Any] = {name: str(given[name]) for name in _TEXTS if given.get(name)}
    plain |= {name: _whole(name, given[name]) for name in _NUMBERS if name in given}
    plain.setdefault("clients", CLIENTS)  # who they are is known only when they join
    config = RunConfig(
        method=method,
        target_accuracy=_accuracies(str(given.get("target_accuracy", ""))),
        eval_examples=_whole("eval_examples", given.get("eval_examples", 0)) or None,
        max_update_norm=_norm(given.get("max_update_norm", "")),
        start_weights=str(given.get("start_weights") or "trained"),
        settings=given_settings(method, shlex.split(str(given.get("settings", "")))),
        **plain,
    )
    terms: dict[str, Any] = {name: _term(name, given[name]) for name in _TERMS if name in given}
    terms["min_clients"] = terms.get("min_clients") or plain["clients"]
    accept = given.get("accept_changed_data", False)
    if not isinstance(accept, bool):
        raise ValueError(f"accept-changed-data must be true or false, got {accept!r}")
    return ServerSettings(config, Terms(**terms), Path(str(given["out"])), accept)


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


def _accuracies(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split())
    except ValueError:
        raise ValueError(f"target-accuracy must be numbers like '0.9 0.95', got {text!r}") from None
