"""Where the simulated time goes: the slowest client's computation and its link."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from fedlean.report import units
from fedlean.report.curves import binned
from fedlean.report.figure import HEIGHT, INK, NUM_COLOURS, SERIES, STEPS, Plot, draw, empty
from fedlean.report.run_folder import Run, number
from fedlean.report.tables import labels, legend

_SPLIT = "Where the simulated time goes"


def _parts(run: Run) -> np.ndarray:
    """(2, steps): the slowest client's computation and link time of each step."""
    keys = ("compute_seconds", "link_seconds")
    return np.array([[number(row.get(key)) or 0.0 for row in run.rounds] for key in keys])


def split_of_run(run: Run) -> Plot:
    """Computation and link time of every step, stacked; long runs as means over stretches."""
    parts = _parts(run)
    if not parts.any():
        return empty("split", _SPLIT, "no simulated clock: no device profile")
    edges, compute = binned(parts[0])
    _, link = binned(parts[1])
    by, unit = units.scale(float((compute + link).max()), "seconds")

    def fill(axes: Axes) -> None:
        at = edges + 0.5  # the first step is 1
        axes.stairs(compute / by, at, fill=True, color=SERIES[0])
        both = (compute + link) / by
        axes.stairs(both, at, baseline=compute / by, fill=True, color=SERIES[1])
        axes.set_ylim(0, 1.05 * both.max())
        axes.set_xlim(0.5, edges[-1] + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=STEPS, integer=True))
        axes.set_xlabel("step, initial ones included")
        axes.set_ylabel(f"slowest client ({unit})")
        axes.grid(visible=False, axis="x")

    share = 100 * parts[1].sum() / parts.sum()
    alt = f"{_SPLIT}: the link takes {share:.3g}% of it, computation the rest."
    parts_legend = ((0, "computation"), (1, f"link ({share:.3g}% of the whole)"))
    return Plot("split", _SPLIT, draw("split", fill, alt), alt, parts_legend)


def split_compared(runs: Sequence[Run]) -> Plot:
    """Total computation (full) and link time (faded) of each run as one bar."""
    sums = np.array([_parts(run).sum(axis=1) for run in runs])  # (runs, 2)
    if not sums.any():
        return empty("split", _SPLIT, "no simulated clock: no device profile")
    by, unit = units.scale(float(sums.sum(axis=1).max()), "seconds")

    def fill(axes: Axes) -> None:
        for i, (compute, link) in enumerate(sums / by):
            colour = SERIES[i % NUM_COLOURS]
            axes.barh(i, compute, height=0.5, color=colour)
            axes.barh(i, link, left=compute, height=0.5, color=colour, alpha=0.4)
            note = f"computation {_share(compute, link)}, link {_share(link, compute)}"
            note = note if compute + link else "no simulated clock"
            axes.text(0, i - 0.3, note, size=8, va="bottom", color=INK)
        axes.set_ylim(len(runs) - 0.5, -0.75)
        axes.set_yticks([])
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(f"simulated time, computation then link, faded ({unit})")

    names = labels(runs)
    told = [f"{names[i]} link {_share(link, compute)}" for i, (compute, link) in enumerate(sums)]
    alt = f"{_SPLIT}: {'; '.join(told)}."
    height = max(HEIGHT, 0.7 + 0.45 * len(runs))
    return Plot("split", _SPLIT, draw("split", fill, alt, height), alt, legend(runs))


def _share(part: float, rest: float) -> str:
    whole = part + rest
    return f"{100 * part / whole:.0f}%" if whole else "0%"
