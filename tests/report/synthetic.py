"""Synthetic run folders that follow docs/run-folder.md; every figure is easy to redo by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

MB = 1_000_000
TOTALS = ("downlink_bytes", "uplink_bytes", "flops_per_client", "simulated_seconds", "wall_seconds")


def make_run(
    folder: Path,
    accuracies: dict[int, float],
    *,
    rounds: int,
    targets: tuple[float, ...] = (0.9, 0.95),
    density: float = 1.0,
    seconds: float | None = 10.0,
    megabytes: int = 1,
    gflops: float = 1.0,
    initial: int = 0,
    layers: int = 4,
    summary: bool = True,
    change: Callable[[dict[str, Any]], Any] | None = None,
    **facts: Any,
) -> Path:
    """A run in which every step costs the same; `accuracies` says in which rounds it was evaluated.

    `initial` steps of phase "initial" precede round 1.  Each step moves `megabytes` down and as
    much up.  `change` alters the finished row of each step.
    """
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for step in range(1, initial + rounds + 1):
        number = max(0, step - initial)
        rows.append(
            _row(step, number, accuracies.get(number), density ** min(1, number / 10), layers)
        )
        if step < initial:
            rows[-1]["accuracy"] = None
        part = {
            "downlink_bytes": megabytes * MB,
            "uplink_bytes": megabytes * MB,
            "flops_per_client": gflops * 1e9,
            "flops_dense_gradient_per_client": 2 * gflops * 1e9,
            "simulated_seconds": seconds,
            "measured_seconds": 1.0,
            "wall_seconds": 0.25,
        }
        shares = (None, None) if seconds is None else (0.75 * seconds, 0.25 * seconds)
        rows[-1] |= part | dict(zip(("compute_seconds", "link_seconds"), shares, strict=True))
        rows[-1]["total"] = {k: None if v is None else step * v for k, v in part.items()}
        if change:
            change(rows[-1])
    info = {
        "method": "prunefl" if density < 1 else "fedavg",
        "dataset": "digits",
        "model": "conv2",
        "partition": "iid",
        "clients": 10,
        "cohort": 10,
        "rounds": rounds,
        "seed": 0,
        "engine": "torch",
        "device": None if seconds is None else "raspberry-pi-4",
        "arithmetic": "masked",
    } | facts
    config = {k: v for k, v in info.items() if k != "arithmetic"}
    config |= {"target_accuracy": list(targets), "versions": {"fedlean": "0.1.0", "numpy": "2.3.1"}}
    _dump(folder / "config.json", config)
    (folder / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if summary:
        _dump(folder / "summary.json", info | _summary(rows, targets))
    return folder


def _row(
    step: int, number: int, accuracy: float | None, density: float, layers: int
) -> dict[str, Any]:
    return {
        "round": number,
        "phase": "train" if number else "initial",
        "cohort": list(range(10)),
        "absent": [],
        "refused": {},
        "accuracy": accuracy,
        "loss": None if accuracy is None else 2.3 * (1.02 - accuracy),
        "train_loss": 2.0 / step,
        "density": density,
        "layer_density": {f"conv{i}.weight": density ** (1 + i / 4) for i in range(layers)},
        "peak_memory_bytes": 40 * MB,
        "metrics": {},
    }


def _summary(rows: list[dict[str, Any]], targets: tuple[float, ...]) -> dict[str, Any]:
    evaluated = [row for row in rows if row["accuracy"] is not None]
    reached = {}
    for target in targets:
        row = next((row for row in evaluated if row["accuracy"] >= target), None)
        reached[str(target)] = row and {
            "round": row["round"],
            "simulated_seconds": row["total"]["simulated_seconds"],
            "flops_per_client": row["total"]["flops_per_client"],
            "bytes": row["total"]["downlink_bytes"] + row["total"]["uplink_bytes"],
        }
    accuracies = [row["accuracy"] for row in evaluated] or [None]
    return {
        "final_accuracy": accuracies[-1],
        "best_accuracy": max(accuracies) if evaluated else None,
        "density": rows[-1]["density"],
        "peak_memory_bytes": 40 * MB,
        "time_to_accuracy": reached,
        **rows[-1]["total"],
    }


def curve(rounds: int, *, every: int = 1, top: float = 0.97, tau: float = 12.0) -> dict[int, float]:
    """A learning curve with a little deterministic jitter, evaluated in every `every`-th round."""
    found = {}
    for r in range(0, rounds + 1, every):
        jitter = ((r * 7919) % 13 - 6) / 2500
        found[r] = min(1.0, 0.1 + (top - 0.1) * (1 - 2.718 ** (-r / tau)) + (jitter if r else 0))
    return found


def _dump(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value))


def staged(
    ends: Sequence[int],
    names: Sequence[str],
    *,
    phases: Sequence[str] = ("train",),
    devices: int = 10,
) -> Callable[[dict[str, Any]], None]:
    """A `change` of `make_run`: stage i lasts until round ends[i], in every phase once.

    It takes 10 (i + 1) MB, which as many devices fewer than all can hold as it has stages before
    it; its movement falls from 1 to its floor of 1/2, and in its last round it is frozen.
    """
    stages = [(phase, name) for phase in phases for name in names]

    def change(row: dict[str, Any]) -> None:
        at = next((i for i, end in enumerate(ends) if row["round"] <= end), len(ends) - 1)
        begin = ends[at - 1] if at else 0
        share = (row["round"] - begin) / max(1, ends[at] - begin)
        row["phase"], row["stage"] = stages[at]
        row["peak_memory_bytes"] = 10 * MB * (at + 1)
        row["devices"], row["able_devices"] = devices, max(0, devices - at)
        row["method"] = {
            "movement": 1 - share / 2,
            "floor": 0.5,
            "slope": -0.02 * (1 - share),
            "frozen": float(row["round"] == ends[at]),
        }

    return change
