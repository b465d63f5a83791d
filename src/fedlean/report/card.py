"""The tables of an experiment's card, from the folders of its runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from fedlean.report.units import human

_TARGETS = "time_to_accuracy"
REPORTED = (
    "final_accuracy",
    "best_accuracy",
    "density",
    "dead_units",
    "downlink_bytes",
    "uplink_bytes",
    "flops_per_client",
    "flops_dense_gradient_per_client",
    "simulated_seconds",
    "measured_seconds",
    "peak_memory_bytes",
    "time_to_accuracy",
)


def reported(folder: Path) -> dict[str, Any]:
    """A run's figures, for `expected.json`; the measured seconds alone depend on the machine."""
    summary = json.loads((folder / "summary.json").read_text())
    lines = (folder / "rounds.jsonl").read_text().splitlines()
    rounds = [json.loads(line) for line in lines]
    training = [row for row in rounds if row["round"] > 0]
    if any(key not in summary for key in REPORTED):
        raise ValueError(f"{folder} was made by an earlier version: remove it and run it again")
    device = json.loads((folder / "config.json").read_text())["device"]
    return {
        **{key: summary[key] for key in REPORTED},
        "device": Path(device).name,  # a profile of one's own by its file
        "seconds_before_round_1": sum(
            row["simulated_seconds"] for row in rounds if row["round"] == 0
        ),
        "measured_seconds_before_round_1": sum(
            row["measured_seconds"] for row in rounds if row["round"] == 0
        ),
        "median_round_seconds": median(row["simulated_seconds"] for row in training),
        "median_round_measured_seconds": median(row["measured_seconds"] for row in training),
        "median_round_memory_bytes": median(row["peak_memory_bytes"] for row in training),
        "reconfiguration_share": {
            clock: reconfiguration_share(training, clock)
            for clock in ("simulated_seconds", "measured_seconds")
        },
    }


def reconfiguration_share(training: Sequence[Mapping[str, Any]], clock: str) -> float | None:
    """Time that a change of mask adds, over that of the rounds since the last; None without any.

    `training`: log entries of rounds 1, 2, ...; `clock`: their key.  What it adds is what the round
    of the change takes beyond the one before it, and the next round, which brings the new patterns,
    beyond the one after.  The mean over all changes that have these neighbours.
    """
    masks = [row["layer_density"] for row in training]
    changed = [at for at in range(1, len(training)) if masks[at] != masks[at - 1]]
    shares = []
    for before, at in zip([-1, *changed], changed, strict=False):
        if at - before < 3 or at + 2 >= len(training) or at + 2 in changed or at + 1 in changed:
            continue
        second_before, now, first, second = (training[at + k][clock] for k in (-1, 0, 1, 2))
        span = sum(row[clock] for row in training[before + 1 : at + 1])
        shares.append((now - second_before + first - second) / span)
    return mean(shares) if shares else None


def layer_table(folder: Path) -> str:
    """Markdown: how much each layer keeps, a row per round in which that changed."""
    lines = (folder / "rounds.jsonl").read_text().splitlines()
    rounds = [json.loads(line) for line in lines]
    layers = list(rounds[0]["layer_density"])
    table = [[folder.name, *layers, "all"], ["---"] * (len(layers) + 2)]
    last = None
    for row in rounds:
        if row["layer_density"] != last:
            last = row["layer_density"]
            shares = [*last.values(), row["density"]]
            table.append([f"after round {row['round']}", *(f"{share:.1%}" for share in shares)])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in table)


def card_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a row per run, ratios to the first."""
    baseline = next(iter(results.values()))
    targets = list(baseline["time_to_accuracy"])
    heads = ["run"]
    for target in targets:
        heads += [f"{float(target):.0%}", "measured here"]
    heads += ["before round 1", "median round", "measured here", "density", "at the end", "bytes"]
    heads += ["FLOPs per client", "with dense gradients", "memory, median round / peak"]
    lines = [heads, ["---"] * len(heads)]
    for name, run in results.items():
        line = [name]
        for target in targets:
            line += _reached(run, baseline, target)
        lines.append(line + _totals(run, baseline))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def targets_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: what it took to each target beside seconds, and its ratio to the first run."""
    baseline = next(iter(results.values()))
    heads = ["run"]
    for target in baseline[_TARGETS]:
        heads += [f"bytes to {float(target):.0%}", "FLOPs per client", "with dense gradients"]
    lines = [heads, ["---"] * len(heads)]
    for name, run in results.items():
        line = [name]
        for target, of in baseline[_TARGETS].items():
            at = run[_TARGETS].get(target)
            for key in ("bytes", "flops_per_client", "flops_dense_gradient_per_client"):
                unit = "bytes" if key == "bytes" else "flops"
                share = f" ({at[key] / of[key]:.2f})" if at and of else ""
                line.append(f"{human(at[key], unit)}{share}" if at else "–")
        lines.append(line)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def seeds_table(seeds: Sequence[Mapping[str, Mapping[str, Any]]]) -> str:
    """Markdown: a row per run, its figures with each of the seeds, and the mean at the end."""
    targets = [f"{float(target):.0%}" for target in next(iter(seeds[0].values()))[_TARGETS]]
    heads = ["run", "density", *(f"rounds to {target}" for target in targets)]
    heads += ["at the end", "mean", "bytes up, first seed", "down", "FLOPs per client", "memory"]
    lines = [heads, ["---"] * len(heads)]
    for name, first in seeds[0].items():
        runs = [run[name] for run in seeds]
        line = [name, f"{first['density']:.1%}"]
        for target in first[_TARGETS]:
            reached = [run[_TARGETS].get(target) for run in runs]
            line.append(" / ".join(str(one["round"]) if one else "–" for one in reached))
        ends = [run["final_accuracy"] for run in runs]
        line.append(" / ".join(f"{100 * end:.1f}" for end in ends) + "%")
        line.append(f"{sum(ends) / len(ends):.1%}")
        line += [human(first["uplink_bytes"], "bytes"), human(first["downlink_bytes"], "bytes")]
        line.append(human(first["flops_per_client"], "flops"))
        line.append(human(first["median_round_memory_bytes"], "bytes"))
        lines.append(line)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def times_table(seeds: Sequence[Mapping[str, Mapping[str, Any]]]) -> str:
    """Markdown: a row per run, its seconds to each target with each of the seeds, and the mean of
    all; the ratio is of the means, to the first run.  And what the mean is made of: seconds before
    round 1, rounds, seconds a round; means as well.
    """
    baseline = next(iter(seeds[0]))
    targets = list(seeds[0][baseline][_TARGETS])
    heads = ["run", "density", "before round 1", "median round"]
    for target in targets:
        heads += [f"rounds to {float(target):.0%}", "seconds", "mean"]
    lines = [heads, ["---"] * len(heads)]
    for name in seeds[0]:
        runs = [run[name] for run in seeds]
        line = [name, *(f"{mean(run[key] for run in runs):{form}}" for key, form in _MADE_OF)]
        for target in targets:
            line += _times(runs, [run[baseline] for run in seeds], target)
        lines.append(line)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


