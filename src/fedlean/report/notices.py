"""What a reader of a run should know before its figures: notes, refused updates, changed data."""

from __future__ import annotations

from html import escape
from typing import Any

from fedlean.report import markup
from fedlean.report.run_folder import Row, Run

MAX_CLIENTS = 20  # of the table; the log has all


def notices(run: Run) -> list[str]:
    """Sentences, the oldest first; [] for a run with nothing to remark."""
    lines = [str(line) for line in _list(run.config.get("notes"))]
    data = run.config.get("data")
    changes = _list(data.get("changes")) if isinstance(data, dict) else ()
    for change in (change for change in changes if isinstance(change, dict)):
        parts = "; ".join(map(str, _list(change.get("changed"))))
        lines.append(
            f"After round {change.get('after_round')} the run went on with other data: {parts}"
        )
    for row in run.rounds:
        lines += [f"Round {_asked(row)}: {line}" for line in _list(row.get("notes"))]
    if rejected := _rejected(run):
        updates = _count(sum(map(len, rejected.values())), "update")
        clients = _count(len(rejected), "client")
        client, reasons = next(iter(rejected.items()))
        lines.append(f"{updates} of {clients} refused; the first, of client {client}: {reasons[0]}")
    return lines


def notices_section(run: Run) -> str:
    """As HTML; "" where there is nothing to remark."""
    lines = notices(run)
    if not lines:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<ul class="note">{items}</ul>{_table(run)}'


def _table(run: Run) -> str:
    """Client, how many of its updates were refused, and the first reason."""
    rejected = _rejected(run)
    if not rejected:
        return ""
    rows = [
        (str(client), str(len(reasons)), reasons[0])
        for client, reasons in sorted(rejected.items(), key=lambda item: -len(item[1]))
    ]
    title = "Refused updates by client"
    if len(rows) > MAX_CLIENTS:
        title += f" (the first {MAX_CLIENTS} of {len(rows)})"
    heads = ("client", "refused", "first reason")
    return markup.details(title, markup.plain_table(heads, rows[:MAX_CLIENTS]))


def _rejected(run: Run) -> dict[int, list[str]]:
    """Client -> why each of its updates was refused, with the round."""
    found: dict[int, list[str]] = {}
    for row in run.rounds:
        reasons = row.get("refused") or {}
        for client in _list(row.get("rejected")):
            why = f"round {_asked(row)}: {reasons.get(str(client), 'no reason given')}"
            found.setdefault(client, []).append(why)
    return found


def _list(value: object) -> list:
    return value if isinstance(value, list) else []


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _asked(row: Row) -> Any:
    """The round that a step was about; early runs say only which was completed."""
    return row.get("asked_round", row["round"])
