"""Properties that every method has.  Collected: each tests/methods/test_<method>.py declares CASE.

A method that works in another way under some settings declares MORE_CASES beside it, by a word; a
case is then named "method:word".

Adding a method is two new files, the method and its test, and no edit here.  A method that is not
of the package (an example of the docs) needs its test file only.
"""

from __future__ import annotations

import importlib.util
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fedlean.methods
from fedlean.algorithm import FederatedAlgorithm
from fedlean.core import Model, Scalar

METHODS = Path(__file__).parent / "methods"


@dataclass(frozen=True)
class Case:
    """How to put one method through the properties."""

    method: Callable[..., FederatedAlgorithm]
    settings: Mapping[str, Scalar]  # small, and such that everything it does happens in 6 rounds
    knob: Mapping[str, Scalar]  # added to settings: the result must change
    neutral: Mapping[str, Scalar] | str  # replaces settings: equals FedAvg; or why there is none
    fedavg: Mapping[str, Scalar] = field(default_factory=dict)  # FedAvg's settings there
    why_no_masks: str = ""  # a method that prunes leaves this empty
    start: Model | None = None  # that the settings' runs start from; None: the federation's draw


def built_in() -> list[str]:
    """The methods of the package, which a device finds by name."""
    return sorted(module.name for module in pkgutil.iter_modules(fedlean.methods.__path__))


def method_names() -> list[str]:
    """Of the package, tested or not, and of the test files."""
    tested = {path.stem.removeprefix("test_") for path in METHODS.glob("test_*.py")}
    return sorted(tested.union(built_in()))


def case_names() -> list[str]:
    """Of all methods, and of their further cases."""
    return [
        name
        for method in method_names()
        for name in (method, *(f"{method}:{word}" for word in _more_cases(method)))
    ]


def case_of(name: str) -> Case:
    """The CASE of tests/methods/test_<method>.py, or another; AssertionError when there is none."""
    method, _, word = name.partition(":")
    return _more_cases(method)[word] if word else _declarations(method).CASE


def _more_cases(method: str) -> Mapping[str, Case]:
    known = (METHODS / f"test_{method}.py").is_file()
    return getattr(_declarations(method), "MORE_CASES", {}) if known else {}


def _declarations(method: str) -> Any:
    path = METHODS / f"test_{method}.py"
    assert path.is_file(), f"{method} has no test file {path.name}"
    spec = importlib.util.spec_from_file_location(f"case_{method}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert hasattr(module, "CASE"), f"{path.name} declares no CASE"
    return module


def shuffled(order: Sequence[int]) -> Callable[[Any, Iterator[Any]], list[Any]]:
    """Updates in another order than the cohort's."""

    def change(tasks: Any, updates: Iterator[Any]) -> list[Any]:
        del tasks
        held = list(updates)
        ranked = sorted(range(len(held)), key=lambda i: order[i % len(order)])
        return [held[i] for i in ranked]

    return change
