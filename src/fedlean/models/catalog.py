"""The models that there are, found by looking: a new file in this package is all it takes.

A model is a public function `name(input_shape, classes, ...) -> ModelSpec` of a public module of
`fedlean.models`.  `fedlean.models.torch` is never imported: listing models must not load PyTorch.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from typing import get_type_hints

import fedlean.models
from fedlean.layers import Shape
from fedlean.spec import ModelSpec
from fedlean.usercode import call, is_code, load_function

_SKIPPED = {"torch", "catalog"}


def available() -> dict[str, str]:
    """Name -> what it is (the first line of its docstring), in alphabetical order.

    >>> available()["lenet300"]
    'LeNet-300-100: three fully connected layers; reads images and vectors.'
    """
    return {name: (inspect.getdoc(model) or "").partition("\n")[0] for name, model in _models()}


def build(name: str, input_shape: Shape, classes: int) -> ModelSpec:
    """The model `name` for inputs of `input_shape` (without batch) and so many classes.

    `name` is one of `available()` or `package.module:function`, a function of your own with the
    same two arguments.

    >>> build("lenet300", (1, 8, 8), 10).output_shape
    (10,)
    """
    model = load_function("model", name) if is_code(name) else _listed(name)
    spec = call("model", name, model, tuple(input_shape), classes)
    if not isinstance(spec, ModelSpec):
        raise ValueError(f"model {name!r} must return a ModelSpec, got {type(spec).__name__}")
    return spec


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
        near = difflib.get_close_matches(name.lower(), models, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(models)}"
        raise ValueError(f"unknown model {name!r}: {hint}")
    return models[name]
