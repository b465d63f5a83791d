"""A run folder is data: code that it names runs only where its user names it, too.

`config.json` says which method and model a run is of.  Built-in ones are FedLean's; a
`package.module:function` is whatever stands there on this machine, and importing it runs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from fedlean.runtime.config import RunConfig, read_document
from fedlean.usercode import absolute_code, is_code


@dataclass(frozen=True)
class Named:
    """What a user says beside the folder of a run to go on with."""

    method: str | None = None  # as the folder has it
    model: str | None = None
    trust: bool = False  # whatever code the folder names may run


def read_trusted(folder: Path, named: Named) -> tuple[RunConfig, dict[str, Any]]:
    """As `read_document`, before anything that it names is imported.

    Raises ValueError where that names code which the user did not, or where he names another
    method or model than the run's.
    """
    config, document = read_document(folder)
    for option, own, given in (
        ("--method", config.method, named.method),
        ("--model", config.model, named.model),
    ):
        if given is not None and absolute_code(given) != own:
            raise ValueError(
                f"{option} {given} is not what the run in {folder} has, {own}: leave it out, or "
                "start a new run"
            )
    unnamed = {
        option: name
        for option, name in _code(config).items()
        if not named.trust and (named.method if option == "method" else named.model) is None
    }
    if unnamed:
        what = " and ".join(f"{name} (its {option})" for option, name in unnamed.items())
        raise ValueError(
            f"the run in {folder} would import and call {what} on this machine: if you know that "
            f"code and trust it, name it, too: {resume_command(folder, config)} (or --trust)"
        )
    return config, document


def resume_command(folder: Path, config: RunConfig) -> str:
    """The command line with which a user goes on with a run, its code named."""
    return " ".join(
        [
            f"fedlean resume {quote(str(folder))}",
            *(f"--{option} {quote(name)}" for option, name in _code(config).items()),
        ]
    )


def _code(config: RunConfig) -> Mapping[str, str]:
    """Option -> the function of a user's that it names."""
    both = {"method": config.method, "model": config.model}
    return {option: name for option, name in both.items() if is_code(name)}
