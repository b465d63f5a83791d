"""What each stage of progressive training took, as a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from statistics import median

from fedlean.report import markup, units
from fedlean.report.run_folder import Row, Run, able_share, memories, number
from fedlean.report.stages import stretches
from fedlean.report.tables import mean_memory, median_memory

MAX_ROWS = 60
_ABOUT = (
    "Memory is the modelled peak of each round's neediest client; mean and median count every "
    "round once, however long it took. Bytes are of all clients together, in the median round. "
    "Devices are those that could hold the smallest task of the median round, of those that were "
    "there. Left out are tasks that were not sent, since they are beyond their devices."
)


def stages_section(run: Run) -> str:
    """As HTML; "" for a run without stages."""
    rows = stage_rows(run)
    if not rows:
        return ""
    about = _ABOUT
    if len(rows) > MAX_ROWS + 1:
        about += f" The first {MAX_ROWS} of {len(rows) - 1} stages."
        rows = [*rows[:MAX_ROWS], rows[-1]]
    return f"<p>{escape(about)}</p>\n{markup.named_table(_heads(), rows)}"


def stage_rows(run: Run) -> list[list[str]]:
    """Texts: the stages in order of first appearance, then the whole run; [] without stages."""
    rounds: dict[str, int] = {}
    steps: dict[str, list[Row]] = {}
    for one in stretches(run):
        rounds[one.name] = rounds.get(one.name, 0) + one.end - one.begin
        steps.setdefault(one.name, []).extend(one.rows)
    found = [_row(name, rounds[name], rows) for name, rows in steps.items()]
    return [*found, _row("whole run", run.num_rounds, run.rounds)] if found else []


def _row(name: str, rounds: int, rows: Sequence[Row]) -> list[str]:
    return [name, str(rounds), *(measure(rows) for measure in _MEASURES.values())]


def _heads() -> tuple[str, ...]:
    return ("stage", "rounds", *_MEASURES)


def _bytes(key: str) -> Callable[[Sequence[Row]], str]:
    def text(rows: Sequence[Row]) -> str:
        asked = [number(row.get(key)) for row in rows if row.get("cohort")]
        found = [value for value in asked if value is not None]
        return units.human(median(found) if found else None, "bytes")

    return text


def _devices(rows: Sequence[Row]) -> str:
    """`6 of 10, least 4`: medians, and the round in which the fewest could."""
    known = [row for row in rows if able_share(row) is not None]
    if not known:
        return "–"
    able = [float(row["able_devices"]) for row in known]
    there = median(float(row["devices"]) for row in known)
    least = f", least {min(able):g}" if min(able) < median(able) else ""
    return f"{median(able):g} of {there:g}{least}"


def _asked(rows: Sequence[Row]) -> str:
    cohorts = [row["cohort"] for row in rows if isinstance(row.get("cohort"), list)]
    return str(sum(map(len, cohorts))) if cohorts else "–"


def _left_out(rows: Sequence[Row]) -> str:
    return str(sum(len(row.get("left_out") or {}) for row in rows))


def _accuracy(rows: Sequence[Row]) -> str:
    found = [value for row in rows if (value := number(row.get("accuracy"))) is not None]
    return units.percent(found[-1] if found else None)


_MEASURES: dict[str, Callable[[Sequence[Row]], str]] = {
    "peak memory": lambda rows: units.human(max(memories(rows), default=None), "bytes"),
    "median": lambda rows: units.human(median_memory(rows), "bytes"),
    "mean": lambda rows: units.human(mean_memory(rows), "bytes"),
    "down per round": _bytes("downlink_bytes"),
    "up per round": _bytes("uplink_bytes"),
    "devices": _devices,
    "tasks sent": _asked,
    "left out": _left_out,
    "accuracy at its end": _accuracy,
}
