"""What the docstrings of a method say of each of its settings.

A method's docstring has them under `Args:`; a record of settings that several methods share has
them in its own.  There as here a line begins with the names that it is about and a colon, and goes
on to the next such line or to an empty one.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection
from typing import Any

_NAMES = re.compile(r"^([a-z_][a-z0-9_]*(?:, [a-z_][a-z0-9_]*)*): (.+)$")


def described(method: Callable[..., Any], names: Collection[str]) -> dict[str, str]:
    """By name, of those of `names` that are described; one line each."""
    documents = [getattr(method, "__doc__", None)]
    documents += [record.__doc__ for record in getattr(method, "settings_records", ())]
    found: dict[str, str] = {}
    for document in documents:
        for name, text in _entries(inspect.cleandoc(document or ""), names):
            found.setdefault(name, text)
    return found


def _entries(document: str, names: Collection[str]) -> list[tuple[str, str]]:
    entries: list[tuple[str, str]] = []
    about: list[str] = []
    said: list[str] = []
    for line in [*document.splitlines(), ""]:
        match = _NAMES.match(line.strip())
        begins = match is not None and all(name in names for name in match[1].split(", "))
        if about and (begins or not line.strip()):
            entries += [(name, " ".join(said)) for name in about]
            about = []
        if match is not None and begins:
            about, said = match[1].split(", "), [match[2]]
        elif about:
            said.append(line.strip())
    return entries
