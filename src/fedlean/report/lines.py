"""Lines against rounds or another cost: what every such plot draws in the same way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from fedlean.report.curves import series, thin
from fedlean.report.figure import STEPS, marker, series_style
from fedlean.report.run_folder import Row, Run, number

Value = Callable[[Row], float | None]
Curve = tuple[int, np.ndarray, np.ndarray]  # series, x, y


def named(key: str) -> Value:
    """The number that a row has under `key`."""
    return lambda row: number(row.get(key))


def in_round(row: Row) -> float:
    return float(row["round"])


def curves_of(runs: Sequence[Run], value: Value) -> list[Curve]:
    """`value` against rounds of every run that has it."""
    raw = [series(run.rounds, in_round, value) for run in runs]
    return [(i, *thin(*xy)) for i, xy in enumerate(raw) if len(xy[0])]


def furthest(curves: Sequence[Curve]) -> float:
    return max(float(x.max()) for _, x, _ in curves)


def lines(axes: Axes, curves: Sequence[Curve], drawstyle: str = "default") -> None:
    for i, x, y in curves:
        # One marker, at the end: it tells runs apart without colour and shows where each stops.
        axes.plot(
            x,
            y,
            drawstyle=drawstyle,
            zorder=3,  # above the axes' own lines
            marker=marker(i),
            markevery=[len(x) - 1],
            clip_on=False,
            **series_style(i),
        )


def cost_axis(axes: Axes, label: str, largest: float, *, whole: bool) -> None:
    axes.set_xlim(0, largest * 1.02 if largest > 0 else 1)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=STEPS, integer=whole))
    axes.set_xlabel(label)


def round_axis(axes: Axes, largest: float) -> None:
    cost_axis(axes, "round", largest, whole=True)
