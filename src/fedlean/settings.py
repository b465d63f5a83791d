"""Settings of a function, as its signature declares them: from text, and held to their types."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from fedlean.core import Scalar


def nearest(given: str, names: list[str]) -> str:
    """'nearest: ...' or 'there are: ...' for an error message."""
    near = get_close_matches(given, names, n=3, cutoff=0.5)
    return f"nearest: {', '.join(near)}" if near else f"there are: {', '.join(names)}"


def parse(key: str, text: str, hint: Any) -> Scalar | None:
    """The value that `text` is.  Raises ValueError with the key, where it is none of that type."""
    options = _options(hint)
    if types.NoneType in options and text.lower() == "none":
        return None
    hint = next(option for option in options if option is not types.NoneType)
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        for choice in choices:
            if text == str(choice):
                return choice
        raise ValueError(f"{key} must be one of {', '.join(map(str, choices))}, got {text!r}")
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{key} must be true or false, got {text!r}")
        return text.lower() == "true"
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            kind = "an integer" if hint is int else "a number"
            raise ValueError(f"{key} must be {kind}, got {text!r:.40}") from None
    return text


def type_of(function: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """The type of one parameter; Any where it is not said, or in names for type checkers only."""
    hint = parameter.annotation
    if isinstance(hint, str):
        try:
            hint = eval(hint, getattr(function, "__globals__", {}))
        except Exception:  # of an expression in the user's code
            return Any
    return Any if hint is inspect.Parameter.empty else hint


def _options(hint: Any) -> tuple[Any, ...]:
    """The types of a union; of any other type itself."""
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if union else (hint,)


def fits(value: Any, hint: Any) -> bool:
    """Whether a setting, perhaps out of somebody's file, is of the type that is declared."""
    for option in _options(hint):
        if typing.get_origin(option) is typing.Literal:
            fits = value in typing.get_args(option)
        elif option is int or option is float:
            wanted = int if option is int else (int, float)
            fits = isinstance(value, wanted) and not isinstance(value, bool)
        elif option in (bool, str, types.NoneType):
            fits = isinstance(value, option)
        else:
            fits = True  # a type of the method's own
        if fits:
            return True
    return False


def in_words(hint: Any) -> str:
    """The type in words, for an error message."""
    words = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    words[types.NoneType] = "none"
    return " or ".join(
        f"one of {', '.join(map(str, typing.get_args(option)))}"
        if typing.get_origin(option) is typing.Literal
        else words.get(option, str(option))
        for option in _options(hint)
    )
