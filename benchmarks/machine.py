"""What a benchmark ran on, and how much of it others were using."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_IDLE_FIELDS = (3, 4)  # of the first line of /proc/stat: idle, waiting for a disk
_BUSY_FIELDS = 8  # user nice system idle iowait irq softirq steal; the rest is counted in these


def describe() -> dict[str, str | int]:
    """Processor, cores this process may use, versions; an instruction set that is forced."""
    facts: dict[str, str | int] = {
        "processor": _processor(),
        "cores": _cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    for package in ("fedlean", "numpy", "torch"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    if forced := os.environ.get("FEDLEAN_INSTRUCTION_SET"):
        facts["FEDLEAN_INSTRUCTION_SET"] = forced
    return facts


def busy_seconds() -> float | None:
    """Processor time that all processes together have used since boot; None where nobody says."""
    try:
        fields = Path("/proc/stat").read_text().partition("\n")[0].split()[1:]
    except OSError:
        return None
    ticks = sum(int(f) for i, f in enumerate(fields[:_BUSY_FIELDS]) if i not in _IDLE_FIELDS)
    return ticks / os.sysconf("SC_CLK_TCK")


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
