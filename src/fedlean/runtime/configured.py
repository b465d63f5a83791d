"""From what a user says to a `RunConfig`, in Python as on the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlean.core import Scalar
from fedlean.runtime.config import LISTS, RunConfig, check, checked_types, user_settings
from fedlean.runtime.method import (
    Method,
    Settings,
    find_method,
    given_settings,
    hyperparameters,
    nearest,
)


def configured(
    name: str,
    *,
    settings: Sequence[str] | Settings,
    flags: Mapping[str, Scalar | None],
    options: Mapping[str, Any],
    method: Method | None = None,
) -> RunConfig:
    """A run of the method `name`.

    settings: its hyper-parameters, as `key=value` or by key; flags: those with an argument of their
    own (None: not given); options: fields of `RunConfig` by name (None: not given).  method: the
    function of that name, where the caller has it.

    Raises ValueError naming what is unknown, of another type, or given twice.
    """
    known = user_settings()
    for key in options:
        if key not in known:
            own = hyperparameters(method or find_method(name))
            hint = f"it is a setting of the method: settings={{{key!r}: ...}}"
            raise ValueError(
                f"there is no option {key!r}; {hint if key in own else nearest(key, sorted(known))}"
            )
    given = {key: value for key, value in flags.items() if value is not None}
    told = {key: _plain(key, value) for key, value in options.items() if value is not None}
    config = RunConfig(method=name, settings=given_settings(name, settings, given, method), **told)
    try:
        check(checked_types(config))
    except TypeError as error:
        raise ValueError(str(error)) from None
    return config


def _plain(key: str, value: Any) -> Any:
    """As JSON has it: no paths, and what cannot change."""
    if isinstance(value, Path):
        return str(value)
    if key in LISTS and isinstance(value, int | float):
        return (float(value),)
    return tuple(value) if isinstance(value, list) else value
