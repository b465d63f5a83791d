"""The comparison of costs for the terminal.

A name has a line of its own, however long it is, and the figures below it fit 80 columns.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from fedlean.printable import printable
from fedlean.report.run_folder import Run, targets_of
from fedlean.report.tables import PRICES, Cost, costs

_HEADS = [head for head in PRICES if head != "with dense gradients"]  # what a terminal has room for
_ROUND, _WIDTH = 12, 17  # columns of a terminal


def cost_table(runs: Sequence[Run], targets: Sequence[float] | None = None) -> Text:
    """Costs to each target accuracy; ratios are against the first run."""
    wanted = targets_of(runs) if targets is None else sorted(set(targets))
    text = Text("Cost to first reach a test accuracy\n", style="italic")
    if not wanted:
        return text.append("no target accuracy was set", style="dim")
    for group in costs(runs, wanted):
        text.append("\n" + _line(group[0].target, "round", _HEADS), style="bold")
        for cost in group:
            text.append_text(_of_a_run(cost))
    text.rstrip()
    return text


def _of_a_run(cost: Cost) -> Text:
    """Its name; below it what it paid; below that how this compares."""
    text = Text(f"{printable(cost.run)}\n")  # Text, not str: a name with [brackets] is no markup
    if cost.missed:
        return text.append(f"{'':{_ROUND}}{cost.missed}\n", style="dim")
    figures = [cost.figures[head] for head in _HEADS]
    text.append(_line("", cost.round, [figure.text for figure in figures]))
    if any(figure.ratio for figure in figures):
        text.append(_line("", "", [figure.ratio or "" for figure in figures]), style="dim")
    return text


def _line(first: str, round: str, cells: Sequence[str]) -> str:
    begin = f"{first} {round:>{_ROUND - len(first) - 1}}"
    return f"{begin}{''.join(f'{cell:>{_WIDTH}}' for cell in cells)}\n"
