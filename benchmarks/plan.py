"""What `fedlean plan` says beside what a process really does with the native engine.

Each row is one phase of a method that a walk finds.  Its task, as it travels, is done in a fresh
process, of which this takes what the engine's sessions hold at most, how far resident memory
(VmHWM) grew while they trained, and how far until the answer was made, which is arrays beside the
engine that no memory model has.  "down" and "up" are the encoded messages less what the plan says;
a client's answers hold the digits of its losses, and sums that are 0 are not sent.  The last line
times the command itself.

    python benchmarks/plan.py --json plan.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from machine import describe

MB = 1e6
SHAPE, CLASSES, EXAMPLES = (3, 32, 32), 10, 200
ROWS = (  # model, method, settings
    ("conv2", "fedavg", {}),
    ("conv2", "prunefl", {"size_limit": 0.2}),
    ("conv2", "synflow", {"density": 0.1}),
    ("resnet18", "fedavg", {}),
    ("resnet18", "heterofl", {"widths": "0.5"}),
    ("mobilenetv3_small", "fedavg", {"momentum": 0.9}),
    ("mobilenetv3_small", "ntk_zo", {"directions": 5}),
)
TIMED = ("conv2", "resnet18", "mobilenetv3_small")
LIMIT_SECONDS, TOLERANCE = 5.0, 0.05


def planned(model: str, method: str, settings: dict[str, Any], memory_bytes: int) -> list[Any]:
    """(kind, phase) of one device: what is asked, and what the plan says of it."""
    from fedlean.algorithm import Device
    from fedlean.cost.profile import load_profile
    from fedlean.models.catalog import build
    from fedlean.planning.pricing import phases, pricer
    from fedlean.planning.rehearse import Stage

    profile = replace(load_profile("raspberry_pi_4"), dense_way=False)
    device = Device(0, profile=profile, memory_bytes=memory_bytes)
    stage = Stage(build(model, SHAPE, CLASSES))
    kinds = stage.walked(method, settings, device, profile).walk.kinds
    return list(zip(kinds, phases(kinds, stage.spec, pricer(device, profile, {})), strict=True))


def one_process(folder: str, method: str) -> dict[str, int]:
    """Does the task in `folder` for real; the figures of the process."""
    import numpy as np

    from fedlean import wire
    from fedlean.data.batches import ClientData
    from fedlean.data.dataset import Dataset
    from fedlean.engine.open import open_engine
    from fedlean.runtime.method import find_method

    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (EXAMPLES, *SHAPE), dtype=np.uint8)
    y = np.arange(EXAMPLES, dtype=np.int64) % CLASSES
    data = Dataset.from_images("noise", (x, y), (x[:10], y[:10]), classes=CLASSES, scale=255.0)
    batches = ClientData(data, np.arange(EXAMPLES))
    for _ in batches.draw(steps=2, batch_size=20, seed=0):  # what is loaded late is loaded now
        pass
    update_function = sys.modules[find_method(method).__module__].client_update
    task = wire.decode_task(Path(folder, "task").read_bytes(), {}, {})
    watched = _Watched(open_engine("native", 1))
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to what is resident now
    before = _high_water()
    update, _ = update_function(task, batches, watched, {})
    return {
        "engine_bytes": watched.most_bytes,
        "training_bytes": watched.high_water - before,
        "answered_bytes": _high_water() - before,
        "uplink_bytes": len(wire.encode_update(update, task)),
    }


class _Watched:
    """The engine, the most that a session of it has planned, and VmHWM at its last computation."""

    def __init__(self, engine: Any):
        self._engine = engine
        self.arithmetic, self.name = engine.arithmetic, engine.name
        self.instruction_set = engine.instruction_set
        self.most_bytes = self.high_water = 0

    def open(self, *arguments: Any, **options: Any) -> Any:
        return _WatchedSession(self, self._engine.open(*arguments, **options))

    def open_forward(self, *arguments: Any, **options: Any) -> Any:
        return _WatchedSession(self, self._engine.open_forward(*arguments, **options))


class _WatchedSession:
    COMPUTES = ("step", "loss", "losses_perturbed", "descend")

    def __init__(self, watched: _Watched, session: Any):
        self._watched, self._session = watched, session

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._session, name)
        if name not in self.COMPUTES:
            return found

        def computed(*arguments: Any, **options: Any) -> Any:
            result = found(*arguments, **options)
            watched = self._watched
            watched.most_bytes = max(watched.most_bytes, self._session.peak_memory_bytes)
            watched.high_water = _high_water()
            return result

        return computed


def _high_water() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def row(method: str, kind: Any, phase: Any, first: bool) -> dict[str, Any]:
    from fedlean import wire

    task = kind.task
    pattern = wire.pattern_hash(task.sub_model.masks)
    known = wire.Known(frozenset({task.spec.hash}), frozenset({pattern}))
    sent = len(wire.encode_task(task, wire.Known() if first else known))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "task").write_bytes(wire.encode_task(task))
        command = [sys.executable, __file__, "--one", json.dumps([folder, method])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return {
        "phase": " ".join(filter(None, (phase.name, phase.about))),
        "planned_bytes": phase.memory.peak_bytes,
        "downlink_bytes": sent,
        "planned_downlink_bytes": kind.downlink_first_bytes if first else kind.downlink_bytes,
        "planned_uplink_bytes": None if kind.one_client else kind.uplink_bytes,
        **json.loads(done.stdout),
    }


def line(one: dict[str, Any]) -> str:
    def share(key: str) -> str:
        return f"{one[key] / MB:7.2f} ({one[key] / one['planned_bytes'] - 1:+7.1%})"

    down = one["downlink_bytes"] - one["planned_downlink_bytes"]
    said = one["planned_uplink_bytes"]
    up = "" if said is None else f"{one['uplink_bytes'] - said:+d}"  # the last of many answers
    name = f"{one['model']} {one['method']} {one['phase']}"
    return (
        f"{name:45} {one['planned_bytes'] / MB:7.2f} {share('engine_bytes')} "
        f"{share('training_bytes')} {share('answered_bytes')} {down:+6d} {up:>6}"
    )


def command_seconds() -> float:
    words = [word for model in TIMED for word in ("--model", model)]
    words += ["--device", "raspberry_pi_4", "--memory", "1GB", "128MB"]
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "fedlean", "plan", *words], stdout=subprocess.DEVNULL, check=True
    )
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=3, help="of the command; the fastest counts")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one_process(*json.loads(options.one))))
        return
    machine = describe()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"inputs {SHAPE}; MB of 10^6 bytes")
    heads = f"{'engine':>18} {'VmHWM, training':>18} {'VmHWM, answered':>18}"
    print(f"{'':45} {'plan':>7} {heads} {'down':>6} {'up':>6}")
    rows = []
    for model, method, settings in ROWS:
        for at, (kind, phase) in enumerate(planned(model, method, settings, 10**12)):
            found = row(method, kind, phase, first=at == 0)
            rows.append({"model": model, "method": method, **found})
            print(line(rows[-1]), flush=True)
    off = max(abs(one["engine_bytes"] / one["planned_bytes"] - 1) for one in rows)
    print(f"engine and plan differ by {off:.2%} at most (to be within {TOLERANCE:.0%})")
    seconds = min(command_seconds() for _ in range(options.repeats))
    print(f"{', '.join(TIMED)} on two devices: {seconds:.1f} s (below {LIMIT_SECONDS:g} s wanted)")
    if options.json:
        document = {"machine": machine, "rows": rows, "command_seconds": seconds}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
