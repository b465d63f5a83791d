"""The comparison of costs for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from fedlean.printable import printable
from fedlean.report.run_folder import Run, targets_of
from fedlean.report.tables import PRICES, Cost, Figure, costs

_HEADS = [head for head in PRICES if head != "with dense gradients"]  # what a terminal has room for


def cost_table(runs: Sequence[Run], targets: Sequence[float] | None = None) -> Table:
    """Costs to each target accuracy; ratios are against the first run."""
    wanted = targets_of(runs) if targets is None else sorted(set(targets))
    table = Table(title="Cost to first reach a test accuracy", title_justify="left")
    table.add_column("target", justify="right")
    table.add_column("run", overflow="fold")
    for name in ("round", *_HEADS):
        table.add_column(name, justify="right")
    for group in costs(runs, wanted):
        for at, cost in enumerate(group):
            _add(table, cost, first=at == 0, last=at == len(group) - 1)
    if not wanted:
        table.caption = "no target accuracy was set"
    return table


def _add(table: Table, cost: Cost, *, first: bool, last: bool) -> None:
    # Text, not str: a name with [brackets] is a name, not markup.
    head = (Text(cost.target if first else ""), Text(printable(cost.run)))
    if cost.missed:
        rest = ["–"] * (len(_HEADS) - 1)
        table.add_row(*head, "–", Text(cost.missed, style="dim"), *rest, end_section=last)
        return
    cells = (_cell(cost.figures[head]) for head in _HEADS)
    table.add_row(*head, cost.round, *cells, end_section=last)


def _cell(figure: Figure) -> Text:
    text = Text(figure.text)
    return text.append(f"  {figure.ratio}", style="dim") if figure.ratio else text
