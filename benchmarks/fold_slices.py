"""What merging slices costs, beside merging whole models.

A round's merge of Conv-2 (52,096 weights of convolutions, 6.55 million of fully connected layers)
in turns in one process, medians: dense models, slices of the first half of all channels and units,
slices of a random half of them, drawn anew for each client.  A half in width is a quarter of the
coordinates, so there are four times as many slices: all contenders merge the same number.  `add` is
the additions alone, `merge` the whole round, accumulators and mean included.

    python benchmarks/fold_slices.py --models 2 4 --json fold_slices.json

Rounds in which other processes used the machine do not count; where too few are left the row is
marked with ~.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from interleaved import Child, Comparison, Contenders, compare, serve
from machine import describe

from fedlean.core import ClientUpdate, Params, SubModel, generator
from fedlean.models.conv2 import conv2
from fedlean.slices import Index
from fedlean.tree import Fold

WHOLE, PREFIX, RANDOM = "whole", "prefix halves", "random halves"
KINDS = (WHOLE, PREFIX, RANDOM)
MOST = 1.5  # times a whole model's merge per coordinate: what slices set themselves not to exceed
EVERY = slice(None)
Sent = list[tuple[ClientUpdate, dict[str, Index] | None]]


def index_of(kind: str, spec_shapes: dict[str, tuple[int, ...]], client: int) -> dict[str, Index]:
    """Half of the channels of both convolutions and of the units of the hidden layer."""
    rng = generator(0, 0, client, "slices")

    def half(side: int) -> np.ndarray:
        ids = np.arange(side) if kind == PREFIX else rng.permutation(side)
        return np.sort(ids[: side // 2])

    (first, _, *_), (second, _, *_) = spec_shapes["conv1.weight"], spec_shapes["conv2.weight"]
    units, inputs = spec_shapes["fc1.weight"]
    one, two, hidden = half(first), half(second), half(units)
    area = inputs // second  # the pixels of a channel, which follow one another
    pixels = (two[:, None] * area + np.arange(area)).reshape(-1)
    return {
        "conv1.weight": (one, EVERY, EVERY, EVERY),
        "conv1.bias": (one,),
        "conv2.weight": (two, one, EVERY, EVERY),
        "conv2.bias": (two,),
        "fc1.weight": (hidden, pixels),
        "fc1.bias": (hidden,),
        "fc2.weight": (EVERY, hidden),
    }


def cut(value: np.ndarray, index: Index | None) -> np.ndarray:
    """A copy, as an update that came over the network has one."""
    for axis, kept in enumerate(index or ()):
        ids = np.arange(value.shape[axis])[kept] if isinstance(kept, slice) else kept
        value = value.take(ids, axis=axis)
    return value.copy()


def updates_of(kind: str, base: Params, clients: int) -> Sent:
    shapes = {name: value.shape for name, value in base.items()}
    sent: Sent = []
    for client in range(clients):
        index = None if kind == WHOLE else index_of(kind, shapes, client)
        params = {name: cut(value, (index or {}).get(name)) for name, value in base.items()}
        sent.append((ClientUpdate(client, 100 + client, params, SubModel()), index))
    return sent


def ways(base: Params, sent: Sent) -> dict[str, Callable[[], object]]:
    def add(result: Fold) -> Fold:
        for update, index in sent:
            result.add(update, index)
        return result

    warm = add(Fold(base))
    return {"add": lambda: add(warm), "merge": lambda: add(Fold(base)).params()}


def child() -> None:
    contenders: Contenders = {}

    def prepare(models: int) -> dict[str, int]:
        """Coordinates sent, by kind."""
        rng, spec = generator(0, 0, 0, "base"), conv2((1, 28, 28), 62)
        base = {
            name: rng.standard_normal(shape, dtype=np.float32)
            for name, shape in spec.tensor_shapes.items()
        }
        numbers = {}
        for kind in KINDS:
            sent = updates_of(kind, base, models if kind == WHOLE else 4 * models)
            numbers[kind] = sum(v.size for update, _ in sent for v in update.params.values())
            contenders.update({f"{kind}: {way}": call for way, call in ways(base, sent).items()})
        return numbers

    serve({"prepare": prepare}, contenders)


@dataclass(frozen=True)
class Row:
    """Nanoseconds per coordinate sent, and as multiples of those of whole models."""

    kind: str
    clients: int
    coordinates: int
    add_ns: float
    merge_ns: float
    add_ratio: float
    merge_ratio: float
    rounds: int
    quiet: bool


def measure(models: int, settings: argparse.Namespace) -> list[Row]:
    contestants = Child(__file__)
    numbers = contestants.ask("prepare", models=models)
    names = [f"{kind}: {way}" for kind in KINDS for way in ("add", "merge")]
    found = compare(
        dict.fromkeys(names, contestants),
        repeats=settings.repeats,
        budget_seconds=settings.budget,
    )
    contestants.close()

    def ns(kind: str, way: str) -> float:
        return 1e9 * found.timings[f"{kind}: {way}"].wall_seconds / numbers[kind]

    return [_row(kind, models, numbers[kind], ns, found) for kind in KINDS]


def _row(
    kind: str,
    models: int,
    coordinates: int,
    ns: Callable[[str, str], float],
    found: Comparison,
) -> Row:
    return Row(
        kind=kind,
        clients=models if kind == WHOLE else 4 * models,
        coordinates=coordinates,
        add_ns=ns(kind, "add"),
        merge_ns=ns(kind, "merge"),
        add_ratio=ns(kind, "add") / ns(WHOLE, "add"),
        merge_ratio=ns(kind, "merge") / ns(WHOLE, "merge"),
        rounds=found.rounds,
        quiet=found.quiet,
    )


_HEADER = (
    f"{'kind':14} {'clients':>7} {'millions':>8} {'add ns':>7} {'merge ns':>8} {'add':>6} "
    f"{'merge':>6}"
)


def _line(row: Row) -> str:
    late = f"  more than {MOST:g}" if row.merge_ratio > MOST else ""
    return (
        f"{row.kind:14} {row.clients:7} {row.coordinates / 1e6:8.1f} {row.add_ns:7.2f} "
        f"{row.merge_ns:8.2f} {row.add_ratio:6.2f} {row.merge_ratio:6.2f}"
        f"{'' if row.quiet else ' ~'}{late}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", type=int, default=(2, 4), help="whole ones")
    parser.add_argument("--repeats", type=int, default=15, help="quiet rounds per row")
    parser.add_argument("--budget", type=float, default=30.0, help="seconds per row at most")
    parser.add_argument("--json", type=Path)
    settings = parser.parse_args()
    machine = describe()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(_HEADER, flush=True)
    rows = []
    for models in settings.models:
        for row in measure(models, settings):
            rows.append(row)
            print(_line(row), flush=True)
    if settings.json:
        document = {"machine": machine, "rows": [asdict(row) for row in rows]}
        settings.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        child()
    else:
        main()
