"""`fedlean compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from fedlean.cli.options import Place
from fedlean.cli.screen import show
from fedlean.report.console import cost_table
from fedlean.report.page import comparison_page, write_page
from fedlean.report.run_folder import read_run


def compare(
    folders: Annotated[list[Place], Parameter(consume_multiple=True, negative=())],
    /,
    *,
    out: Place = Path("compare.html"),
    target_accuracy: Annotated[
        list[float] | None, Parameter(consume_multiple=True, negative=())
    ] = None,
) -> None:
    """One page over several runs; the first is the baseline.

    Parameters
    ----------
    folders
        run folders
    out
        the page to write
    target_accuracy
        accuracies to compare at (default: those of the runs)
    """
    loaded = [read_run(folder) for folder in folders]
    write_page(out, comparison_page(loaded, target_accuracy or None))
    show(cost_table(loaded, target_accuracy or None))
    show(f"wrote {out}")
