"""Where the stages of progressive training begin and end, in a plot against rounds.

One run has a thin line at every border and the names above.  In a comparison one run's borders
would be read as another's: there every run has its own row of ticks above the plot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes

from fedlean.report.figure import MUTED, NUM_COLOURS, SERIES, plain
from fedlean.report.run_folder import Run
from fedlean.report.stages import Stretch, bordered

PLOT_POINTS = 270.0  # width of the axes of an ordinary plot
_SIZE = 7
_LETTER_POINTS, _LINE_POINTS = 4.6, 9.5  # at that size
_LONGEST = 16  # letters of a name on its side
MAX_ROWS = 6  # of ticks


@dataclass(frozen=True)
class Borders:
    """at: rounds; names: (middle of the stretch, name) of those with room; ticks: by series."""

    at: tuple[int, ...] = ()
    names: tuple[tuple[float, str], ...] = ()
    upright: bool = False
    ticks: tuple[tuple[int, tuple[int, ...]], ...] = ()

    @property
    def inches(self) -> float:
        """What they add to the height of a plot."""
        letters = max((len(name) for _, name in self.names), default=0)
        rows = 0.07 * len(self.ticks)
        return rows + (letters * _LETTER_POINTS / 72 if self.upright else 0.15 * bool(letters))

    def draw(self, axes: Axes, shift: float = 0.0) -> None:
        """`shift` in rounds: where round 1 is drawn around 1 and not up to it, half a one."""
        right = axes.get_xlim()[1]  # what is plotted may end before the run does
        for at in (at for at in self.at if at + shift <= right):
            axes.axvline(at + shift, color=MUTED, linewidth=0.7, linestyle=(0, (1, 1.5)), zorder=2)
        turn = 90 if self.upright else 0
        above: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "size": _SIZE}
        for middle, name in (pair for pair in self.names if pair[0] + shift <= right):
            axes.text(
                middle + shift,
                1.02,
                name,
                color=MUTED,
                ha="center",
                va="bottom",
                rotation=turn,
                **above,
            )
        for row, (series, found) in enumerate(self.ticks):
            inside = [at for at in found if at <= right]
            axes.plot(
                inside, [1.03 + 0.035 * row] * len(inside), transform=axes.get_xaxis_transform(),
                linestyle="none", marker="|", markersize=5, markeredgewidth=1.4,
                color=SERIES[series % NUM_COLOURS], clip_on=False,
            )  # fmt: skip


def borders(runs: Sequence[Run], points: float = PLOT_POINTS) -> Borders:
    """`points`: the width of the axes, which decides which names have room.

    None where the stages take turns: a border every round says nothing.
    """
    if len(runs) == 1:
        return _of_one(bordered(runs[0]), points)
    rows = [(i, _between(found)) for i, run in enumerate(runs) if (found := bordered(run))]
    return Borders(ticks=tuple(rows[:MAX_ROWS]))


def _between(found: Sequence[Stretch]) -> tuple[int, ...]:
    return tuple(one.end for one in found[:-1] if one.end > 0)


def _of_one(found: Sequence[Stretch], points: float) -> Borders:
    last = max((one.end for one in found), default=0)
    if not last:
        return Borders()
    per_round = points / last
    wide = [(per_round * (one.end - one.begin), one) for one in found if one.end > one.begin]
    upright = any(width < _LETTER_POINTS * (len(one.name) + 2) for width, one in wide)
    kept: list[tuple[float, str]] = []
    for _, one in sorted(wide, key=lambda pair: -pair[0]):  # the longest stretch first
        middle = (one.begin + one.end) / 2
        if all(abs(middle - other) * per_round >= _LINE_POINTS for other, _ in kept) or not upright:
            kept.append((middle, plain(one.name, _LONGEST) if upright else plain(one.name, 60)))
    return Borders(_between(found), tuple(sorted(kept)), upright)
