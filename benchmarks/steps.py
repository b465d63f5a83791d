"""How long one training step takes: an engine at several densities beside the best dense PyTorch.

A step is forward, backward and SGD update with momentum 0.9, through `Session.step`; also timed are
the step that adds g² of all coordinates (importance) and the forward-only loss.  PyTorch is a plain
eager module, best of NCHW and channels_last, SGD fused and not; engine and PyTorch take turns in
one process (--isolated: in two), and the ratio is of medians.  Masks are uniform at random on all
prunable weights.  Seed 0.

    python benchmarks/steps.py --models conv2 --densities 1.0 0.1 --threads 1 --json steps.json

Rounds in which other processes used the machine do not count; where too few are left the row is
marked with ~, and then only the CPU ratio on one thread means something: on two, PyTorch's threads
wait for each other in loops that others stretch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from interleaved import Child, Comparison, Contenders, compare, fastest, serve
from machine import describe

from fedlean.core import Params, SubModel, generator
from fedlean.engine.open import open_engine
from fedlean.engine.protocol import SGD, Engine, Session
from fedlean.layers import (
    BatchNorm,
    Conv1d,
    GlobalAvgPool,
    Layer,
    Linear,
    MaxPool1d,
    ReLU,
    Shape,
)
from fedlean.models.catalog import build
from fedlean.models.initialise import init_params
from fedlean.spec import ModelSpec, sequential

MODELS = {  # input shape, classes, batch size
    "conv2": ((1, 28, 28), 62, 20),
    "lenet300": ((1, 28, 28), 10, 32),
    "vgg11": ((3, 32, 32), 10, 20),
    "resnet18": ((3, 32, 32), 10, 20),
    "signals": ((6, 128), 6, 32),  # `signals` below
}
DENSITIES = (1.0, 0.677, 0.5, 0.3, 0.2, 0.178, 0.1, 0.05, 0.02, 0.01)
OPERATIONS = ("step", "importance_step", "loss")
# What the project set itself to reach, as ratios over PyTorch: (model, threads) -> density ->
# (floor, stretch).  Threads 0: any number.
TARGETS: dict[tuple[str, int], dict[float, tuple[float, float | None]]] = {
    ("conv2", 0): {1.0: (0.8, 1.0)},
    ("conv2", 1): {0.1: (5, 8)},
    ("conv2", 2): {
        **{0.5: (1.2, 1.8), 0.3: (2, 3), 0.2: (3, 4), 0.1: (5, 7)},
        **{0.05: (8, 11), 0.02: (11, 17), 0.01: (14, 23)},
    },
    ("lenet300", 0): {0.5: (1, None)},
    ("lenet300", 1): {
        **{0.5: (2, None), 0.3: (4, None), 0.2: (6, None), 0.1: (10, None)},
        **{0.05: (17, None), 0.02: (28, None), 0.01: (38, None)},
    },
    ("vgg11", 0): {1.0: (0.8, 1.0), 0.677: (1, None), 0.178: (1, None)},
    ("resnet18", 0): {1.0: (0.8, 1.0), 0.677: (1, None), 0.178: (1, None)},
}
# So small that weights stay where they are however often the step runs: gradients that fade away
# would slow the arithmetic down (denormal numbers), and weights that explode would stop it.
OPTIMIZER = SGD(lr=1e-5, momentum=0.9)
CHECK_OPTIMIZER = SGD(lr=1e-3, momentum=0.9)
BATCHES = 4
TOLERANCE = 1e-3  # relative; rounding alone makes ResNet-18 differ by 1e-4 after three steps


@dataclass(frozen=True)
class Case:
    """One model with its data, the same in every process."""

    spec: ModelSpec
    params: Params
    masks: dict[str, np.ndarray]
    batches: list[tuple[np.ndarray, np.ndarray]]

    @property
    def batch_size(self) -> int:
        return len(self.batches[0][1])


def signals(input_shape: Shape, classes: int) -> ModelSpec:
    """A network of motion sensors: three Conv1d layers, two of them pooled, and global pooling."""
    layers: list[tuple[str, Layer]] = []
    for i, (channels, kernel) in enumerate(((32, 5), (64, 5), (128, 3)), start=1):
        layers += [
            (f"conv{i}", Conv1d(channels, kernel, padding=kernel // 2)),
            (f"bn{i}", BatchNorm()),
            (f"relu{i}", ReLU()),
        ]
        if i < 3:
            layers.append((f"pool{i}", MaxPool1d(2)))
    return sequential(input_shape, [*layers, ("pool", GlobalAvgPool()), ("fc", Linear(classes))])


def make_case(model: str, batch_size: int, density: float) -> Case:
    input_shape, classes, _ = MODELS[model]
    spec = (
        signals(input_shape, classes) if model == "signals" else build(model, input_shape, classes)
    )
    rng = generator(0, 0, 0, "benchmark")
    batches = [
        (
            rng.random((batch_size, *spec.input_shape), np.float32),
            rng.integers(0, classes, batch_size),
        )
        for _ in range(BATCHES)
    ]
    params = dict(init_params(spec, 0))
    masks = {}
    if density < 1:
        for name in spec.prunable:
            masks[name] = rng.random(spec.param_shapes[name], np.float32) < density
            # Kept weights as large as training would leave them: as much signal as a dense layer.
            params[name] = params[name] * masks[name] / np.float32(np.sqrt(density))
    return Case(spec, params, masks, batches)


def losses(engine: Engine, case: Case) -> list[float]:
    """Of a few real steps: what both sides must agree on before their speed is compared."""
    session = _open(engine, case, CHECK_OPTIMIZER)
    steps = [session.step(x, y) for x, y in case.batches[:3]]
    return [*steps, session.loss(*case.batches[3])]


def _open(engine: Engine, case: Case, optimizer: SGD) -> Session:
    return engine.open(
        case.spec,
        case.params,
        SubModel(masks=case.masks),
        batch_size=case.batch_size,
        optimizer=optimizer,
    )


# --- in the child processes -----------------------------------------------------------------------


def child() -> None:
    contenders: Contenders = {}

    def open_sessions(
        engine: str, threads: int, model: str, batch_size: int, density: float
    ) -> dict[str, Any]:
        case, opened = make_case(model, batch_size, density), open_engine(engine, threads)
        checked = losses(opened, case)
        for operation in OPERATIONS:
            call = _operation(_open(opened, case, OPTIMIZER), operation, case)
            contenders[f"engine {operation}"] = call
        return {"losses": checked, "instruction_set": opened.instruction_set}

    def open_torch(threads: int, model: str, batch_size: int) -> list[str]:
        import torch
        from torch_dense import dense_models

        torch.set_num_threads(threads)
        case = make_case(model, batch_size, 1.0)
        models = dense_models(case.spec, case.params, case.batches, OPTIMIZER)
        for name, dense in models.items():
            for operation in OPERATIONS:
                contenders[f"{name} {operation}"] = getattr(dense, operation)
        return list(models)

    def masked_losses(threads: int, model: str, batch_size: int, density: float) -> list[float]:
        case = make_case(model, batch_size, density)
        return losses(open_engine("torch", threads), case)

    actions = {
        "open_sessions": open_sessions,
        "open_torch": open_torch,
        "masked_losses": masked_losses,
    }
    serve(actions, contenders)


def _operation(session: Session, operation: str, case: Case) -> Callable[[], float]:
    batches = cycle(case.batches)
    if operation == "loss":
        return lambda: session.loss(*next(batches))
    importance = operation == "importance_step"
    return lambda: session.step(*next(batches), importance=importance)


# --- in the process that asks ---------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Times in ms per call; ratios are PyTorch's over the engine's, of wall and of CPU time."""

    model: str
    threads: int
    batch_size: int
    operation: str
    density: float
    instruction_set: str
    engine_ms: float
    engine_cpu_ms: float
    torch: str  # which of the candidates was best
    torch_ms: float
    torch_cpu_ms: float
    ratio: float
    cpu_ratio: float
    floor: float | None
    stretch: float | None
    met: bool | None  # None: no floor, or too disturbed to say
    rounds: int
    quiet: bool
    others_cores: float


