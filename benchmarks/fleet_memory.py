"""Whether devices stay within their memory when each trains the slice that it can hold.

A method that chooses sub-models (HeteroFL, or what `--method` names) over a fleet whose devices
have a memory drawn anew every round.  Of every task that was done this takes what the native engine
held at most (its plan, which tests hold to the byte) against the device's budget, and of one task
of each sub-model, in fresh processes, how much resident memory (VmHWM) grew from before the session
was opened.  Devices that fit nothing are counted, with one reason.

    python benchmarks/fleet_memory.py --data CIFAR10 --json fleet_memory.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from machine import describe

MB = 1e6
MOST_PROCESSES = 8  # of the sub-models that were given most often
LEAST_STEPS = 2  # that a process does before its peak is read


def one_process(spec_json: str, batch: int) -> dict[str, int]:
    """A session of that model, and steps; imports only what a device needs."""
    import numpy as np

    from fedlean.core import SubModel
    from fedlean.engine.open import open_engine
    from fedlean.engine.protocol import SGD
    from fedlean.models.initialise import init_params
    from fedlean.spec import ModelSpec

    spec, rng = ModelSpec.from_json(spec_json), np.random.default_rng(0)
    engine, params = open_engine("native", 1), init_params(spec, 0)
    x = rng.standard_normal((batch, *spec.input_shape)).astype(np.float32)
    y = rng.integers(0, spec.output_shape[0], batch)
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to what is resident now
    before = resident()
    session = engine.open(spec, params, SubModel(), batch_size=batch, optimizer=SGD(0.01))
    for _ in range(LEAST_STEPS):
        session.step(x, y)
    return {"grown_bytes": resident() - before, "planned_bytes": session.peak_memory_bytes}


def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from fedlean.planning.pricing import choice
    from fedlean.runtime.config import RunConfig
    from fedlean.runtime.how import How, Parts, in_process
    from fedlean.runtime.run import start

    fleet = folder / "fleet.toml"
    low, high = (int(megabytes * MB) for megabytes in options.memory_mb)
    fleet.write_text(f"devices = {options.devices}\n[memory_bytes]\nuniform = [{low}, {high}]\n")
    done: list[dict[str, Any]] = []
    specs: dict[str, str] = {}

    def connect(parts: Parts) -> Any:
        inner = parts.algorithm.client_update

        def measured(task: Any, batches: Any, engine: Any, state: Any) -> Any:
            held: list[int] = []
            result = inner(task, batches, Noting(engine, held.append), state)
            part = choice(task)
            specs[part] = task.spec.to_json()
            done.append(
                {"client": task.client, "round": task.round, "part": part, "held": max(held)}
            )
            return result

        return in_process(
            replace(parts, algorithm=parts.algorithm._replace(client_update=measured))
        )

    entries: list[dict[str, Any]] = []
    config = RunConfig(
        options.method,
        dataset=options.data,
        model=options.model,
        rounds=options.rounds,
        clients=options.devices,
        fleet=str(fleet),
        eval_every=options.rounds,
        eval_examples=500,
        final_eval_examples=500,
        settings={
            "cohort": options.cohort,
            "local_steps": options.local_steps,
            "batch_size": options.batch,
            "widths": options.widths,
            "lr": 0.05,
        },
    )
    summary = start(config, folder / "run", How(watch=entries.append, connect=connect))
    return {
        "tasks": done,
        "entries": entries,
        "specs": specs,
        "accuracy": summary["final_accuracy"],
    }


class Noting:
    """An engine that notes what its sessions hold once they have computed."""

    def __init__(self, inner: Any, note: Callable[[int], None]):
        self._inner, self._note = inner, note

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def open(self, *given: Any, **how: Any) -> Any:
        session = self._inner.open(*given, **how)
        self._note(session.peak_memory_bytes)
        return session


def budgets(options: argparse.Namespace, folder: Path) -> Callable[[int, int], int]:
    """The memory of a device in a round, as the run drew it: the fleet is a pure function."""
    from fedlean.cost.profile import load_profile
    from fedlean.fleet.load import load_fleet

    fleet = load_fleet(folder / "fleet.toml", load_profile("raspberry_pi_4")).fleet

    def of(step: int, client: int) -> int:
        memory = fleet.present(0, step, options.devices)[client].memory_bytes
        assert memory is not None
        return memory

    return of


def lines(options: argparse.Namespace, found: dict[str, Any], memory: Any) -> Iterator[str]:
    tasks, entries = found["tasks"], found["entries"]
    step_of = {entry["round"]: step for step, entry in enumerate(entries, start=1)}
    shares = [one["held"] / memory(step_of[one["round"]], one["client"]) for one in tasks]
    left = [(entry["round"], c, why) for entry in entries for c, why in entry["left_out"].items()]
    counts = Counter(one["part"] for one in tasks)
    yield f"{options.model}, batch {options.batch}, {options.rounds} rounds, {len(tasks)} tasks"
    yield f"largest share of a budget that a device held: {max(shares):.3f}"
    yield f"tasks above their budget: {sum(share > 1 for share in shares)}"
    yield f"not sent, since too large for the device: {len(left)}"
    yield from (f"  round {number}, client {client}: {why}" for number, client, why in left[:3])
    for part, one in found["processes"].items():
        grown, planned = (f"{one[key] / MB:.1f} MB" for key in ("grown_bytes", "planned_bytes"))
        yield f"{part}: {counts[part]} tasks, planned {planned}, VmHWM {grown}"
    yield f"accuracy after the last round: {found['accuracy']:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--method", default="heterofl")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--devices", type=int, default=20)
    parser.add_argument("--cohort", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--local-steps", type=int, default=1)
    parser.add_argument("--widths", default="1 0.75 0.5 0.25")
    parser.add_argument("--memory-mb", type=float, nargs=2, default=(40.0, 300.0))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--process", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process:
        print(json.dumps(one_process(Path(options.process).read_text(), options.batch)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = run(options, folder)
        found["processes"] = {}
        counts = Counter(one["part"] for one in found["tasks"])
        specs = found.pop("specs")
        for number, (part, _) in enumerate(counts.most_common(MOST_PROCESSES)):
            path = folder / f"{number}.json"
            path.write_text(specs[part])
            command = [
                sys.executable,
                __file__,
                "--process",
                str(path),
                "--batch",
                str(options.batch),
            ]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found["processes"][part] = json.loads(out)
        print("\n".join(lines(options, found, budgets(options, folder))))
    if options.json:
        document = {"machine": describe(), "options": vars(options) | {"json": None}, **found}
        options.json.write_text(json.dumps(document, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
