"""How close honest clients come to the default bound on updates, for every method.

Runs each method on several data sets, dealt out unevenly, and prints the largest factor by which
a client exceeded the median of its peers: of the model, of running statistics, of a method's own
statistics.  A factor beyond that of `fedlean.runtime.moves` would have been refused.  Moves that
are small beside the model are always taken and do not count.

    python benchmarks/honest_moves.py --data ../data --json honest_moves.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from functools import cache
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

from machine import describe

from fedlean.data.load import load_dataset
from fedlean.layers import Shape
from fedlean.models.resnet import resnet8
from fedlean.runtime.config import RunConfig
from fedlean.runtime.how import How
from fedlean.runtime.method import available
from fedlean.runtime.moves import BUFFERS, FACTOR, MODEL, SMALL, STATISTIC_FACTOR, Moves
from fedlean.runtime.run import start
from fedlean.runtime.step import Step
from fedlean.spec import ModelSpec


class Setting(NamedTuple):
    """A data set ("digits" or a folder under --data), the model, how it is dealt out."""

    dataset: str
    model: str
    partition: str
    clients: int


SETTINGS = (
    Setting("digits", "mlp", "dirichlet:0.1", 20),
    Setting("fashion_mnist", "lenet5", "dirichlet:0.3", 20),
    Setting("mnist_by_writer", "lenet300", "natural", 50),
    Setting("cifar10", "honest_moves:resnet8_batch", "dirichlet:0.3", 10),
)
SLICED = ("fedrolex", "federated_dropout", "fjord", "zo_slices")  # in the settings of heterofl
# Such that what a method does happens in so few rounds, and devices differ where they may.
MORE: dict[str, dict[str, Any]] = {
    "prunefl": {"reconfigure_every": 5},
    "prunetrain": {"reconfigure_every": 5},
    "allsmall": {"width": 0.5},
    **{name: {"assign": "drawn"} for name in ("heterofl", *SLICED, "fiarse", "prunefl_widths")},
    "depthfl": {"assign": "fixed"},
    "profl": {"map_rounds": 1},
}
OF_A_MODEL: dict[tuple[str, str], dict[str, Any]] = {  # what else a method is told of it
    # its norms have groups
    **{(name, "lenet5"): {"widths": "1 0.5"} for name in ("heterofl", *SLICED, "prunefl_widths")},
    **{
        (name, "honest_moves:resnet8_batch"): {"static_norm": True}
        for name in ("heterofl", *SLICED, "model_selection")
    },
}
REFUSED = {("prunefl_widths", "honest_moves:resnet8_batch")}  # for its running statistics
ROUNDS = {"cifar10": 10}  # fewer: a network that takes its time


def resnet8_batch(input_shape: Shape, classes: int) -> ModelSpec:
    """With BatchNorm, so that running statistics move, too."""
    return resnet8(input_shape, classes, norm="batch")


class Watch:
    """Keeps, per kind, the largest factor by which a move exceeded the median it was held to."""

    def __init__(self) -> None:
        self.largest: dict[str, float] = defaultdict(float)
        self.updates = 0
        self.refused = 0
        take = Step.take
        watch = self

        def watched(step: Step, state: Any, moves: Moves) -> Any:
            result = take(step, state, moves)
            watch.see(step, moves)
            return result

        Step.take = watched  # type: ignore[method-assign]

    def see(self, step: Step, moves: Moves) -> None:
        moved = step.record.moved
        if not moved:
            return
        phase = step.record.tasks[0].phase
        self.updates += len(moved)
        self.refused += len(step.record.rejected)
        kinds = {kind for each in moved.values() for kind in each} - {MODEL, BUFFERS}
        known = moves if moves.suffice(phase, kinds) else moves.after(phase, moved)
        bound = known.bound(None, phase)
        for kind, move in (pair for each in moved.values() for pair in each.items()):
            name = kind if kind in (MODEL, BUFFERS) else "statistics"
            factor = STATISTIC_FACTOR if name == "statistics" else FACTOR
            limit = bound.limit(kind, move)
            if move.far > SMALL * move.asked and limit < inf:
                self.largest[name] = max(self.largest[name], factor * move.far / limit)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the data sets")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--lr", type=float, help="learning rate (default: the methods' own)")
    parser.add_argument("--only", nargs="*", help="methods (default: all)")
    parser.add_argument("--sets", nargs="*", help="data sets (default: all)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    load = cache(load_dataset)
    rows = []
    print(", ".join(f"{name} {value}" for name, value in describe().items()))
    print(f"{'method':12} {'data set':16} {'updates':>8} {'refused':>8}", end="")
    print(f" {'model':>8} {'running':>8} {'statistics':>10}")
    with tempfile.TemporaryDirectory(prefix="fedlean-moves-") as scratch:
        for setting in SETTINGS:
            if options.sets and setting.dataset not in options.sets:
                continue
            source = Path(scratch) / f"snip-{setting.dataset}"
            for method in sorted(available(), key=lambda name: (name == "fixed_mask", name)):
                if options.only and method not in options.only:
                    continue
                if (method, setting.model) in REFUSED:
                    continue
                more = MORE.get(method, {}) | OF_A_MODEL.get((method, setting.model), {})
                more |= {} if options.lr is None else {"lr": options.lr}
                folder = Path(scratch) / f"{method}-{setting.dataset}"
                from_run = str(source) if method == "fixed_mask" else ""
                folder = source if method == "snip" else folder
                rows.append(run(method, setting, options, load, folder, more, from_run))
                print(line(rows[-1]), flush=True)
    if options.json:
        document = {"machine": describe(), "rounds": options.rounds, "seed": 0, "rows": rows}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


def run(
    method: str,
    setting: Setting,
    options: Any,
    load: Any,
    folder: Path,
    more: dict[str, Any],
    from_run: str,
) -> dict[str, Any]:
    name = setting.dataset
    rounds = min(options.rounds, ROUNDS.get(name, options.rounds))
    config = RunConfig(
        method,
        dataset=name if name == "digits" else str(options.data / name),
        model=setting.model,
        partition=setting.partition,
        clients=setting.clients,
        rounds=rounds,
        eval_every=rounds,
        eval_examples=100,
        final_eval_examples=100,
        start=from_run,
        start_weights="original" if from_run else "trained",
        settings={"cohort": 10, **more},
    )
    take, watch = Step.take, Watch()
    try:
        start(config, folder, How(load=load))
    finally:
        Step.take = take  # type: ignore[method-assign]
    largest = {kind: round(value, 2) for kind, value in watch.largest.items()}
    return {
        "method": method,
        "dataset": name,
        "rounds": rounds,
        "updates": watch.updates,
        "refused": watch.refused,
        **largest,
    }


def line(row: dict[str, Any]) -> str:
    factors = (row.get(kind) for kind in (MODEL, BUFFERS, "statistics"))
    texts = ("–" if value is None else f"{value:.1f}" for value in factors)
    model, buffers, statistics = texts
    return (
        f"{row['method']:12} {row['dataset']:16} {row['updates']:8} {row['refused']:8}"
        f" {model:>8} {buffers:>8} {statistics:>10}"
    )


if __name__ == "__main__":
    main()
