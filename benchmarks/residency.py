"""Memory and processor time of other processes, from /proc (Linux)."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

PROC = Path("/proc")
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def peak_bytes(pid: int) -> int:
    """The most resident memory that the process has had (VmHWM)."""
    return _status(pid, "VmHWM:")


def resident_bytes(pid: int) -> int:
    return int((PROC / str(pid) / "statm").read_text().split()[1]) * _PAGE


def proportional_bytes(pid: int) -> int:
    """PSS: a page that n processes share counts 1/n in each."""
    for line in (PROC / str(pid) / "smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return 1024 * int(line.split()[1])
    return 0


def descendants(pid: int) -> list[int]:
    """The process and all that it started, directly or not."""
    parents = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                parents[int(entry.name)] = int(_stat(int(entry.name))[1])
    found = [pid]
    for parent in found:
        found += [child for child, its in parents.items() if its == parent]
    return found


def cpu_seconds(pids: Iterable[int]) -> float:
    """Of these processes and of what they have waited for."""
    total = 0
    for pid in pids:
        with suppress(OSError):
            total += sum(int(field) for field in _stat(pid)[11:15])
    return total / _TICKS


class Sampler:
    """Watches the summed memory of a process and its descendants in a thread of its own.

    The kernel keeps a peak for every process, but none for several together; what lives shorter
    than `interval_seconds` may be missed.
    """

    def __init__(self, pid: int, interval_seconds: float = 0.1):
        self._pid, self._interval = pid, interval_seconds
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.reset()
        self._thread.start()

    def reset(self) -> None:
        self.resident_bytes = self.proportional_bytes = self.processes = 0

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval):
            pids = descendants(self._pid)
            self.processes = max(self.processes, len(pids))
            self.resident_bytes = max(self.resident_bytes, _sum(resident_bytes, pids))
            self.proportional_bytes = max(self.proportional_bytes, _sum(proportional_bytes, pids))


def _sum(measure, pids: Iterable[int]) -> int:
    total = 0
    for pid in pids:
        with suppress(OSError):
            total += measure(pid)
    return total


def _status(pid: int, field: str) -> int:
    for line in (PROC / str(pid) / "status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise ProcessLookupError(f"process {pid} has no {field}")


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on."""
    return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
