"""Finding a method by name and giving it its hyper-parameters.

A method is the function of the same name in a module of `fedlean.methods`, or any
`package.module:function`.  There is no list to edit: its signature says what it takes.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

import fedlean.methods
from fedlean.core import FederatedAlgorithm, Scalar, Server

Method = Callable[..., FederatedAlgorithm]
Settings = Mapping[str, Scalar | None]  # keyword arguments of a method


def available() -> dict[str, str]:
    """Built-in methods: name -> first line of the module's docstring."""
    names = sorted(module.name for module in pkgutil.iter_modules(fedlean.methods.__path__))
    out = {}
    for name in names:
        module = importlib.import_module(f"fedlean.methods.{name}")
        out[name] = (module.__doc__ or "").strip().splitlines()[0]
    return out


def find_method(name: str) -> Method:
    """Raises ValueError naming the nearest methods, or what is wrong with `module:function`."""
    if ":" in name:
        return _import(name)
    names = sorted(module.name for module in pkgutil.iter_modules(fedlean.methods.__path__))
    if name not in names:
        raise ValueError(
            f"no method named {name!r}; {nearest(name, names)} (or package.module:function)"
        )
    return getattr(importlib.import_module(f"fedlean.methods.{name}"), name)


def _import(name: str) -> Any:
    module_name, _, function = name.partition(":")
    try:
        method = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"method {name!r} cannot be imported: {error}") from None
    if not callable(method):
        raise ValueError(f"method {name!r} is a {type(method).__name__}, expected a function")
    return method


def nearest(given: str, names: list[str]) -> str:
    """'nearest: ...' or 'there are: ...' for an error message."""
    near = get_close_matches(given, names, n=3, cutoff=0.5)
    return f"nearest: {', '.join(near)}" if near else f"there are: {', '.join(names)}"


def hyperparameters(method: Method) -> Mapping[str, inspect.Parameter]:
    """The keyword-only parameters of a method."""
    return {
        name: parameter
        for name, parameter in inspect.signature(method).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def complete(method_name: str, settings: Settings) -> dict[str, Scalar | None]:
    """`settings` with the method's defaults for what they leave out, in its order.

    What the method does not know comes last, for `build` to refuse.
    """
    known = hyperparameters(find_method(method_name))
    defaults = {name: parameter.default for name, parameter in known.items()}
    given = {
        name: value for name, value in defaults.items() if value is not inspect.Parameter.empty
    }
    return {**given, **settings}


def given_settings(
    method_name: str, texts: list[str], flags: Mapping[str, Scalar] | None = None
) -> dict[str, Scalar | None]:
    """What a user asked of a method: `key=value` texts, and flags of their own by the same names.

    Raises ValueError for a setting that is unknown, of another type, given twice or without effect
    beside the others.
    """
    method = find_method(method_name)
    settings, flags = parse_settings(method_name, method, texts), flags or {}
    for key in flags:
        if key in settings:
            raise ValueError(
                f"--set {key}=... and the option for {key} are one setting: give it once"
            )
    settings |= flags
    for key, why in unused_settings(method, complete(method_name, settings)).items():
        if key in settings:
            raise ValueError(f"{key} has no effect on {method_name}, since {why}: leave it out")
    return settings


def unused_settings(method: Method, settings: Settings) -> Mapping[str, str]:
    """Which of all `settings` have no effect beside the others, and why.

    A module-level `unused(settings)` beside the method says it; without one all have.
    """
    say = getattr(importlib.import_module(method.__module__), "unused", None)
    return say(settings) if say else {}


def parse_settings(
    method_name: str, method: Method, settings: list[str]
) -> dict[str, Scalar | None]:
    """`key=value` texts as typed keyword arguments.

    Raises ValueError naming the key with the nearest valid ones, or the value and its type.
    """
    known = hyperparameters(method)
    out: dict[str, Scalar | None] = {}
    for setting in settings:
        key, separator, text = setting.partition("=")
        if not separator:
            raise ValueError(f"--set {setting!r} is not of the form key=value")
        if key not in known:
            raise ValueError(
                f"{method_name} has no hyper-parameter {key!r}; {nearest(key, sorted(known))}"
            )
        if key in out:
            raise ValueError(f"--set {key}=... is given twice: give it once")
        out[key] = _parse(key, text, _hint(method, known[key]))
    return out


def _parse(key: str, text: str, hint: Any) -> Scalar | None:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        if text.lower() == "none":
            return None
        hint = options[0]
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
            raise ValueError(f"{key} must be {kind}, got {text!r}") from None
    return text


def build(
    method_name: str, server: Server, settings: Mapping[str, Scalar | None]
) -> FederatedAlgorithm:
    """The algorithm; a setting that the method lacks is an error that names it."""
    method = find_method(method_name)
    known = hyperparameters(method)
    for key in settings:
        if key not in known:
            raise ValueError(
                f"{method_name} has no hyper-parameter {key!r}; {nearest(key, sorted(known))}"
            )
    return method(server, **settings)


def _hint(method: Method, parameter: inspect.Parameter) -> Any:
    """The type of one parameter; of the others, names may exist for type checkers only."""
    hint = parameter.annotation
    if isinstance(hint, str):
        hint = eval(hint, getattr(method, "__globals__", {}))
    return str if hint is inspect.Parameter.empty else hint
