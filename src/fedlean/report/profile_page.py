"""A measured device profile for the terminal, and as one HTML file."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from html import escape
from typing import Any

from rich.table import Table
from rich.text import Text

from fedlean.measure.result import Measurement
from fedlean.printable import printable
from fedlean.report import markup
from fedlean.report.page import document, head, section
from fedlean.report.profile_rows import (
    DENSITY_HEADS,
    LAYER_HEADS,
    Rows,
    density_rows,
    layer_rows,
    notes,
)

LAYERS = "T(M) = c + Σ t · kept weights, computation of a round"
DENSITIES = "All layers at one density"


def profile_tables(result: Measurement) -> list[Table]:
    """The fit by layer, then times by density."""
    return [
        _table(LAYERS, LAYER_HEADS, layer_rows(result)),
        _table(DENSITIES, DENSITY_HEADS, density_rows(result)),
    ]


def profile_page(result: Measurement) -> str:
    """Self-contained HTML.  Raises ValueError without matplotlib."""
    try:
        plots: Any = importlib.import_module("fedlean.report.profile_plots")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ValueError("plots need matplotlib: pip install 'fedlean[sim]'") from None
    paragraphs = "\n".join(f"<p>{escape(text)}</p>" for text in notes(result))
    parts = [
        head("FedLean device profile", result.profile.name, [result.profile.description]),
        section("Curves", markup.plot_grid(plots.profile_plots(result))),
        section(LAYERS, markup.plain_table(LAYER_HEADS, layer_rows(result))),
        section(DENSITIES, markup.plain_table(DENSITY_HEADS, density_rows(result))),
        section("How these figures were made", paragraphs),
    ]
    return document(f"{result.profile.name} · FedLean device profile", parts, "its measurements")


def _table(title: str, heads: Sequence[str], rows: Rows) -> Table:
    table = Table(title=title, title_justify="left")
    for at, name in enumerate(heads):
        table.add_column(name, justify="right" if at else "left")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table
