"""A plan for the terminal: a table of at most 80 columns for each model on each device."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from fedlean.planning.records import DevicePlan, Plan
from fedlean.planning.rows import NOTES, heads, rows, title, verdicts
from fedlean.printable import printable


def plan_parts(plan: Plan) -> Iterator[Table | str]:
    """Tables, and lines of text below them."""
    for block in plan.devices:
        yield _table(block)
        for line in verdicts(block):
            yield f"  {line}"
        if block.note:
            yield f"  {block.note}"
        yield f"-> {block.reason}"
        yield ""
    if any(block.device_steps for block in plan.devices):
        steps = max(block.device_steps or 0 for block in plan.devices)
        yield f"can: share of {steps} devices drawn from the fleet that can hold it."
    yield from NOTES
    for method, why in plan.left_out.items():
        yield f"{method} is left out: {why}."


def _table(block: DevicePlan) -> Table:
    table = Table(
        title=Text(printable(title(block))), title_justify="left", padding=(0, 1), box=None
    )
    for at, name in enumerate(heads(block)):
        table.add_column(name, justify="right" if at else "left", overflow="fold")
    for cells in rows(block):
        failed = cells[1].endswith("!")
        style = "dim" if failed else ""
        if block.recommended and cells[0].removeprefix("≤ ").split(" ")[0].rstrip(":") == (
            block.recommended
        ):
            style = "bold"
        table.add_row(*(Text(printable(cell), style=style) for cell in cells))
    return table
