"""The figures of the tables, as data: `page` lays them out in HTML, `console` for the terminal.

The first run named is the baseline of every ratio.  A cost is counted from the first step of the
run (initial pruning included) to the first evaluation that reached the target.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from statistics import median
from typing import Any, NamedTuple

from fedlean.report import units
from fedlean.report.run_folder import (
    Row,
    Run,
    able_shares,
    best,
    final_accuracy,
    first_reaching,
    has_clock,
    memories,
    number,
    run_total,
    total,
)


@dataclass(frozen=True)
class Figure:
    """One cell: a figure in human units and how it compares with the baseline's."""

    text: str
    ratio: str | None = None  # "2.3× sooner"; None for the baseline or where there is no ratio


@dataclass(frozen=True)
class Cost:
    """What one run paid for one target; `missed` says in words that it never got there."""

    run: str
    target: str
    round: str
    figures: Mapping[str, Figure]  # by the heads of PRICES
    missed: str | None


class _Price(NamedTuple):
    total: str
    kind: units.Kind
    better: str = "less"
    worse: str = "more"


# Head of the column -> what it shows.  Two clocks: the emulated device's, and this machine's.
PRICES: Mapping[str, _Price] = {
    "simulated time": _Price("simulated_seconds", "seconds", "sooner", "later"),
    "measured here": _Price("measured_seconds", "seconds", "sooner", "later"),
    "bytes": _Price("bytes", "bytes"),
    "FLOPs per client": _Price("flops_per_client", "flops"),
    "with dense gradients": _Price("flops_dense_gradient_per_client", "flops"),
}


def labels(runs: Sequence[Run]) -> list[str]:
    """One distinct name per run: the folder's, with its parent's where two are called the same."""
    names = Counter(run.name for run in runs)
    long = [
        r.name if names[r.name] == 1 else f"{r.folder.absolute().parent.name}/{r.name}"
        for r in runs
    ]
    repeats = Counter(long)
    return [
        f"{run.name} ({i + 1})" if repeats[n] > 1 else n
        for i, (n, run) in enumerate(zip(long, runs, strict=True))
    ]


def legend(runs: Sequence[Run]) -> tuple[tuple[int, str], ...]:
    """(series, label) of each run; a single run needs no legend."""
    return tuple(enumerate(labels(runs))) if len(runs) > 1 else ()


def costs(runs: Sequence[Run], targets: Sequence[float]) -> list[list[Cost]]:
    """Per target one row per run, in the order given."""
    names = labels(runs)
    return [
        [_cost(name, run, runs[0], target) for name, run in zip(names, runs, strict=True)]
        for target in targets
    ]


def _cost(name: str, run: Run, baseline: Run, target: float) -> Cost:
    reached = first_reaching(run, target)
    text = units.target_text(target)
    if reached is None:
        return Cost(name, text, "–", dict.fromkeys(PRICES, Figure("–")), missed(run, target))
    base = None if run is baseline else first_reaching(baseline, target)
    figures = {}
    for head, (key, kind, better, worse) in PRICES.items():
        value = None if key == "simulated_seconds" and not has_clock(run) else total(reached, key)
        paid = None if base is None else total(base, key)
        figures[head] = Figure(units.human(value, kind), units.versus(paid, value, better, worse))
    return Cost(name, text, str(reached["round"]), figures, missed=None)


def missed(run: Run, target: float) -> str:
    """The plain words for a target that was not reached."""
    top = best(run)
    if top is None:
        return "not reached: never evaluated"
    accuracy = units.short_of(top["accuracy"], target)
    return f"not reached: best {accuracy}, round {top['round']}"


def summary_rows(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The summary table: one row per quantity, one column per run."""
    settings = ("method", "dataset", "model", "partition", "clients", "cohort", "seed", "engine")
    rows = [(key, [_text(run.fact(key)) for run in runs]) for key in settings]
    rows.append(("device profile", [_text(run.fact("device")) for run in runs]))
    rows.append(("fleet", [_text(_name(run.fact("fleet"))) for run in runs]))
    rows += [(name, [measure(run) for run in runs]) for name, measure in _MEASURES]
    return [(name, cells) for name, cells in rows if any(cell != "–" for cell in cells)]


def _text(value: Any) -> str:
    return "–" if value is None else str(value)


def _name(path: Any) -> str | None:
    """Of a file, without its folders."""
    return PurePath(path).name if isinstance(path, str) else None


def _state(run: Run) -> str:
    return str(run.num_rounds) if run.summary else f"{run.num_rounds}, no summary yet"


def _best(run: Run) -> str:
    top = best(run)
    return "–" if top is None else f"{units.percent(top['accuracy'])} (round {top['round']})"


def density(run: Run) -> float | None:
    """Kept fraction after the last step."""
    return number(run.rounds[-1].get("density")) if run.rounds else None


def peak_memory(run: Run) -> float | None:
    """Modelled peak of the neediest client over all steps."""
    return max(memories(run.rounds), default=None)


def mean_memory(rows: Sequence[Row]) -> float | None:
    """Of the steps' peaks, each step once, however long it took."""
    found = memories(rows)
    return sum(found) / len(found) if found else None


def median_memory(rows: Sequence[Row]) -> float | None:
    found = memories(rows)
    return median(found) if found else None


def participation(rows: Sequence[Row]) -> str:
    """Mean and least share of the devices that could hold the smallest task."""
    found = able_shares(rows)
    if not found:
        return "–"
    mean, least = units.percent(sum(found) / len(found)), units.percent(min(found))
    return mean if mean == least else f"{mean} (least {least})"


def mean_share(run: Run, key: str) -> float | None:
    """Of the steps that have one; None where none has."""
    found = [share for row in run.rounds if (share := number(row.get(key))) is not None]
    return sum(found) / len(found) if found else None


def _clock(run: Run) -> str:
    return units.human(run_total(run, "simulated_seconds") if has_clock(run) else None, "seconds")


def _share(run: Run, key: str) -> str:
    return units.percent(mean_share(run, key))


_MEASURES = (
    ("rounds", _state),
    ("final accuracy", lambda run: units.percent(final_accuracy(run))),
    ("best accuracy", _best),
    ("final density", lambda run: units.density_text(density(run))),
    ("download, all clients", lambda run: units.human(run_total(run, "downlink_bytes"), "bytes")),
    ("upload, all clients", lambda run: units.human(run_total(run, "uplink_bytes"), "bytes")),
    ("FLOPs per client", lambda run: units.human(run_total(run, "flops_per_client"), "flops")),
    ("simulated time", _clock),
    ("wall time here", lambda run: units.human(run_total(run, "wall_seconds"), "seconds")),
    ("peak memory, modelled", lambda run: units.human(peak_memory(run), "bytes")),
    ("mean memory over rounds", lambda run: units.human(mean_memory(run.rounds), "bytes")),
    ("memory of the median round", lambda run: units.human(median_memory(run.rounds), "bytes")),
    ("devices that could take part", lambda run: participation(run.rounds)),
    ("memory used, of what devices have", lambda run: _share(run, "memory_utilisation")),
    ("links busy, of a round's time", lambda run: _share(run, "link_utilisation")),
    ("bytes used, of what a round may send", lambda run: _share(run, "budget_utilisation")),
    ("arithmetic", lambda run: _text(run.fact("arithmetic"))),
)


def differences(runs: Sequence[Run]) -> list[str]:
    """Settings in which the runs differ although a fair comparison holds them equal."""
    held = ("dataset", "model", "partition", "clients", "cohort", "seed", "device", "fleet")
    return [key for key in held if len({_text(run.fact(key)) for run in runs}) > 1]
