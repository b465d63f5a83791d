"""What lies beside an experiment's card, made from its `expected.json`: all tables, and a plot.

The card itself has a brief table, which `brief_table` makes, and what there is to say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.style
from matplotlib.figure import Figure

from fedlean.report.card import (
    card_table,
    clock_table,
    seeds_table,
    targets_table,
    times_table,
)
from fedlean.report.figure import WIDTH
from fedlean.report.units import human

IN_TURNS = "in_turns"  # begins the name of a group whose runs were made in turns
BAR_INCHES, FRAME_INCHES = 0.28, 1.0
Runs = Mapping[str, Mapping[str, Any]]  # name -> figures
Seeds = Mapping[str, Runs]  # "seed0" -> runs


def of_all_seeds(seeds: Seeds) -> list[dict[str, Any]]:
    """By seed, the runs that every seed has."""
    first, *others = seeds.values()
    every = [name for name in first if all(name in runs for runs in others)]
    return [{name: runs[name] for name in every} for runs in seeds.values()]


def brief_table(seeds: Seeds) -> str:
    """Markdown: a row per run that all seeds have; means over them, ratios to the first run.

    Seconds are those of the emulated device.
    """
    common = of_all_seeds(seeds)
    baseline = next(iter(common[0]))
    base = [runs[baseline] for runs in common]
    targets = list(base[0]["time_to_accuracy"])
    heads = ["run", *(f"{float(target):.0%} after" for target in targets)]
    heads += ["at the end", "bytes", "memory, median round / peak"]
    lines = [heads, ["---"] * len(heads)]
    for name in common[0]:
        runs = [one[name] for one in common]
        cells = [_seconds(runs, base, target) for target in targets]
        lines.append([name, *cells, *_ends(runs, base)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _seconds(runs: Sequence[Any], base: Sequence[Any], target: str) -> str:
    reached = [run["time_to_accuracy"].get(target) for run in runs]
    if not any(reached):
        return "not reached"
    if not all(reached):
        return f"reached with {sum(map(bool, reached))} of {len(runs)} seeds"
    if runs[0]["device"] != base[0]["device"]:
        return f"round {mean(one['round'] for one in reached):.0f}"
    ours = mean(one["simulated_seconds"] for one in reached)
    first = [run["time_to_accuracy"].get(target) for run in base]
    if runs[0] is base[0] or not all(first):
        return f"{ours:.0f} s"
    return f"{ours:.0f} s, **{mean(one['simulated_seconds'] for one in first) / ours:.2f}×**"


def _ends(runs: Sequence[Any], base: Sequence[Any]) -> list[str]:
    sent, of = (
        mean(one["downlink_bytes"] + one["uplink_bytes"] for one in each) for each in (runs, base)
    )
    memory = ("median_round_memory_bytes", "peak_memory_bytes")
    return [
        f"{mean(run['final_accuracy'] for run in runs):.1%}",
        f"{human(sent, 'bytes')} ({sent / of:.2f})",
        " / ".join(human(runs[0][key], "bytes") for key in memory),
    ]


def all_tables(title: str, groups: Mapping[str, Seeds]) -> str:
    """The content of `tables.md`."""
    made = "Made from `expected.json`; [the card](README.md) says what they mean."
    parts = [f"# All tables: {title}\n\n{made}\n"]
    for group, seeds in groups.items():
        if group.startswith(IN_TURNS):
            parts.append(f"## {group}\n\n{clock_table(seeds)}")
            continue
        for seed, runs in seeds.items():
            head = f"## {group}, seed {seed.removeprefix('seed')}"
            parts.append(f"{head}\n\n{card_table(runs)}\n{targets_table(runs)}")
        if len(seeds) > 1:
            common = of_all_seeds(seeds)
            parts.append(f"## {group}, all seeds\n\n{times_table(common)}\n{seeds_table(common)}")
    return "\n".join(parts)


def write_times_plot(seeds: Seeds, path: Path) -> None:
    """An SVG file: seconds of the emulated device to the highest target that the first run reached.

    A bar per run, the mean of the seeds that reached it, and a dot for each of those.  A run that
    none did is said to have missed it.  The same figures give the same bytes.
    """
    common = of_all_seeds(seeds)
    baseline = next(iter(common[0]))
    reached = [target for target, at in common[0][baseline]["time_to_accuracy"].items() if at]
    if not reached:
        raise ValueError(f"{path}: the first run, {baseline}, reached none of its targets")
    target = max(reached, key=float)
    device = common[0][baseline]["device"]
    names = [name for name, run in common[0].items() if run["device"] == device]
    with matplotlib.style.context("default"), matplotlib.rc_context({"svg.hashsalt": "card"}):
        height = FRAME_INCHES + BAR_INCHES * len(names)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        for at, name in enumerate(names):
            times = [
                one["simulated_seconds"]
                for runs in common
                if (one := runs[name]["time_to_accuracy"].get(target))
            ]
            if times:
                axes.barh(at, mean(times), color="C0" if name == baseline else "C2", height=0.7)
                axes.plot(times, [at] * len(times), "o", color="black", markersize=3)
            else:
                axes.text(0, at, " not reached", va="center", fontsize="small")
        axes.set_yticks(range(len(names)), names, fontsize="small")
        axes.invert_yaxis()
        axes.set_xlabel(f"seconds of the emulated device to {float(target):.0%}")
        axes.grid(alpha=0.3, axis="x")
        figure.savefig(path, format="svg", metadata={"Date": None})
