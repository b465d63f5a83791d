"""Past one machine: `fedlean node` and `fedlean app`."""

from __future__ import annotations

import sys
from typing import Annotated

from cyclopts import App, Parameter

from fedlean.cli.options import Place
from fedlean.cli.screen import show


def node(*arguments: Annotated[str, Parameter(allow_leading_hyphen=True)]) -> None:
    """Take part in a federation as one of its devices (see fedlean node --help)."""
    from fedlean.runtime.flower.node import main as serve  # a device's process loads nothing else

    sys.exit(serve(arguments))


flower_app = App(name="app", help="FedLean as a Flower app.")


@flower_app.command(name="new")
def new_app(folder: Place, /) -> None:
    """Write a Flower project, ready for 'flwr run'.

    Parameters
    ----------
    folder
        a new or empty folder
    """
    from fedlean.runtime.flower.project import write_project

    for path in write_project(folder):
        show(f"wrote {path}")
    show("README.md there says how to run it; pyproject.toml says what runs")
