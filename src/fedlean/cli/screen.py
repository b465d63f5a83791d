"""What the commands print: results on stdout, notices on stderr, nothing that a terminal obeys."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console

from fedlean.printable import printable

out, err = Console(), Console(stderr=True)


def show(what: Any) -> None:
    """A line, or a table, whose cells are printable already."""
    what = printable(what) if isinstance(what, str) else what
    out.print(what, highlight=False, markup=False, emoji=False, soft_wrap=isinstance(what, str))


def show_lines(lines: Iterable[str]) -> None:
    """All at once: a console takes its time for each."""
    text = "\n".join(map(printable, lines))
    out.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)


def say(line: str, style: str | None = "yellow") -> None:
    """A notice."""
    line = printable(line)
    err.print(line, style=style, highlight=False, markup=False, emoji=False, soft_wrap=True)