def measure(model: str, threads: int, settings: argparse.Namespace) -> list[Row]:
    """All rows of one model on so many threads, printed as they come."""
    batch_size = settings.batch or MODELS[model][2]
    torch_child = Child(__file__)
    engine_child = Child(__file__) if settings.isolated else torch_child
    where = {"threads": threads, "model": model, "batch_size": batch_size}
    names = torch_child.ask("open_torch", **where)
    print(f"\n{model}, B={batch_size}, {threads} thread{'s' * (threads > 1)}")
    print(_HEADER, flush=True)
    favourites = {
        operation: fastest([f"{name} {operation}" for name in names], torch_child)
        for operation in settings.operations
    }
    rows = []
    for operation in settings.operations:
        for density in settings.densities:
            opened = engine_child.ask(
                "open_sessions", engine=settings.engine, density=density, **where
            )
            if operation == settings.operations[0]:
                wanted = torch_child.ask("masked_losses", density=density, **where)
                _check(opened["losses"], wanted, f"{model} at density {density}")
            comparison = compare(
                {
                    f"engine {operation}": engine_child,
                    **dict.fromkeys(favourites[operation], torch_child),
                },
                repeats=settings.repeats,
                budget_seconds=settings.budget,
            )
            row = _row(comparison, model, threads, batch_size, operation, density, opened)
            print(_line(row), flush=True)
            rows.append(row)
    torch_child.close()
    if engine_child is not torch_child:
        engine_child.close()
    return rows


