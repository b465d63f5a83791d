"""How much of a simulated run is training: the share of its wall time inside the engine.

Runs PruneFL (or another method) in this process and times every call of a session, and the opening
of one.  What is left is the runtime: reading the data, drawing batches, messages' sizes, merging,
Algorithm 2, checkpoints, the log.

    python benchmarks/rounds.py --data ../data/mnist_by_writer --rounds 150
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from machine import describe

from fedlean.engine import native
from fedlean.runtime.config import RunConfig
from fedlean.runtime.how import How
from fedlean.runtime.run import start

CALLS = ("step", "loss", "forward", "backward", "apply", "load", "params", "importance")
SETTINGS = {"lr": 0.25, "local_steps": 5, "batch_size": 20}


class Clock:
    """Seconds inside the engine, by call; calls inside calls are not counted twice."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._depth = 0

    def wrapped(self, owner: type, name: str) -> None:
        call = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds[name] += time.perf_counter() - began

        setattr(owner, name, timed)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="folder of a data set of 28x28 images")
    parser.add_argument("--method", default="prunefl")
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    clock = Clock()
    for name in CALLS:
        clock.wrapped(native.NativeSession, name)
    clock.wrapped(native.NativeEngine, "open")
    config = RunConfig(
        options.method,
        dataset=options.data,
        model="conv2",
        inputs="unit",
        rounds=options.rounds,
        eval_every=options.rounds,
        settings=SETTINGS,
    )
    with tempfile.TemporaryDirectory(prefix="fedlean-rounds-") as folder:
        began = time.perf_counter()
        start(config, Path(folder) / "run", How())
        total = time.perf_counter() - began
    inside = sum(clock.seconds.values())
    machine = describe()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"{options.method}, Conv-2, {options.rounds} rounds of 10 clients, one thread, seed 0")
    for name, seconds in sorted(clock.seconds.items(), key=lambda item: -item[1]):
        print(f"{name:>12} {seconds:8.1f} s {seconds / total:7.1%}")
    print(f"{'engine':>12} {inside:8.1f} s {inside / total:7.1%} of {total:.1f} s")
    if options.json:
        row = {"method": options.method, "rounds": options.rounds, "wall_seconds": total}
        row |= {"engine_share": inside / total, "seconds": dict(clock.seconds)}
        options.json.write_text(json.dumps({"machine": machine, **row}, indent=1) + "\n")


if __name__ == "__main__":
    main()
