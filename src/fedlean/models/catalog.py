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
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

import fedlean.models
from fedlean.layers import Shape
from fedlean.settings import parse, type_of
from fedlean.spec import ModelSpec
from fedlean.usercode import call, is_code, load_function

_SKIPPED = {"torch", "catalog"}


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
    """The model `name` for inputs of `input_shape` (without batch) and so many classes.

    `name` is one of `available()` or `package.module:function`, a function of your own with the
    same two arguments; further arguments follow it, each after a comma.  Raises ValueError naming
    what is unknown or of another type.

    >>> build("lenet300", (1, 8, 8), 10).output_shape
    (10,)
    >>> len(build("resnet18,blocks=unit", (3, 32, 32), 10).blocks)
    10
    """
    plain, *texts = name.split(",")
    model = load_function("model", plain) if is_code(plain) else _listed(plain)
    arguments = dict(_argument(plain, model, text.strip()) for text in texts)
    spec = call("model", plain, model, tuple(input_shape), classes, **arguments)
    if not isinstance(spec, ModelSpec):
        raise ValueError(f"model {plain!r} must return a ModelSpec, got {type(spec).__name__}")
    return spec


def _argument(name: str, model: Callable[..., ModelSpec], text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    known = _options(model)
    if key in known and not separator:
        raise ValueError(f"option {key!r} of model {name!r} has no value; expected {key}=value")
    if key not in known:
        among = f"one of {', '.join(known)}" if known else "none: the model has no options"
        raise ValueError(
            f"model {name!r} has no option {text!r:.60}; expected name=value with {among}"
        )
    return key, parse(key, value, type_of(model, known[key]))


def _options(model: Callable[..., ModelSpec]) -> dict[str, inspect.Parameter]:
    """What its user may say beside the input's shape and the classes."""
    return dict(list(inspect.signature(model).parameters.items())[2:])


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