_MADE_OF = (
    ("density", ".1%"),
    ("seconds_before_round_1", ".0f"),
    ("median_round_seconds", ".1f"),
)


def _times(runs: Sequence[Any], baselines: Sequence[Any], target: str) -> list[str]:
    """Rounds and seconds to a target with each seed, and the mean of those."""
    reached = [run[_TARGETS].get(target) for run in runs]
    cells = [
        " / ".join(f"{one[key]:.0f}" if one else "–" for one in reached)
        for key in ("round", "simulated_seconds")
    ]
    first = [run[_TARGETS].get(target) for run in baselines]
    if not all(reached) or not all(first):
        return [*cells, "–"]
    ours, theirs = (mean(one["simulated_seconds"] for one in each) for each in (reached, first))
    return [*cells, f"{ours:.0f} s" + ("" if runs == baselines else f", **{theirs / ours:.2f}×**")]


def clock_table(seeds: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Markdown: runs made in turns on the clock of this machine, a row per seed and run.

    Ratios are to the first run of the seed, as everywhere.
    """
    targets = next(iter(next(iter(seeds.values())).values()))[_TARGETS]
    heads = ["run", "seed", *(f"measured to {float(target):.0%}" for target in targets)]
    heads += ["before round 1", "median round", "a reconfiguration adds"]
    lines = [heads, ["---"] * len(heads)]
    for seed, runs in seeds.items():
        baseline = next(iter(runs.values()))
        for name, run in runs.items():
            added = run["reconfiguration_share"]["measured_seconds"]
            lines.append(
                [
                    name,
                    seed.removeprefix("seed"),
                    *(_reached(run, baseline, target)[1] for target in targets),
                    f"{run['measured_seconds_before_round_1']:.1f} s",
                    f"{1e3 * run['median_round_measured_seconds']:.0f} ms",
                    "–" if added is None else f"{added:.1%}",
                ]
            )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _reached(run: Mapping[str, Any], baseline: Mapping[str, Any], target: str) -> list[str]:
    """On the emulated clock, and on this machine's."""
    first, of = (one["time_to_accuracy"].get(target) for one in (run, baseline))
    if first is None:
        return ["not reached", "–"]
    cells = {
        "simulated_seconds": f"{first['simulated_seconds']:.0f} s (round {first['round']})",
        "measured_seconds": f"{first['measured_seconds']:.1f} s",
    }
    if run is not baseline and of is not None:
        cells = {
            clock: f"{cell}, **{of[clock] / first[clock]:.2f}×**" for clock, cell in cells.items()
        }
    if not _same_clock(run, baseline):
        cells["simulated_seconds"] = f"(round {first['round']})"
    return list(cells.values())


def _same_clock(run: Mapping[str, Any], baseline: Mapping[str, Any]) -> bool:
    """Seconds of two emulated devices are not to be compared."""
    return run["device"] == baseline["device"]


def _totals(run: Mapping[str, Any], baseline: Mapping[str, Any]) -> list[str]:
    sent, of = (one["downlink_bytes"] + one["uplink_bytes"] for one in (run, baseline))
    flops, dense = (
        f"{run[key] / 1e12:.2f} T ({run[key] / baseline[key]:.2f})"
        for key in ("flops_per_client", "flops_dense_gradient_per_client")
    )
    emulated = [f"{run['seconds_before_round_1']:.0f} s", f"{run['median_round_seconds']:.1f} s"]
    return [
        *(emulated if _same_clock(run, baseline) else ["–", "–"]),
        f"{1e3 * run['median_round_measured_seconds']:.0f} ms",
        f"{run['density']:.1%}",
        f"{run['final_accuracy']:.2%}",
        f"{sent / 1e9:.1f} GB ({sent / of:.2f})",
        flops,
        dense,
        f"{run['median_round_memory_bytes'] / 1e6:.0f} / {run['peak_memory_bytes'] / 1e6:.0f} MB",
    ]
