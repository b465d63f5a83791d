"""Memory of every round, what a method measures of its stages, and who could take part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedlean.report import units
from fedlean.report.borders import borders
from fedlean.report.curves import MAX_POINTS, series, thin
from fedlean.report.figure import (
    HEIGHT,
    INK,
    MUTED,
    NUM_COLOURS,
    STEPS,
    Plot,
    draw,
    empty,
    marker,
    series_style,
)
from fedlean.report.lines import Curve, Value, furthest, in_round, lines, round_axis
from fedlean.report.run_folder import Row, Run, able_share, memories, memory, number
from fedlean.report.stages import MAX_BORDERS, bordered
from fedlean.report.tables import labels, legend

MAX_NAMES = NUM_COLOURS  # that a method measures and the page draws
SAME_SCALE = 10.0  # how far apart the largest values of one plot may be
FROZEN = "frozen"  # the name under which a rule says that a part may be frozen: 1, else 0


def memory_of_rounds(runs: Sequence[Run]) -> Plot:
    """Modelled peak of every step's neediest client."""
    title = "Peak memory of every round, modelled"
    curves = _steps(runs, memory)
    if not curves:
        return empty("memory", title, "no memory was reported")
    largest = max(float(y.max()) for _, _, y in curves)
    by, unit = units.scale(largest, "bytes")
    found, shown = memories(runs[0].rounds), borders(runs)
    # one run alone: where the mean lies, unless that is the line itself
    mean = sum(found) / len(found) if len(runs) == 1 and min(found) < 0.98 * largest else None

    def fill(axes: Axes) -> None:
        _step_lines(axes, [(i, x, y / by) for i, x, y in curves])
        axes.set_ylim(0, 1.08 * largest / by)
        axes.set_ylabel(f"neediest client ({unit})")
        round_axis(axes, furthest(curves))
        if mean is not None:
            axes.axhline(mean / by, color=MUTED, linewidth=0.5, dashes=(5, 4), zorder=1)
            across = axes.get_yaxis_transform()
            axes.text(1.02, mean / by, "mean", transform=across, va="center", size=8, color=MUTED)
        shown.draw(axes)

    names = labels(runs)
    told = [f"{names[i]} {units.human(float(y.max()), 'bytes')}" for i, _, y in curves]
    alt = f"{title}: at most {'; '.join(told)}."
    svg = draw("memory", fill, alt, HEIGHT + shown.inches)
    return Plot("memory", title, svg, alt, legend(runs))


def participation(runs: Sequence[Run]) -> list[Plot]:
    """The share of devices that could hold the smallest task; none where all always could."""
    curves = [(i, x, 100 * y) for i, x, y in _steps(runs, able_share)]
    if all(float(y.min()) == 100 for _, _, y in curves):
        return []
    title, shown = "Devices that could take part", borders(runs)

    def fill(axes: Axes) -> None:
        _step_lines(axes, curves)
        axes.set_ylim(0, 102)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}%"))
        axes.set_ylabel("could hold the smallest task")
        round_axis(axes, furthest(curves))
        shown.draw(axes)

    names = labels(runs)
    told = [f"{names[i]} from {y.min():.3g}% to {y.max():.3g}%" for i, _, y in curves]
    alt = f"{title}, of those that were there: {'; '.join(told)}."
    svg = draw("participation", fill, alt, HEIGHT + shown.inches)
    return [Plot("participation", title, svg, alt, legend(runs))]


def _steps(runs: Sequence[Run], value: Value) -> list[Curve]:
    """For "steps-pre": a step's value holds from the round before it on."""
    found = []
    for i, run in enumerate(runs):
        x, y = series(run.rounds, in_round, value)
        if len(x):
            x, y = thin(x, y)
            found.append((i, np.r_[max(0.0, x[0] - 1), x], np.r_[y[0], y]))
    return found


