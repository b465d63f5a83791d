"""The options of `fedlean run` out of the table of run settings, `runtime.config.RunConfig`."""

from __future__ import annotations

import types
import typing
from dataclasses import field, fields, make_dataclass
from typing import Annotated, Any, Literal, get_args

from cyclopts import Parameter

from fedlean.cli.options import Norm, Place, Whole
from fedlean.runtime.config import RunConfig, user_settings
from fedlean.runtime.start import Weights


def _optional(read: Any) -> Any:
    return read | None


# Where the text of an option is more than its type says.
_READ: dict[str, Any] = {
    "max_update_norm": _optional(Norm),
    "start": Place,
    "start_weights": Literal[get_args(Weights)],
}


def _option(name: str, hint: Any, default: Any, help: str) -> Any:
    """How the command line reads a setting of that type."""
    read = _READ.get(name, hint)
    if typing.get_origin(hint) is tuple:
        many = Parameter(consume_multiple=True, negative=(), help=help)
        return Annotated[list[float] | None, many]
    if hint is str and not default:
        read = _optional(read)  # "" is what it is where nothing was said
    if int in (get_args(hint) if isinstance(hint, types.UnionType) else (hint,)):
        read = Whole if hint is int else _optional(Whole)
    return Annotated[read, Parameter(help=help)]


def _options() -> type:
    hints = typing.get_type_hints(RunConfig)
    found = []
    for name, each in user_settings().items():
        default = None if not each.default and each.default != 0 else each.default
        option = _option(name, hints[name], default, each.metadata["help"])
        found.append((name, option, field(default=default)))
    made = make_dataclass("RunOptions", found, frozen=True)
    made.__module__ = __name__  # cyclopts takes those of Python's own modules as one value
    return made


RunOptions: Any = _options()


def told(options: Any) -> dict[str, Any]:
    """The settings that were given, by name."""
    given = {each.name: getattr(options, each.name) for each in fields(options)}
    return {name: value for name, value in given.items() if value is not None}
