"""flwr's message types without the rest of flwr, which would cost a device 19 MB before it starts.

Only `flwr.proto` is imported, under a stand-in for the package `flwr` that is taken away again, so
that whoever needs the real one can still import it.  Where it is imported already it is used.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module, metadata
from types import ModuleType
from typing import NamedTuple

KNOWN = ">=1.41,<1.43"  # whose SuperLink and message types this package was tried with
_FIRST, _END = (1, 41), (1, 43)


class Protobufs(NamedTuple):
    """The modules of flwr.proto that a node speaks with, and the version of their distribution."""

    version: str
    decode_error: type[Exception]
    error: ModuleType
    fleet: ModuleType
    heartbeat: ModuleType
    message: ModuleType
    node: ModuleType


@cache
def protobufs() -> Protobufs:
    """Raises ValueError where flwr is not installed or is of a version that nobody has tried."""
    version = _known_version()
    with _bare_flwr():
        decode_error = import_module("google.protobuf.message").DecodeError
        modules = [import_module(f"flwr.proto.{name}_pb2") for name in Protobufs._fields[2:]]
        return Protobufs(version, decode_error, *modules)


def _known_version() -> str:
    try:
        version = metadata.version("flwr")
    except metadata.PackageNotFoundError:
        raise ValueError(
            f"flwr is not installed, and a Flower node needs it: pip install 'flwr{KNOWN}'"
        ) from None
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or not _FIRST <= (int(numbers[1]), int(numbers[2])) < _END:
        raise ValueError(
            f"flwr {version} is installed, and this node is known to work with flwr{KNOWN}: "
            f"pip install 'flwr{KNOWN}'"
        )
    return version


@contextmanager
def _bare_flwr() -> Iterator[None]:
    if "flwr" in sys.modules:
        yield
        return
    found = importlib.util.find_spec("flwr")
    if found is None or found.submodule_search_locations is None:
        raise ValueError(f"flwr's package is missing: pip install --force-reinstall 'flwr{KNOWN}'")
    bare = ModuleType("flwr")
    bare.__path__ = list(found.submodule_search_locations)
    sys.modules["flwr"] = bare
    try:
        yield
    finally:
        del sys.modules["flwr"]