def _step_lines(axes: Axes, curves: Sequence[Curve]) -> None:
    """What changes every few rounds is thin and below the others, or it would hide them."""
    restless = [int(np.count_nonzero(np.diff(y))) > MAX_BORDERS for _, _, y in curves]
    for curve, many in zip(curves, restless, strict=True):
        before = len(axes.lines)
        lines(axes, [curve], drawstyle="steps-pre")
        if many and len(curves) > 1:
            axes.lines[before].set(linewidth=0.6, zorder=2.5)


def measured(run: Run) -> list[Plot]:
    """What the method measured, numbers of one scale in one plot; none where it says nothing."""
    largest = _names(run)
    frozen = _frozen_at(run)
    groups = _same_scale(dict(list(largest.items())[:MAX_NAMES]))
    left = len(largest) - MAX_NAMES
    note = f" (first {MAX_NAMES} of {len(largest)})" if left > 0 else ""
    return [_measured(run, at, names, frozen, note) for at, names in enumerate(groups)]


def _names(run: Run) -> dict[str, float]:
    """Name -> largest absolute value, in order of first appearance."""
    found: dict[str, float] = {}
    for row in run.rounds:
        for name, value in (row.get("method") or {}).items():
            known = number(value)
            if known is not None and name != FROZEN:
                found[name] = max(found.get(name, 0.0), abs(known))
    return found


def _same_scale(largest: Mapping[str, float]) -> list[list[str]]:
    """Names in groups whose largest values are less than SAME_SCALE apart; large ones first."""
    groups: list[list[str]] = []
    for name in sorted(largest, key=lambda name: -largest[name]):
        if not groups or largest[groups[-1][0]] > SAME_SCALE * largest[name] > 0:
            groups.append([])
        groups[-1].append(name)
    return groups


def _frozen_at(run: Run) -> list[float]:
    """Rounds after which the rule first said of a part that it may be frozen."""
    said = [0.0, *(_method(row, FROZEN) or 0.0 for row in run.rounds)]
    turned = [before != 1 and now == 1 for before, now in pairwise(said)]
    return [in_round(row) for row, here in zip(run.rounds, turned, strict=True) if here]


def _method(row: Row, name: str) -> float | None:
    return number((row.get("method") or {}).get(name))


def _measured(run: Run, at: int, names: Sequence[str], frozen: Sequence[float], note: str) -> Plot:
    # a part's numbers do not go on from those of the part before; where parts take turns they do
    parts = [one.rows for one in bordered(run)] or [run.rounds]
    limit = max(20, MAX_POINTS // len(parts))
    pieces = [
        [thin(*xy, limit) for rows in parts if len((xy := _values(rows, name))[0])]
        for name in names
    ]
    shown = borders([run])

    def fill(axes: Axes) -> None:
        for i, own in enumerate(pieces):
            for x, y in own:
                alone = marker(i) if len(x) == 1 or x is own[-1][0] else ""
                axes.plot(
                    x, y, marker=alone, markevery=[len(x) - 1], zorder=3, clip_on=False,
                    **series_style(i),
                )  # fmt: skip
        axes.margins(y=0.12)
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=STEPS))
        round_axis(axes, float(run.num_rounds))
        if frozen:
            axes.plot(
                frozen, [0.04] * len(frozen), transform=axes.get_xaxis_transform(),
                linestyle="none", marker="*", markersize=8, color=INK, zorder=4, clip_on=False,
            )  # fmt: skip
        shown.draw(axes)

    stars = "; ★ a part may be frozen" if frozen else ""
    title = f"What the method measured{note}{stars}"
    ends = [f"{name} ends at {own[-1][1][-1]:.3g}" for name, own in zip(names, pieces, strict=True)]
    alt = f"{title}: {'; '.join(ends)}."
    svg = draw(f"method-{at}", fill, alt, HEIGHT + shown.inches)
    return Plot(f"method-{at}", title, svg, alt, tuple(enumerate(names)))


def _values(rows: Sequence[Row], name: str) -> tuple[np.ndarray, np.ndarray]:
    return series(rows, in_round, lambda row: _method(row, name))
