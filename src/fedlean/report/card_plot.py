"""The plot of an experiment's card: accuracy against rounds, with its own legend."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.style
from matplotlib.figure import Figure

from fedlean.report.curves import series
from fedlean.report.figure import WIDTH, marker
from fedlean.report.run_folder import Run

HEIGHT_INCHES = 4.2


def write_card_plot(runs: Sequence[Run], names: Sequence[str], path: Path) -> None:
    """An SVG file of its own; the same runs give the same bytes."""
    with matplotlib.style.context("default"), matplotlib.rc_context({"svg.hashsalt": "card"}):
        figure = Figure(figsize=(WIDTH, HEIGHT_INCHES), layout="constrained")
        axes = figure.add_subplot()
        for at, (run, name) in enumerate(zip(runs, names, strict=True)):
            x, y = series(
                run.evaluations, lambda row: float(row["round"]), lambda row: 100 * row["accuracy"]
            )
            if len(x):
                axes.plot(
                    x,
                    y,
                    color=f"C{at % 10}",
                    linestyle="-" if at < 10 else "--",
                    marker=marker(at),
                    markevery=[len(x) - 1],
                    label=name,
                )
        axes.set_xlabel("round")
        axes.set_ylabel("test accuracy (%)")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small", frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None})
