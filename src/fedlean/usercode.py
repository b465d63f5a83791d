"""Functions named as `package.module:function` or `FILE.py:function`: code of a user's.

Importing one runs its module or file.  Whoever reads such a name out of a file asks
`fedlean.runtime.trust` first.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

FILE = ".py"


def is_code(name: str) -> bool:
    """Whether it names a function to import, rather than something built in."""
    return ":" in name


def load_function(kind: str, name: str) -> Callable[..., Any]:
    """The function or class `name`; modules are looked for in the working folder, too.

    Raises ValueError with `kind` (method, model) where there is none.
    """
    place, _, attribute = name.rpartition(":")
    try:
        module = _file(place) if place.endswith(FILE) else _module(place)
        found = getattr(module, attribute)
    except MemoryError:
        raise
    except (Exception, SystemExit) as error:  # whatever a user's module does when it is imported
        raise ValueError(
            f"{kind} {name!r} cannot be imported, expected package.module:function or "
            f"FILE.py:function: {type(error).__name__}: {error!s:.300}"
            f"{_hint(place, error)}"
        ) from error
    if not callable(found):
        raise ValueError(f"{kind} {name!r} must be a function, got {type(found).__name__}")
    return found


def absolute_code(name: str) -> str:
    """A name whose FILE.py is found from any folder; other names as they are.

    >>> absolute_code("package.module:net"), absolute_code("lenet300")
    ('package.module:net', 'lenet300')
    """
    place, colon, attribute = name.rpartition(":")
    if not colon or not place.endswith(FILE):
        return name
    return f"{_path(place)}:{attribute}"


def _path(place: str) -> Path:
    return Path(os.path.expanduser(place)).resolve()  # noqa: PTH111 - Path's raises


def _module(name: str) -> ModuleType:
    if name.startswith((".", "/")) or "/" in name:
        raise ImportError(f"{name!r} is no module: a file is named with its ending, as net.py:net")
    _search(Path.cwd())
    return importlib.import_module(name)


def _file(place: str) -> ModuleType:
    """The module that the file is; a file that has changed since is run anew."""
    path = _path(place)
    about = path.stat()
    version = f"{path}\0{about.st_mtime_ns}\0{about.st_size}".encode()
    name = f"_fedlean_{path.stem}_{hashlib.blake2b(version, digest_size=6).hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    _search(path.parent)  # what lies beside it
    made = importlib.util.spec_from_file_location(name, path)
    if made is None or made.loader is None:
        raise ImportError(f"{path} is not Python")
    module = sys.modules[name] = importlib.util.module_from_spec(made)  # dataclasses look it up
    try:
        made.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _search(folder: Path) -> None:
    """Last, so that nothing in it takes the place of an installed package."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _hint(place: str, error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name in (place, place.partition(".")[0]):
        if "." in place and Path(f"{place.rpartition('.')[0]}{FILE}").is_file():
            return f"; is it {place.rpartition('.')[0]}{FILE}:function?"
        return f"; it is neither installed nor in {Path.cwd()}: go to its folder, or name its file"
    if isinstance(error, FileNotFoundError):
        return f"; seen from {Path.cwd()}: give the path of the file"
    return ""


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
