"""Reading a run folder (docs/run-folder.md) into one frozen record.

Every figure is taken from `rounds.jsonl`, so a run that is still going or was interrupted is read
exactly like a finished one; `summary.json` adds what only the end of a run knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as brief  # of whatever a file holds
from typing import Any

from fedlean.jsonfile import MAX_BYTES, parse_json, read_json

Row = dict[str, Any]
LARGEST = 1e100  # sums and squares of such numbers are numbers
LARGEST_ROUND = 1 << 50
_PARTS = {  # of a row, each of which may be missing: early runs lack the newer ones
    "layer_density": dict,
    "refused": dict,
    "left_out": dict,
    "parameters": dict,
    "method": dict,
    "stage": str,
    "rejected": list,
    "notes": list,
    "asked_round": int,
}
TOTALS = ("downlink_bytes", "uplink_bytes", "flops_per_client", "simulated_seconds", "wall_seconds")


@dataclass(frozen=True)
class Run:
    """One run folder; `summary` is None while the run is going and after an interruption."""

    name: str
    folder: Path
    config: dict[str, Any]
    rounds: list[Row]
    summary: dict[str, Any] | None

    @property
    def evaluations(self) -> list[Row]:
        """The steps with an accuracy, in order."""
        return [row for row in self.rounds if number(row.get("accuracy")) is not None]

    @property
    def num_rounds(self) -> int:
        """Training rounds completed."""
        return self.rounds[-1]["round"] if self.rounds else 0

    def fact(self, key: str) -> Any:
        """`key` from the summary, else from the configuration (one level of nesting), else None."""
        nested = [value for value in self.config.values() if isinstance(value, Mapping)]
        for source in (self.summary or {}, self.config, *nested):
            if source.get(key) is not None:
                return source[key]
        return None


def number(value: Any) -> float | None:
    """`value` as a float that can be drawn, or None: a diverged loss is no point of a curve."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) <= LARGEST else None  # a NaN is not


def memory(row: Row) -> float | None:
    """Modelled peak of a step's neediest client in bytes; None where no client did anything."""
    value = number(row.get("peak_memory_bytes"))
    return value if value is not None and value > 0 else None


def memories(rows: Iterable[Row]) -> list[float]:
    """`memory` of the steps that have one."""
    return [value for row in rows if (value := memory(row)) is not None]


def able_share(row: Row) -> float | None:
    """Of the devices that were there, those that could hold the step's smallest task."""
    able, devices = number(row.get("able_devices")), number(row.get("devices"))
    if able is None or devices is None or not 0 <= able <= devices or not devices:
        return None
    return able / devices


def able_shares(rows: Iterable[Row]) -> list[float]:
    """`able_share` of the steps that have one."""
    return [share for row in rows if (share := able_share(row)) is not None]


def total(row: Row, key: str) -> float | None:
    """One figure of the run so far; `bytes` is both directions together.

    >>> total({"total": {"downlink_bytes": 3, "uplink_bytes": 4}}, "bytes")
    7.0
    """
    if key == "bytes":
        return float(row["total"]["downlink_bytes"] + row["total"]["uplink_bytes"])
    return number(row["total"].get(key))  # older runs lack the newer figures


def run_total(run: Run, key: str) -> float | None:
    """`total` at the end of the run; None for a run without a single step."""
    return total(run.rounds[-1], key) if run.rounds else None


def has_clock(run: Run) -> bool:
    """Whether the run was charged simulated time; without a device profile there is none."""
    return bool(run_total(run, "simulated_seconds"))


def final_accuracy(run: Run) -> float | None:
    """Accuracy of the last evaluation."""
    evaluations = run.evaluations
    return float(evaluations[-1]["accuracy"]) if evaluations else None


def best(run: Run) -> Row | None:
    """The first of the evaluations with the highest accuracy."""
    return max(run.evaluations, key=lambda row: row["accuracy"], default=None)


def first_reaching(run: Run, target: float) -> Row | None:
    """The first evaluation whose accuracy is at least `target`."""
    return next((row for row in run.evaluations if row["accuracy"] >= target), None)


def targets_of(runs: Sequence[Run]) -> list[float]:
    """All target accuracies that the runs name, ascending; an interrupted run's are configured."""
    found: set[float] = set()
    for run in runs:
        configured = run.config.get("target_accuracy") or ()
        if not isinstance(configured, list | tuple):
            configured = (configured,)
        named = (run.summary or {}).get("time_to_accuracy") or configured
        try:
            found.update(check_target(float(target)) for target in named)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(
                f"{run.folder}: target accuracies must be numbers in (0, 1): {brief(named)}"
            ) from None
    return sorted(found)


def check_target(target: float) -> float:
    """An accuracy to be reached.  Raises ValueError for none."""
    if not 0 < target < 1:
        raise ValueError(f"target accuracy must lie in (0, 1), got {target}")
    return target


def read_run(folder: Path) -> Run:
    """Read a run folder; ValueError in one line where it is not one or is damaged."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    for name in ("config.json", "rounds.jsonl"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: not a run folder, it has no {name}")
    summary = folder / "summary.json"
    return Run(
        name=folder.name or folder.resolve().name,
        folder=folder,
        config=_read_object(folder / "config.json"),
        rounds=_read_rounds(folder / "rounds.jsonl"),
        summary=_read_object(summary) if summary.is_file() else None,
    )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path, finite=False)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _read_rounds(path: Path) -> list[Row]:
    rows: list[Row] = []
    with path.open("rb") as file:
        at = 0
        while line := file.readline(MAX_BYTES):
            at += 1
            if not line.strip():
                continue
            try:
                row = parse_json(line, finite=False)
            except ValueError as error:
                if not line.endswith(b"\n") and len(line) < MAX_BYTES:
                    break  # the writer was killed in the middle
                raise ValueError(f"{path}: line {at} is not JSON ({error})") from None
            _check_row(row, f"{path}: line {at}")
            rows.append(row)
    return rows


def _check_row(row: Any, where: str) -> None:
    if not isinstance(row, dict) or type(row.get("round")) is not int:
        raise ValueError(f"{where} is not a step of a run: an object with an integer 'round'")
    if not 0 <= row["round"] <= LARGEST_ROUND:
        raise ValueError(f"{where}: 'round' is {row['round']!r:.40}, expected a count")
    for key, kind in _PARTS.items():
        if row.get(key) is not None and not isinstance(row[key], kind):
            raise ValueError(f"{where}: '{key}' is {brief(row[key])}, expected a {kind.__name__}")
    if not all(type(client) is int for client in row.get("rejected") or ()):
        raise ValueError(f"{where}: 'rejected' is {brief(row['rejected'])}, expected client ids")
    shares = {"accuracy": row.get("accuracy"), "density": row.get("density")}
    for key, value in (shares | (row.get("layer_density") or {})).items():
        share = number(value)
        if share is not None and not 0 <= share <= 1:
            raise ValueError(f"{where}: '{key:.60}' is {share}, expected a share from 0 to 1")
    totals = row.get("total")
    if not isinstance(totals, dict):
        raise ValueError(f"{where} has no 'total'")
    for key in TOTALS:
        # Time may be null (no device profile); what was sent and computed is always known.
        optional = key.endswith("_seconds") and key in totals and totals[key] is None
        value = number(totals.get(key))
        if not optional and (value is None or value < 0):
            raise ValueError(
                f"{where}: 'total' needs a number '{key}', got {brief(totals.get(key))}"
            )
