"""Functions named as `package.module:function`.  Importing one runs its module: code of a user's.

Whoever reads such a name out of a file asks `fedlean.runtime.trust` first.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def is_code(name: str) -> bool:
    """Whether it names a function to import, rather than something built in."""
    return ":" in name


def load_function(kind: str, name: str) -> Callable[..., Any]:
    """The function `name`.  Raises ValueError with `kind` (method, model) where there is none."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except MemoryError:
        raise
    except (Exception, SystemExit) as error:  # whatever a user's module does when it is imported
        where = ""
        if isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]:
            where = "; is its folder on PYTHONPATH, as in PYTHONPATH=. fedlean ...?"
        raise ValueError(
            f"{kind} {name!r} cannot be imported, expected package.module:function: "
            f"{type(error).__name__}: {error!s:.300}{where}"
        ) from error
    if not callable(found):
        raise ValueError(f"{kind} {name!r} must be a function, got {type(found).__name__}")
    return found


def call(kind: str, name: str, function: Callable[..., Any], /, *given: Any, **named: Any) -> Any:
    """What it returns.  Its ValueErrors are messages; any other error becomes one that names it."""
    try:
        return function(*given, **named)
    except (ValueError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"{kind} {name!r} failed when it was called: {type(error).__name__}: {error!s:.300}"
        ) from error