def _check(got: list[float], wanted: list[float], what: str) -> None:
    if not np.allclose(got, wanted, rtol=TOLERANCE, atol=0):
        raise SystemExit(
            f"{what}: the engine's losses {got} are not those of masked-dense {wanted}"
        )


def _row(
    comparison: Comparison,
    model: str,
    threads: int,
    batch_size: int,
    operation: str,
    density: float,
    opened: dict[str, Any],
) -> Row:
    timings = dict(comparison.timings)
    engine = timings.pop(f"engine {operation}")
    best = min(timings, key=lambda name: timings[name].wall_seconds)
    torch_cpu = min(timing.cpu_seconds for timing in timings.values())
    ratio = timings[best].wall_seconds / engine.wall_seconds
    cpu_ratio = torch_cpu / engine.cpu_seconds
    floor, stretch = _targets(model, threads, density) if operation == "step" else (None, None)
    reached = ratio if comparison.quiet else cpu_ratio
    decided = floor is not None and (comparison.quiet or threads == 1)
    return Row(
        model=model,
        threads=threads,
        batch_size=batch_size,
        operation=operation,
        density=density,
        instruction_set=opened["instruction_set"],
        engine_ms=1e3 * engine.wall_seconds,
        engine_cpu_ms=1e3 * engine.cpu_seconds,
        torch=best.removesuffix(f" {operation}"),
        torch_ms=1e3 * timings[best].wall_seconds,
        torch_cpu_ms=1e3 * torch_cpu,
        ratio=ratio,
        cpu_ratio=cpu_ratio,
        floor=floor,
        stretch=stretch,
        met=reached >= floor if decided and floor is not None else None,
        rounds=comparison.rounds,
        quiet=comparison.quiet,
        others_cores=comparison.others_cores,
    )


def _targets(model: str, threads: int, density: float) -> tuple[float | None, float | None]:
    targets = {**TARGETS.get((model, 0), {}), **TARGETS.get((model, threads), {})}
    return targets.get(density, (None, None))


_HEADER = (
    f"{'operation':15} {'density':>7} {'engine ms':>10} {'torch ms':>9} {'ratio':>7} "
    f"{'CPU ratio':>9} {'floor':>6} {'stretch':>7} {'met':>4} {'others':>6}  best PyTorch"
)


def _line(row: Row) -> str:
    met = {True: "yes", False: "NO", None: ""}[row.met]
    floor = "" if row.floor is None else f"{row.floor:g}"
    stretch = "" if row.stretch is None else f"{row.stretch:g}"
    return (
        f"{row.operation:15} {row.density:7.3f} {row.engine_ms:10.3f} {row.torch_ms:9.3f} "
        f"{row.ratio:6.2f}{' ' if row.quiet else '~'} {row.cpu_ratio:9.2f} {floor:>6} "
        f"{stretch:>7} {met:>4} {row.others_cores:6.2f}  {row.torch}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--densities", nargs="+", type=float, default=DENSITIES)
    parser.add_argument("--operations", nargs="+", default=OPERATIONS, choices=OPERATIONS)
    parser.add_argument("--threads", nargs="+", type=int, default=(1, 2))
    parser.add_argument("--batch", type=int, help="examples per step (default: the model's)")
    parser.add_argument("--repeats", type=int, default=15, help="quiet rounds per row")
    parser.add_argument("--budget", type=float, default=30.0, help="seconds per row at most")
    parser.add_argument("--engine", default="native")
    parser.add_argument("--isolated", action="store_true", help="engine and PyTorch apart")
    parser.add_argument("--json", type=Path)
    settings = parser.parse_args()
    try:
        open_engine(settings.engine, 1)
    except ValueError as error:
        parser.error(str(error))
    machine = describe()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    rows = [
        row
        for model in settings.models
        for threads in settings.threads
        for row in measure(model, threads, settings)
    ]
    print(f"\ninstruction set {rows[0].instruction_set}; ~ disturbed by other processes")
    if settings.json:
        document = {"machine": machine, "rows": [asdict(row) for row in rows]}
        settings.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        child()
    else:
        main()
