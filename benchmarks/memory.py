"""How much memory whole processes need: peak resident bytes (VmHWM), each in a fresh process.

From bare Python over imports to local training: 20 steps with SGD momentum 0.9 on 2,000 images of
28x28, kept as bytes; Conv-2 with B=20 and LeNet-300-100 with B=32; sparse and dense on an engine of
FedLean, and dense as a plain PyTorch script.  A sparse model is loaded as a device gets it, kept
values and mask; no dense copy of it ever exists.  "plan" is what the engine says that a step needs.
The processes run in this environment as it is: no thread or allocator settings, as on a device that
was set up by `pip install`.

    python benchmarks/memory.py --density 0.1 --threads 2 --json memory.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from machine import describe

from fedlean.engine.open import open_engine

PROCESS = Path(__file__).resolve().with_name("memory_process.py")
MB = 1e6
# What the project set itself to stay within, in MB; the sparse ones at a density of 0.1.
LIMITS_MB = {"import fedlean": 40, "conv2 sparse": 64, "lenet300 sparse": 40}


def processes(engine: str, threads: int, density: float) -> dict[str, list[str]]:
    """What to run, by the name of its row."""
    training = [engine, str(threads)]
    rows: dict[str, list[str]] = {
        "bare Python": ["bare"],
        "import numpy": ["import_numpy"],
        "import fedlean": ["import_fedlean"],
        "engine opened": ["open_engine", *training],
    }
    for model in ("lenet300", "conv2"):
        rows[f"{model} sparse"] = ["train", *training, model, str(density)]
        rows[f"{model} dense"] = ["train", *training, model, "1"]
        rows[f"{model} dense, PyTorch"] = ["train_pytorch", str(threads), model]
    return rows


def run(arguments: list[str]) -> dict[str, Any]:
    """One process's report.  Exits when it fails; its error is then on stderr."""
    command = [sys.executable, str(PROCESS), *arguments]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if finished.returncode:
        raise SystemExit(f"the process {' '.join(arguments)} failed")
    return json.loads(finished.stdout)


def measure(name: str, arguments: list[str], repeats: int, density: float) -> dict[str, Any]:
    reports = [run(arguments) for _ in range(repeats)]
    peak = median(report["peak_bytes"] for report in reports)
    limit = LIMITS_MB.get(name) if "sparse" not in name or density <= 0.1 else None
    return {
        "process": name,
        **reports[0],
        "peak_bytes": peak,
        "limit_mb": limit,
        "met": None if limit is None else peak <= limit * MB,
    }


def _line(row: dict[str, Any], bare_bytes: float) -> str:
    def figure(value: float | None) -> str:
        return "" if value is None else f"{value / MB:.1f}"

    met = {True: "yes", False: "NO", None: ""}[row["met"]]
    return (
        f"{row['process']:24} {figure(row['peak_bytes']):>8} "
        f"{figure(row['peak_bytes'] - bare_bytes):>12} {figure(row.get('before_bytes')):>13} "
        f"{figure(row.get('planned_bytes')):>8} {row['limit_mb'] or '':>6} {met:>4}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="processes per row; the median")
    parser.add_argument("--engine", default="native")
    parser.add_argument("--skip-pytorch", action="store_true")
    parser.add_argument("--json", type=Path)
    settings = parser.parse_args()
    try:
        open_engine(settings.engine, settings.threads)
    except ValueError as error:
        parser.error(str(error))
    machine = describe()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(
        f"engine {settings.engine}, {settings.threads} threads, sparse at density "
        f"{settings.density:g}; MB of 10^6 bytes\n"
        f"{'process':24} {'peak':>8} {'above Python':>12} {'before params':>13} {'plan':>8} "
        f"{'limit':>6} {'met':>4}"
    )
    rows: list[dict[str, Any]] = []
    wanted = processes(settings.engine, settings.threads, settings.density)
    for name, arguments in wanted.items():
        if settings.skip_pytorch and "PyTorch" in name:
            continue
        rows.append(measure(name, arguments, settings.repeats, settings.density))
        print(_line(rows[-1], rows[0]["peak_bytes"]), flush=True)
    if settings.json:
        document = {
            "machine": machine,
            "engine": settings.engine,
            "threads": settings.threads,
            "density": settings.density,
            "rows": rows,
        }
        settings.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
