"""Types of options: what a command line says, as what the library takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter


def _whole(type_: Any, tokens: Sequence[Any]) -> int:
    """An integer as written: 2.5 rounds are a mistake, not 2."""
    del type_
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f"expected a whole number, got {tokens[0].value!r:.40}") from None


def _place(type_: Any, tokens: Sequence[Any]) -> Path:
    """A shell leaves the ~ of --out=~/run to us."""
    del type_
    try:
        return Path(tokens[0].value).expanduser()
    except RuntimeError as error:  # of ~somebody
        raise ValueError(f"{tokens[0].value!r}: {error}") from None


def _norm(type_: Any, tokens: Sequence[Any]) -> float:
    del type_
    from fedlean.runtime.config import max_update_norm  # only runs have it

    return max_update_norm(tokens[0].value)


Norm = Annotated[float, Parameter(converter=_norm)]
Whole = Annotated[int, Parameter(converter=_whole)]
Place = Annotated[Path, Parameter(converter=_place)]
