"""Training without backpropagation on a device: its memory, and what a perturbation costs.

Memory: ResNet-20 with GroupNorm on 3x32x32, in fresh processes.  A process imports, makes its data
and parameters, and then opens a session and computes twice; "grown" is its peak resident memory
(VmHWM) over what it held before, beside the engine's plan.  Forward only evaluates perturbed
parameters at batch 32; backpropagation takes plain SGD steps at batch 32 and, as the fair baseline,
at the micro-batches 4 and 1 (a panel has four examples at least, so these two hold the same).  An
update of 32 examples from micro-batches would keep their summed gradients too, once the model's
parameters; a step as it is measured here updates at every micro-batch.

Time: one loss at perturbed parameters, the mean of `--directions` in one call, of models at density
1 and at a uniformly random `--density`, in turns in one process (see interleaved.py); a step of
backpropagation and an unperturbed loss beside them.  One thread unless said otherwise.

    python benchmarks/forward_only.py --json forward_only.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

from interleaved import Child, Contenders, compare, serve
from machine import describe

MB = 1e6
MEMORY_MODEL, MEMORY_BATCH = "resnet20", 32
MICRO_BATCHES = (4, 1)
SHAPES = {"resnet20": (3, 32, 32), "conv2": (1, 28, 28), "lenet300": (1, 28, 28)}
MODULES = {"resnet20": "resnet"}  # where the model's function is, if not in a module of its name
KINDS = ("gaussian", "sign", "rank1")


def _model(name: str, density: float) -> tuple[Any, Any, Any]:
    """(spec, parameters, sub-model); imports only what a device needs."""
    from fedlean.core import SubModel, generator
    from fedlean.models.initialise import init_params

    module = import_module(f"fedlean.models.{MODULES.get(name, name)}")
    spec = getattr(module, name)(SHAPES[name], 10)
    rng = generator(0, 0, 0, "benchmark")
    masks = {}
    if density < 1:
        masks = {name: rng.random(spec.param_shapes[name]) < density for name in spec.prunable}
    return spec, init_params(spec, 0), SubModel(masks=masks)


def _batch(name: str, size: int) -> tuple[Any, Any]:
    import numpy as np

    rng = np.random.default_rng(0)
    x = rng.standard_normal((size, *SHAPES[name]), np.float32)
    return x, rng.integers(0, 10, size)


def _session(engine: Any, what: str, model: tuple[Any, Any, Any], batch_size: int) -> Any:
    from fedlean.engine.protocol import SGD

    if what == "forward":
        return engine.open_forward(*model, batch_size=batch_size)
    return engine.open(*model, batch_size=batch_size, optimizer=SGD(0.01))


# Memory, in a process of its own


def memory_process(what: str, batch_size: int, density: float) -> dict[str, float]:
    from fedlean.engine.directions import normal_table
    from fedlean.engine.open import open_engine

    engine = open_engine("native", 1)
    model = _model(MEMORY_MODEL, density)
    x, y = _batch(MEMORY_MODEL, batch_size)
    if what == "forward":
        normal_table()  # 256 KiB and what making it takes: once for a process, not for a model
    _forget_peak()
    before = _resident("VmHWM")
    session = _session(engine, what, model, batch_size)
    for _ in range(2):
        if what == "forward":
            session.losses_perturbed(x, y, seed=0, ks=[0, 1], sigma=1e-3)
        else:
            session.step(x, y)
    return {
        "planned_bytes": session.peak_memory_bytes,
        "grown_bytes": _resident("VmHWM") - before,
        "process_bytes": _resident("VmHWM"),
    }


def _forget_peak() -> None:
    """Sets VmHWM to what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def measure_memory(repeats: int, density: float) -> list[dict[str, Any]]:
    """Rows of forward only and of backpropagation, at density 1 and at `density`."""
    contenders = [("forward", MEMORY_BATCH)]
    contenders += [("backpropagation", size) for size in (MEMORY_BATCH, *MICRO_BATCHES)]
    contenders += [("forward", size) for size in MICRO_BATCHES]
    reports: dict[tuple[str, int, float], list[dict[str, float]]] = {}
    for _ in range(repeats):
        for kept in (1.0, density):
            for what, size in contenders:
                report = _report(what, size, kept)
                reports.setdefault((what, size, kept), []).append(report)
    return [
        {
            "what": what,
            "batch_size": size,
            "density": kept,
            "planned_bytes": of[0]["planned_bytes"],
            "grown_bytes": median(report["grown_bytes"] for report in of),
            "process_bytes": median(report["process_bytes"] for report in of),
        }
        for (what, size, kept), of in reports.items()
    ]


def _report(what: str, batch_size: int, density: float) -> dict[str, float]:
    command = [sys.executable, __file__, "memory", what, str(batch_size), str(density)]
    # glibc keeps freed memory to use it again; what was freed before must not hide what follows
    give_back = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=False, env=os.environ | give_back
    )
    if done.returncode:
        raise SystemExit(f"the process of {what} at batch {batch_size} failed")
    return json.loads(done.stdout)


