"""Finding a method by name and giving it its hyper-parameters.

A method is the function of the same name in a module of `fedlean.methods`, or any
`package.module:function`.  There is no list to edit: its signature says what it takes.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence

import fedlean.methods
from fedlean.algorithm import FederatedAlgorithm, Server, State
from fedlean.core import Model, Scalar
from fedlean.settings import fits, in_words, nearest, parse, type_of
from fedlean.usercode import call, is_code, load_function

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
    if is_code(name):
        return load_function("method", name)
    names = sorted(module.name for module in pkgutil.iter_modules(fedlean.methods.__path__))
    if name not in names:
        raise ValueError(
            f"no method named {name!r}; {nearest(name, names)} (or FILE.py:function, "
            "package.module:function)"
        )
    return getattr(importlib.import_module(f"fedlean.methods.{name}"), name)


def hyperparameters(method: Method) -> Mapping[str, inspect.Parameter]:
    """The keyword-only parameters of a method.  Raises ValueError for what shows none."""
    try:
        parameters = inspect.signature(method).parameters
    except (ValueError, TypeError) as error:
        raise ValueError(f"expected a method, a function (server, *, settings): {error}") from None
    return {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def name_of(method: Method) -> str:
    """By which a function of the caller's is recorded, as `find_method` takes it."""
    module, name = (getattr(method, key, "") for key in ("__module__", "__qualname__"))
    return f"{module or 'unknown'}:{name or type(method).__name__}"


def complete(
    method_name: str, settings: Settings, method: Method | None = None
) -> dict[str, Scalar | None]:
    """`settings` with the method's defaults for what they leave out, in its order.

    What the method does not know comes last, for `build` to refuse.  method: the function of that
    name, where the caller has it.
    """
    known = hyperparameters(method or find_method(method_name))
    defaults = {name: parameter.default for name, parameter in known.items()}
    given = {
        name: value for name, value in defaults.items() if value is not inspect.Parameter.empty
    }
    return {**given, **settings}


def given_settings(
    method_name: str,
    texts: Sequence[str] | Settings,
    flags: Mapping[str, Scalar] | None = None,
    method: Method | None = None,
) -> dict[str, Scalar | None]:
    """What a user asked of a method: settings, and flags of their own by the same names.

    texts: `key=value`, or values by key.  method: the function of that name, where the caller has
    it.  Raises ValueError for a setting that is unknown, of another type, given twice or without
    effect beside the others.
    """
    method, flags = method or find_method(method_name), flags or {}
    if isinstance(texts, Mapping):
        settings = dict(texts)
    else:
        settings = parse_settings(method_name, method, texts)
    for key in flags:
        if key in settings:
            raise ValueError(
                f"--set {key}=... and the option for {key} are one setting: give it once"
            )
    settings |= flags
    for key, why in unused_settings(method, complete(method_name, settings, method)).items():
        if key in settings:
            raise ValueError(f"{key} has no effect on {method_name}, since {why}: leave it out")
    return settings


def unused_settings(method: Method, settings: Settings) -> Mapping[str, str]:
    """Which of all `settings` have no effect beside the others, and why.

    A module-level `unused(settings)` beside the method says it; without one all have.
    """
    module = sys.modules.get(getattr(method, "__module__", None) or "")
    say: Callable[[Settings], Mapping[str, str]] | None = getattr(module, "unused", None)
    return say(settings) if say else {}


def parse_settings(
    method_name: str, method: Method, settings: Sequence[str]
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
        out[key] = parse(key, text, type_of(method, known[key]))
    return out


def build(
    method_name: str,
    server: Server,
    settings: Mapping[str, Scalar | None],
    method: Method | None = None,
) -> FederatedAlgorithm:
    """The algorithm; method: the function of that name, where the caller has it.

    Raises ValueError naming a setting that the method lacks or that is of another type than it
    takes, and what a function of the user's is instead of a method.
    """
    method = method or find_method(method_name)
    known = hyperparameters(method)
    for key, value in settings.items():
        if key not in known:
            raise ValueError(
                f"{method_name} has no hyper-parameter {key!r}; {nearest(key, sorted(known))}"
            )
        hint = type_of(method, known[key])
        if not fits(value, hint):
            raise ValueError(f"{key} must be {in_words(hint)}, got {value!r:.40}")
    algorithm = call("method", method_name, method, server, **settings)
    if not isinstance(algorithm, FederatedAlgorithm):
        raise ValueError(
            f"method {method_name!r} must return a FederatedAlgorithm, got "
            f"{type(algorithm).__name__}"
        )
    return algorithm


def model_of(algorithm: FederatedAlgorithm, server: Server, state: State) -> Model:
    """What of `state` is evaluated and saved."""
    if algorithm.model is not None:
        return algorithm.model(state)
    return Model(server.spec, state.params, state.masks)
