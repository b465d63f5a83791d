"""Fair timing of contenders: in processes of their own, in turns, medians, beside the load.

The benchmark itself only asks: its child processes hold the contenders and run a block of calls
when told to, one child at a time, contender after contender, so that whatever drifts (frequency,
load, memory) drifts for all.  A block starts with one call that is not timed: it brings the
contender's data back into the caches that the others have used.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from machine import busy_seconds

BLOCK_SECONDS = 0.1  # at least one call; long enough for the clock of `busy_seconds`, 10 ms
QUIET_CORES = 0.25  # rounds in which other processes used more than this do not count...
MIN_ROUNDS = 5  # ...unless fewer than this are left


@dataclass(frozen=True)
class Timing:
    """Medians over rounds, per call.  CPU time is that of all the process's threads together."""

    wall_seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class Comparison:
    timings: Mapping[str, Timing]
    rounds: int  # that count
    quiet: bool  # False: other processes disturbed these rounds, wall times mean little
    others_cores: float  # mean cores that other processes used, in the rounds that count


Round = tuple[Mapping[str, Mapping[str, float]], float]  # blocks by contender, cores of others


class Child:
    """A fresh process of `script`, which must call `serve` when its first argument is `serve`."""

    def __init__(self, script: str):
        self._process = subprocess.Popen(
            [sys.executable, str(Path(script).resolve()), "serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, action: str, **arguments: Any) -> Any:
        """The child's answer.  Exits when the child died, whose traceback is then on stderr."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps({"action": action, **arguments}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"the process that was to do {action!r} {arguments} ended")
        return json.loads(answer)

    def close(self) -> None:
        self._process.communicate()  # closes its stdin, which ends it


Contenders = MutableMapping[str, Callable[[], object]]


def serve(actions: Mapping[str, Callable[..., Any]], contenders: Contenders) -> None:
    """The child's loop: `actions` by name, of which some fill `contenders`; ends with stdin."""
    for line in sys.stdin:
        request = json.loads(line)
        action = request.pop("action")
        answer = _block(contenders, **request) if action == "block" else actions[action](**request)
        print(json.dumps(answer), flush=True)


def _block(contenders: Contenders, name: str, calls: int) -> dict[str, float]:
    call = contenders[name]
    before = time.process_time()
    call()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        call()
    wall, now = time.perf_counter() - wall, time.process_time()
    return {
        "wall_seconds": wall / calls,
        "cpu_seconds": (now - cpu) / calls,
        "total_cpu_seconds": now - before,
    }


def compare(where: Mapping[str, Child], *, repeats: int, budget_seconds: float) -> Comparison:
    """Runs the named contenders in turns: `repeats` quiet rounds, or until the budget is spent."""
    calls = {}
    for name, child in where.items():
        seconds = child.ask("block", name=name, calls=1)["wall_seconds"]
        calls[name] = max(1, round(BLOCK_SECONDS / seconds))
    rounds: list[Round] = []
    deadline = time.monotonic() + budget_seconds
    while len(_quiet(rounds)) < repeats:
        if time.monotonic() > deadline and len(rounds) >= MIN_ROUNDS:
            break
        order = list(where) if len(rounds) % 2 else list(where)[::-1]
        rounds.append(_round({name: where[name] for name in order}, calls))
    quiet = _quiet(rounds)
    counted = quiet if len(quiet) >= MIN_ROUNDS else rounds
    timings = {
        name: Timing(
            median(blocks[name]["wall_seconds"] for blocks, _ in counted),
            median(blocks[name]["cpu_seconds"] for blocks, _ in counted),
        )
        for name in where
    }
    others = sum(others for _, others in counted) / len(counted)
    return Comparison(timings, len(counted), counted is quiet, others)


def fastest(candidates: Iterable[str], child: Child, *, count: int = 2) -> list[str]:
    """The few of several candidates that are worth timing in turns with the engine."""
    timings = compare(dict.fromkeys(candidates, child), repeats=5, budget_seconds=10).timings
    return sorted(timings, key=lambda name: timings[name].wall_seconds)[:count]


def _round(where: Mapping[str, Child], calls: Mapping[str, int]) -> Round:
    """One block of each contender, and the cores that other processes used meanwhile."""
    busy, began = busy_seconds(), time.monotonic()
    blocks = {
        name: child.ask("block", name=name, calls=calls[name]) for name, child in where.items()
    }
    if busy is None or (now := busy_seconds()) is None:
        return blocks, 0.0
    own = sum(block["total_cpu_seconds"] for block in blocks.values())
    return blocks, max(0.0, now - busy - own) / (time.monotonic() - began)


def _quiet(rounds: list[Round]) -> list[Round]:
    return [(blocks, others) for blocks, others in rounds if others <= QUIET_CORES]