def print_memory(rows: list[dict[str, Any]]) -> None:
    print(
        f"{MEMORY_MODEL}, native engine, one thread; MB of 10^6 bytes, and how many times what "
        f"forward only takes at batch {MEMORY_BATCH}\n"
        f"{'density':>7} {'':16} {'batch':>5} {'plan':>8} {'times':>6} {'grown':>8} {'times':>6} "
        f"{'process':>8}"
    )
    base: dict[float, dict[str, Any]] = {}
    for row in rows:
        own = base.setdefault(row["density"], row)  # the first is forward only
        print(
            f"{row['density']:7g} {row['what']:16} {row['batch_size']:5} "
            f"{row['planned_bytes'] / MB:8.2f} {row['planned_bytes'] / own['planned_bytes']:6.2f} "
            f"{row['grown_bytes'] / MB:8.2f} {row['grown_bytes'] / own['grown_bytes']:6.2f} "
            f"{row['process_bytes'] / MB:8.1f}"
        )


# Time


def open_contenders(
    contenders: Contenders,
    *,
    model: str,
    batch_size: int,
    density: float,
    directions: int,
    threads: int,
) -> list[str]:
    """In the child: perturbed losses, plain losses and steps at both densities, by name."""
    from fedlean.engine.open import open_engine

    x, y = _batch(model, batch_size)
    for kept in (1.0, density):
        parts = _model(model, kept)
        engine = open_engine("native", threads)
        session = engine.open_forward(
            *parts, batch_size=batch_size, directions_at_once=min(threads, directions)
        )
        for kind in KINDS:
            contenders[f"{kind} {kept:g}"] = _perturb(session, x, y, kind, directions)
        contenders[f"loss {kept:g}"] = lambda session=session: session.loss(x, y)
        trained = _session(engine, "backpropagation", parts, batch_size)
        contenders[f"step {kept:g}"] = lambda trained=trained: trained.step(x, y)
    return list(contenders)


def _perturb(session: Any, x: Any, y: Any, kind: str, directions: int) -> Callable[[], object]:
    return lambda: session.losses_perturbed(
        x, y, seed=0, ks=range(directions), sigma=1e-3, kind=kind
    )


def measure_time(settings: argparse.Namespace, model: str) -> dict[str, Any]:
    child = Child(__file__)
    names = child.ask(
        "open",
        model=model,
        batch_size=settings.batch,
        density=settings.density,
        directions=settings.directions,
        threads=settings.threads,
    )
    comparison = compare(
        dict.fromkeys(names, child), repeats=settings.repeats, budget_seconds=settings.budget
    )
    child.close()
    seconds = {}
    for name, timing in comparison.timings.items():
        calls = settings.directions if name.split()[0] in KINDS else 1
        seconds[name] = timing.wall_seconds / calls
    return {
        "model": model,
        "batch_size": settings.batch,
        "seconds": seconds,
        "rounds": comparison.rounds,
        "quiet": comparison.quiet,
        "others_cores": comparison.others_cores,
    }


def print_time(row: dict[str, Any], density: float) -> None:
    print(
        f"{row['model']}, batch {row['batch_size']}: µs each, median of {row['rounds']} "
        f"{'quiet' if row['quiet'] else 'DISTURBED'} rounds "
        f"({row['others_cores']:.2f} cores used by others)\n"
        f"{'':10} {'dense':>10} {density:>10g} {'times':>6}"
    )
    for what in (*KINDS, "loss", "step"):
        dense, sparse = (row["seconds"][f"{what} {kept:g}"] for kept in (1.0, density))
        print(f"{what:10} {1e6 * dense:10.1f} {1e6 * sparse:10.1f} {dense / sparse:6.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--batch", type=int, default=32, help="of the timed models")
    parser.add_argument("--directions", type=int, default=8, help="in one timed call")
    parser.add_argument("--threads", type=int, default=1, help="of the timed models")
    parser.add_argument("--models", nargs="*", default=["lenet300", "conv2"])
    parser.add_argument("--repeats", type=int, default=9, help="timed rounds")
    parser.add_argument("--processes", type=int, default=3, help="per row of memory; 0: none")
    parser.add_argument("--budget", type=float, default=90.0, help="seconds of timing per model")
    parser.add_argument("--json", type=Path)
    settings = parser.parse_args()
    machine = describe()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    memory = measure_memory(settings.processes, settings.density) if settings.processes else []
    if memory:
        print_memory(memory)
    times = []
    for model in settings.models:
        times.append(measure_time(settings, model))
        print_time(times[-1], settings.density)
    if settings.json:
        document = {"machine": machine, "memory": memory, "times": times}
        settings.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        held: Contenders = {}
        serve({"open": lambda **arguments: open_contenders(held, **arguments)}, held)
    elif sys.argv[1:2] == ["memory"]:
        what, batch_size, density = sys.argv[2:]
        print(json.dumps(memory_process(what, int(batch_size), float(density))))
    else:
        main()
