"""Whom the model serves, as a part of the page: clients, classes, and what is taken for what."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from fedlean.report import markup, units
from fedlean.report.run_folder import Run, number

MOST_CELLS = 40  # classes of a matrix that a page has room for
WORST = 10  # classes listed where there are more


def served_section(run: Run) -> str:
    """As HTML; "" where the summary says nothing of it."""
    summary = run.summary or {}
    served, personal = _record(summary.get("served")), _record(summary.get("personal"))
    parts = [_clients(_record(served.get("clients")), personal), _classes(served)]
    return "\n".join(part for part in parts if part)


def _clients(clients: dict[str, Any], personal: dict[str, Any]) -> str:
    if not clients:
        return ""
    text = (
        "What a client may expect is the accuracy on test examples in its own mix of classes. "
        f"Client {_whole(clients.get('worst_client'))} is served worst."
    )
    heads = ["of the clients", "worst", "10th percentile", "median"]
    rows = [["the common model", *_spread(clients)]]
    if personal:
        steps = _whole(personal.get("steps"))
        rows.append([f"after {steps} steps of its own", *_spread(_record(personal.get("clients")))])
        gains = _spread(_record(personal.get("gain")), points=True)
        rows.append(["gain of a client, points", *gains])
    return f"<p>{escape(text)}</p>\n{markup.plain_table(heads, rows)}"


def _spread(record: dict[str, Any], *, points: bool = False) -> list[str]:
    values = [number(record.get(name)) for name in ("worst", "percentile_10", "median")]
    if points:
        return ["–" if value is None else f"{100 * value:+.1f}" for value in values]
    return [units.percent(value) for value in values]


def _classes(served: dict[str, Any]) -> str:
    names = [str(name) for name in _list(served.get("classes"))]
    recalls = [number(one) for one in _list(served.get("recall"))]
    if not names or len(names) != len(recalls):
        return ""
    counts = _matrix(served.get("confusion"), len(names))
    if counts and len(names) <= MOST_CELLS:
        return _confusion(names, recalls, counts)
    known = [(one, name) for one, name in zip(recalls, names, strict=True) if one is not None]
    rows = [[name, units.percent(one)] for one, name in sorted(known)[:WORST]]
    return f"<p>The classes recognised least:</p>\n{markup.plain_table(('class', 'recall'), rows)}"


def _confusion(
    names: Sequence[str], recalls: Sequence[float | None], counts: list[list[int]]
) -> str:
    """A row per true class; the darker a cell, the larger its share of the row."""
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    lines = []
    for name, recall, row in zip(names, recalls, counts, strict=True):
        total = max(1, sum(row))
        cells = "".join(_cell(count, count / total) for count in row)
        lines.append(
            f'<tr><th scope="row" class="name">{escape(name)}</th>'
            f"<td>{escape(units.percent(recall))}</td>{cells}</tr>"
        )
    table = (
        '<div class="scroll" tabindex="0"><table class="confusion"><thead><tr><th scope="col">true'
        f' class</th><th scope="col">recall</th>{heads}</tr></thead>\n'
        f"<tbody>{chr(10).join(lines)}</tbody></table></div>"
    )
    return markup.details("Recall by class, and what each class was taken for", table)


def _cell(count: int, share: float) -> str:
    shade = f' style="--share:{share:.3f}"' if count else ""
    return f"<td{shade}>{count or ''}</td>"


def _matrix(value: Any, size: int) -> list[list[int]]:
    """Of counts; [] for anything else, as a file may hold."""
    rows = [_list(row) for row in _list(value)]
    whole = all(
        isinstance(count, int) and not isinstance(count, bool) and 0 <= count < 1 << 53
        for row in rows
        for count in row
    )
    return rows if whole and len(rows) == size and all(len(row) == size for row in rows) else []


def _record(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _whole(value: Any) -> str:
    found = number(value)
    return "?" if found is None else f"{found:.0f}"
