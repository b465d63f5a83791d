"""The models that there are, found by looking: a new file in this package is all it takes.

A model is a public function `name(input_shape, classes, ...) -> ModelSpec` of a public module of
`fedlean.models`; its further arguments are written after its name, as `resnet18,blocks=unit`.
`fedlean.models.torch` is never imported: listing models must not load PyTorch.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

import fedlean.models
from fedlean.layers import Shape
from fedlean.models.brought import Brought, brought, drawn_by, is_module
from fedlean.settings import parse, type_of
from fedlean.spec import ModelSpec
from fedlean.usercode import call, is_code, load_function

_SKIPPED = {"torch", "catalog", "brought"}


def available() -> dict[str, str]:
    """Name -> what it is (the first line of its docstring), in alphabetical order.

    >>> available()["lenet300"]
    'LeNet-300-100: three fully connected layers; reads images and vectors.'
    """
    return {name: (inspect.getdoc(model) or "").partition("\n")[0] for name, model in _models()}


def options(name: str) -> dict[str, str]:
    """The further arguments of one of `available()`, with the choices or the default of each.

    >>> options("resnet18")
    {'norm': 'group|batch', 'blocks': 'stage|unit', 'width': '64'}
    """
    model = _listed(name)
    return {key: _values(type_of(model, one), one) for key, one in _options(model).items()}


def _values(hint: Any, parameter: inspect.Parameter) -> str:
    return (
        "|".join(map(str, get_args(hint)))
        if get_origin(hint) is Literal
        else (str(parameter.default))
    )


def build(name: str, input_shape: Shape, classes: int) -> ModelSpec:
    """The spec of the model `name`, as `bring` finds it.

    >>> build("lenet300", (1, 8, 8), 10).output_shape
    (10,)
    >>> len(build("resnet18,blocks=unit", (3, 32, 32), 10).blocks)
    10
    """
    return bring(name, input_shape, classes).spec


def bring(name: str, input_shape: Shape, classes: int, seed: int = 0) -> Brought:
    """The model `name` for inputs of `input_shape` (without batch) and so many classes.

    `name` is one of `available()`, or FILE.py:function or package.module:function, a function or
    class of your own; further arguments follow it, each after a comma.  What is yours is called
    with (input_shape, classes), or with those of them that it names, perhaps none; it returns a
    ModelSpec, a Model, an nn.Module or what `from_torch` returns.  What PyTorch draws on the way is
    drawn by `seed`.  Raises ValueError naming what is unknown or of another type.
    """
    plain, *texts = name.split(",")
    model = load_function("model", plain) if is_code(plain) else _listed(plain)
    if is_module(model) and not texts:  # one that is made already
        return brought(f"model {plain!r}", model, tuple(input_shape))
    arguments = dict(_argument(plain, model, text.strip()) for text in texts)
    given = [tuple(input_shape), classes]
    if is_code(plain):
        named = _asked(plain, model, arguments)
        if named is not None:
            arguments |= {
                key: value for key, value in zip(_GIVEN, given, strict=True) if key in named
            }
            given = []
    made = drawn_by(seed, lambda: call("model", plain, model, *given, **arguments))
    return brought(f"what model {plain!r} returns", made, tuple(input_shape))


_GIVEN = ("input_shape", "classes")


def _asked(
    name: str, model: Callable[..., Any], options: Mapping[str, Any]
) -> Collection[str] | None:
    """Which of _GIVEN a user's function wants by name; None: both, by position.

    Raises ValueError where it wants more than these.
    """
    own = _signature(name, model)
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [
        key
        for key, one in own.items()
        if one.default is inspect.Parameter.empty
        and key not in options
        and one.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    ]
    if all(key in _GIVEN for key in needed):
        return [key for key in _GIVEN if key in own]
    if len(needed) == 2 and all(own[key].kind in positional for key in needed):
        return None
    raise ValueError(
        f"model {name!r} needs {', '.join(needed)}, but is called with the input's shape and the "
        f"classes at most: write def net(input_shape, classes): return {model.__name__}(...), and "
        "name that function"
    )


def _signature(name: str, model: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(model).parameters
    except (ValueError, TypeError) as error:
        raise ValueError(f"model {name!r} shows no arguments: {error}") from None


def _argument(name: str, model: Callable[..., Any], text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    known = _options(model)
    if key in known and not separator:
        raise ValueError(f"option {key!r} of model {name!r} has no value; expected {key}=value")
    if key not in known:
        among = f"one of {', '.join(known)}" if known else "none: the model has no options"
        raise ValueError(
            f"model {name!r} has no option {text!r:.60}; expected name=value with {among}"
        )
    hint, default = type_of(model, known[key]), known[key].default
    if hint is Any and isinstance(default, bool | int | float):
        hint = type(default)  # of a function of yours that does not say it
    return key, parse(key, value, hint)


def _options(model: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """What its user may say beside the input's shape and the classes."""
    own = dict(inspect.signature(model).parameters)
    required = [key for key, one in own.items() if one.default is inspect.Parameter.empty]
    first = [key for key in own if key in _GIVEN] or required[:2]
    return {key: one for key, one in own.items() if key not in first}


def _models() -> Iterator[tuple[str, Callable[..., ModelSpec]]]:
    found = {}
    for info in pkgutil.iter_modules(fedlean.models.__path__):
        if info.name in _SKIPPED or info.name.startswith("_"):
            continue
        module = importlib.import_module(f"{fedlean.models.__name__}.{info.name}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            own = function.__module__ == module.__name__  # not one that the module imports
            if own and not name.startswith("_") and _is_model(function):
                found[name] = function
    yield from sorted(found.items())


def _is_model(function: Callable[..., object]) -> bool:
    arguments = list(inspect.signature(function).parameters)[:2]
    return (
        arguments == ["input_shape", "classes"]
        and get_type_hints(function).get("return") is ModelSpec
    )


def _listed(name: str) -> Callable[..., ModelSpec]:
    models = dict(_models())
    if name not in models:
        if "=" in name:
            raise ValueError(
                f"unknown model {name!r}: options follow a name after a comma, as "
                "resnet18,blocks=unit"
            )
        near = difflib.get_close_matches(name.lower(), models, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(models)}"
        raise ValueError(f"unknown model {name!r}: {hint}")
    return models[name]
