"""Horizontal bars in stacked parts against a limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from fedlean.report.figure import INK, NUM_COLOURS, SERIES, STEPS, Plot, draw, plain

BAR_INCHES, FRAME_INCHES = 0.21, 0.75


@dataclass(frozen=True)
class Bar:
    name: str
    parts: Mapping[str, float]  # by what the legend calls them; all bars have the same ones


def bars(
    key: str, title: str, shown: Sequence[Bar], limit: float, *, unit: str, limit_name: str
) -> Plot:
    """From top to bottom, with a line at `limit`; values are in `unit`."""
    parts = list(dict.fromkeys(name for bar in shown for name in bar.parts))

    def fill(axes: Axes) -> None:
        for at, bar in enumerate(shown):
            left = 0.0
            for series, name in enumerate(parts):
                width = bar.parts.get(name, 0.0)
                axes.barh(at, width, left=left, height=0.7, color=SERIES[series % NUM_COLOURS])
                left += width
        axes.axvline(limit, color=INK, linewidth=1.2, linestyle=(0, (5, 2)))
        axes.set_yticks(range(len(shown)), [plain(bar.name, 34) for bar in shown], fontsize=7)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
        axes.set_xlabel(f"{unit}; dashed: {limit_name}")

    largest = max((sum(bar.parts.values()) for bar in shown), default=0.0)
    alt = f"{title}: at most {largest:.3g} {unit}; {limit_name} {limit:.4g} {unit}."
    height = FRAME_INCHES + BAR_INCHES * max(1, len(shown))
    legend = tuple(enumerate(parts))
    return Plot(key, title, draw(key, fill, alt, height), alt, legend)
