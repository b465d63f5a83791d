"""What a reader of a run should know before its figures: notes, refused updates, changed data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    nobody = [row for row in run.rounds if _asked_nobody(row)]
    for row in run.rounds:
        notes = _list(row.get("notes"))[1 if _asked_nobody(row) else 0 :]
        lines += [f"Round {_asked(row)}: {line}" for line in notes]
    if nobody:
        why = next(iter(_list(nobody[0].get("notes"))), "nobody was asked")
        steps = _count(len(nobody), "step")
        lines.append(f"{steps} asked nobody; the first, of round {_asked(nobody[0])}: {why}")
    if left_out := _by_client(run, "left_out"):
        client, reasons = next(iter(left_out.items()))
        tasks = _count(sum(map(len, left_out.values())), "task")
        clients = _count(len(left_out), "client")
        lines.append(
            f"{tasks} of {clients} not sent, beyond their devices; the first, of client {client}: "
            f"{reasons[0]}"
        )
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
    refused = _table("Refused updates by client", "refused", _rejected(run))
    left_out = _table("Tasks not sent, by client", "not sent", _by_client(run, "left_out"))
    return f'<ul class="note">{items}</ul>{refused}{left_out}'


def _table(title: str, head: str, by_client: Mapping[Any, Sequence[str]]) -> str:
    """Client, how often, and the first reason; the worst first."""
    if not by_client:
        return ""
    rows = [
        (str(client), str(len(reasons)), reasons[0])
        for client, reasons in sorted(by_client.items(), key=lambda item: -len(item[1]))
    ]
    if len(rows) > MAX_CLIENTS:
        title += f" (the first {MAX_CLIENTS} of {len(rows)})"
    heads = ("client", head, "first reason")
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


def _by_client(run: Run, key: str) -> dict[str, list[str]]:
    """Client -> the reasons that each step has for it under `key`, with the round."""
    found: dict[str, list[str]] = {}
    for row in run.rounds:
        for client, reason in (row.get(key) or {}).items():
            found.setdefault(client, []).append(f"round {_asked(row)}: {reason}")
    return found


def _asked_nobody(row: Row) -> bool:
    """Early runs do not say, and in them it did not happen."""
    return row.get("server_only") is False and not row.get("cohort")


def _list(value: object) -> list:
    return value if isinstance(value, list) else []


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _asked(row: Row) -> Any:
    """The round that a step was about; early runs say only which was completed."""
    return row.get("asked_round", row["round"])
