"""What a loss of the method's own costs, beside the loss that the engine knows.

A whole step three ways, in turns in one process, medians: `step`, which knows the loss; a training
forward, the loss in NumPy and `descend`; and the same with `backward` and `apply`, through whose
arrays all gradients pass.  Also the most that NumPy held during one such step: copies, and what the
loss takes.  The models and masks are those of steps.py, SGD with momentum 0.9, seed 0.

    python benchmarks/own_loss.py --models conv2 --densities 1.0 0.1 --json own_loss.json

Rounds in which other processes used the machine do not count; where too few are left the row is
marked with ~.
"""

from __future__ import annotations

import argparse
import json
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path

from interleaved import Child, Contenders, compare, serve
from machine import describe
from steps import MODELS, OPTIMIZER, Case, make_case

from fedlean.core import SubModel
from fedlean.engine.open import open_engine
from fedlean.engine.protocol import Engine, Session
from fedlean.train.loss_gradient import loss_and_gradient

STEP, DESCEND, APPLY = "step", "forward + descend", "forward + backward + apply"
MOST = 1.3  # times a `step`: what `descend` set itself not to exceed on Conv-2


def ways(engine: Engine, case: Case) -> dict[str, Callable[[], float]]:
    """The three, each with a session of its own; they give the loss."""

    def opened() -> Session:
        sub_model = SubModel(masks=case.masks)
        size = case.batch_size
        return engine.open(case.spec, case.params, sub_model, batch_size=size, optimizer=OPTIMIZER)

    def own(session: Session, descend: Callable[[dict], None]) -> Callable[[], float]:
        batches, output = cycle(case.batches), case.spec.nodes[-1].name

        def call() -> float:
            x, y = next(batches)
            logits = session.forward(x, training=True)[output]
            mean, gradient = loss_and_gradient(logits, y, "ce")
            descend({output: gradient})
            return mean

        return call

    fused, one, other, batches = opened(), opened(), opened(), cycle(case.batches)
    return {
        STEP: lambda: fused.step(*next(batches)),
        DESCEND: own(one, one.descend),
        APPLY: own(other, lambda given: other.apply(other.backward(given))),
    }


def peak_bytes(call: Callable[[], object]) -> int:
    call()
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def child() -> None:
    contenders: Contenders = {}

    def open_ways(model: str, batch_size: int, density: float, threads: int) -> dict[str, int]:
        contenders.update(
            ways(open_engine("native", threads), make_case(model, batch_size, density))
        )
        return {name: peak_bytes(call) for name, call in contenders.items()}

    serve({"open_ways": open_ways}, contenders)


@dataclass(frozen=True)
class Row:
    """Times in ms, and as multiples of a `step`'s; bytes as NumPy counts them."""

    model: str
    batch_size: int
    density: float
    threads: int
    step_ms: float
    descend_ms: float
    apply_ms: float
    descend_ratio: float
    apply_ratio: float
    descend_bytes: int
    apply_bytes: int
    rounds: int
    quiet: bool


def measure(model: str, density: float, settings: argparse.Namespace) -> Row:
    contestants = Child(__file__)
    size, threads = settings.batch or MODELS[model][2], settings.threads
    peaks = contestants.ask(
        "open_ways", model=model, batch_size=size, density=density, threads=threads
    )
    found = compare(
        dict.fromkeys(peaks, contestants),
        repeats=settings.repeats,
        budget_seconds=settings.budget,
    )
    contestants.close()
    ms = {name: 1e3 * timing.wall_seconds for name, timing in found.timings.items()}
    return Row(
        model=model,
        batch_size=size,
        density=density,
        threads=threads,
        step_ms=ms[STEP],
        descend_ms=ms[DESCEND],
        apply_ms=ms[APPLY],
        descend_ratio=ms[DESCEND] / ms[STEP],
        apply_ratio=ms[APPLY] / ms[STEP],
        descend_bytes=peaks[DESCEND],
        apply_bytes=peaks[APPLY],
        rounds=found.rounds,
        quiet=found.quiet,
    )


_HEADER = (
    f"{'model':10} {'B':>4} {'density':>7} {'step ms':>8} {'descend ms':>10} {'apply ms':>9} "
    f"{'descend':>8} {'apply':>7} {'descend MB':>10} {'apply MB':>8}"
)


def _line(row: Row) -> str:
    late = f"  more than {MOST:g}" if row.model == "conv2" and row.descend_ratio > MOST else ""
    return (
        f"{row.model:10} {row.batch_size:4} {row.density:7.3f} {row.step_ms:8.3f} "
        f"{row.descend_ms:10.3f} {row.apply_ms:9.3f} {row.descend_ratio:8.2f} "
        f"{row.apply_ratio:7.2f} {row.descend_bytes / 1e6:10.2f} {row.apply_bytes / 1e6:8.2f}"
        f"{'' if row.quiet else ' ~'}{late}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["conv2"], choices=list(MODELS))
    parser.add_argument("--densities", nargs="+", type=float, default=(1.0, 0.1))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, help="examples per step (default: the model's)")
    parser.add_argument("--repeats", type=int, default=15, help="quiet rounds per row")
    parser.add_argument("--budget", type=float, default=30.0, help="seconds per row at most")
    parser.add_argument("--json", type=Path)
    settings = parser.parse_args()
    try:
        open_engine("native", settings.threads)
    except ValueError as error:
        parser.error(str(error))
    machine = describe()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"{settings.threads} thread{'s' * (settings.threads > 1)}\n{_HEADER}", flush=True)
    rows = []
    for model in settings.models:
        for density in settings.densities:
            rows.append(measure(model, density, settings))
            print(_line(rows[-1]), flush=True)
    if settings.json:
        document = {"machine": machine, "rows": [asdict(row) for row in rows]}
        settings.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        child()
    else:
        main()
