"""FedLean: federated learning in which every device trains only what it can afford.

Names load when they are used: a device's process, which has no use for most of them, stays small.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__version__ = "0.1.0"
_PLACES = {
    "Comparison": "api.compare",
    "Dataset": "data.dataset",
    "Device": "api.planning",
    "Fleet": "fleet.fleet",
    "Model": "api.model",
    "ModelSpec": "spec",
    "Plan": "api.planning",
    "Run": "api.run",
    "compare": "api.compare",
    "load": "api.model",
    "plan": "api.planning",
    "resume": "api.train",
}


def __getattr__(name: str) -> object:
    if name == "method":
        return import_module("fedlean.method")
    if name not in _PLACES:
        raise AttributeError(
            f"module 'fedlean' has no name {name!r}; there are {', '.join(__dir__())}"
        )
    found = getattr(import_module(f"fedlean.{_PLACES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*_PLACES, "__version__", "method", "train"])


class _Package(ModuleType):
    """`fedlean.train` is the function, also once the package of that name has been imported."""

    @property
    def train(self) -> Any:
        return import_module("fedlean.api.train").train

    @train.setter
    def train(self, package: ModuleType) -> None:
        """The import system names the package so: it stays in `sys.modules` alone."""


sys.modules[__name__].__class__ = _Package
