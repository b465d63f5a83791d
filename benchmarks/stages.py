"""What each stage of progressive training costs, as shares of training the whole model at once.

At each stage one part of the model trains behind the frozen ones, with its output module in place
of the later ones; the last stage has the model's own end.  Three ways to run what is frozen: in one
session with the rest, in micro-batches in a session of its own, and once a round with what it gives
on disk (`--examples` a client).

1. The native engine's plans, which tests hold to the byte, and the FLOPs of a round of `--steps`
   steps.  Mean and most are over the stages.  With `--density` the stages are those of a pruned
   model, and the whole one is dense.
2. With `--parts processes`, how much resident memory (VmHWM) of a fresh process that has the order
   grows while it opens a session and takes two steps, beside the plan.
3. With `--parts time`, a step of each stage and a step of the whole model, in turns, CPU time.

    python benchmarks/stages.py --json stages.json
    python benchmarks/stages.py --models resnet18 --batches 32 --parts memory processes time
    python benchmarks/stages.py --models resnet18 --batches 32 --density 0.1
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from interleaved import Child, Contenders, compare, serve
from machine import describe

from fedlean.core import ClientTask, Masks, Params, SubModel, Work
from fedlean.cost.price import cost
from fedlean.cost.profile import load_profile
from fedlean.engine.open import open_engine
from fedlean.engine.protocol import SGD, Session
from fedlean.freezing.beginning import split
from fedlean.freezing.session import BeginningSession, open_rest
from fedlean.freezing.staging import Staging
from fedlean.models.catalog import build
from fedlean.models.initialise import init_params
from fedlean.pruning.synaptic_flow import prune_by_flow
from fedlean.spec import ModelSpec
from fedlean.train.work import behind_cached, behind_frozen, only_sgd

MODELS = (  # one part per stage, and per residual unit
    "resnet18",
    "resnet18,blocks=unit",
    "resnet34",
    "resnet34,blocks=unit",
    "vgg11",
    "vgg16",
    "mobilenetv3_small,norm=group",
)
MB, SHAPE, CLASSES, MOMENTUM = 1e6, (3, 32, 32), 10, 0.9
PROFILE = replace(load_profile("generic"), dense_way=False)  # the native engine, without a limit
TOGETHER, PIECES, ON_DISK = "together", "pieces", "disk"  # the setting `beginning`
WAYS = (TOGETHER, PIECES, ON_DISK)


@dataclass(frozen=True)
class Row:
    """Shares of the whole model's memory (peak) and FLOPs."""

    model: str
    batch: int
    stage: str
    way: str
    peak_bytes: int
    memory: float
    flops: float


def rows(model: str, options: argparse.Namespace, batch: int) -> Iterator[Row]:
    spec = build(model, SHAPE, CLASSES)
    masks = masks_of(model, options.density)
    whole = price(order(spec, frozenset(), options.steps, batch), None)
    for one in Staging(ends=options.ends).stages(spec):
        own = {name: mask for name, mask in masks.items() if name in one.spec.tensor_shapes}
        task = order(one.spec, one.frozen, options.steps, batch, own)
        for way in WAYS:
            found = price(task, works(task, way, options))
            yield Row(
                model, batch, one.name, way, found[0], found[0] / whole[0], found[1] / whole[1]
            )


@cache
def masks_of(model: str, density: float) -> Masks:
    """SynFlow's, of the model as seed 0 draws it."""
    if density == 1:
        return {}
    spec = build(model, SHAPE, CLASSES)
    return prune_by_flow(spec, init_params(spec, 0), density, 100)


def order(
    spec: ModelSpec, frozen: frozenset[str], steps: int, batch: int, masks: Masks | None = None
) -> ClientTask:
    hparams = {"local_steps": steps, "batch_size": batch, "momentum": MOMENTUM}
    held = SubModel(masks=masks or {}, frozen=frozen)
    return ClientTask(1, "train", 0, 0, spec, {}, held, hparams)


def works(task: ClientTask, way: str, options: argparse.Namespace) -> tuple[Work, ...]:
    if way == TOGETHER or not task.sub_model.frozen:
        return only_sgd(task)
    cut = split(task.spec, task.sub_model.frozen).name
    if way == PIECES:
        return behind_frozen(task, cut, micro_batch=options.micro_batch)
    return behind_cached(
        task, cut, micro_batch=options.micro_batch, examples=options.examples, on_disk=True
    )


def price(task: ClientTask, given: tuple[Work, ...] | None) -> tuple[int, int]:
    """(peak memory, FLOPs)."""
    found = cost(task, given or only_sgd(task), PROFILE)
    return found.peak_memory_bytes, found.flops


def summary(table: list[Row]) -> Iterator[dict[str, Any]]:
    for model, batch in dict.fromkeys((row.model, row.batch) for row in table):
        for way in WAYS:
            own = [r for r in table if (r.model, r.batch, r.way) == (model, batch, way)]
            memory = [row.memory for row in own]
            yield {
                "model": model,
                "batch": batch,
                "parts": len(own),
                "way": way,
                "mean_memory": mean(memory),
                "most_memory": max(memory),
                "mean_flops": mean(row.flops for row in own),
            }


# Sessions that really run


def stage_of(model: str, name: str) -> tuple[ModelSpec, frozenset[str]]:
    """What a stage trains on, and what is frozen in it; the whole model for name ""."""
    spec = build(model, SHAPE, CLASSES)
    found = (one for one in Staging().stages(spec) if one.name == name)
    one = next(found, None)
    return (one.spec, one.frozen) if one else (spec, frozenset())


def opened(
    spec: ModelSpec, frozen: frozenset[str], params: Params, way: str, batch: int, micro: int
) -> tuple[Session, ModelSpec]:
    """A session of that, and the model that its batches are for; "disk": of what is trained."""
    held, engine = SubModel(frozen=frozen), open_engine("native", 1)
    how: dict[str, Any] = {"batch_size": batch, "optimizer": SGD(0.01, MOMENTUM)}
    if way == TOGETHER or not held.frozen:
        return engine.open(spec, params, held, **how), spec
    if way == PIECES:
        return BeginningSession(engine, spec, params, held, micro_batch=micro, **how), spec
    cut = split(spec, held.frozen)
    return open_rest(engine, cut, params, held, **how), cut.rest


def batch_of(spec: ModelSpec, batch: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, *spec.input_shape)).astype(np.float32)
    return x, rng.integers(0, CLASSES, batch)


def one_process(model: str, name: str, way: str, batch: int, micro: int) -> dict[str, int]:
    """How far resident memory grows from before the session is opened, in two steps."""
    spec, frozen = stage_of(model, name)
    params, (x, y) = init_params(spec, 0), batch_of(spec, batch)
    small = build("resnet8", SHAPE, CLASSES)
    opened(small, frozenset(), init_params(small, 0), TOGETHER, 1, 1)  # loads what sessions need
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to what is resident now
    before = resident()
    session, _ = opened(spec, frozen, params, way, batch, micro)
    for _ in range(2):
        session.step(x, y)
    return {"grown_bytes": resident() - before, "planned_bytes": session.peak_memory_bytes}


def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def processes(model: str, options: argparse.Namespace, batch: int) -> list[dict[str, Any]]:
    found = []
    for one in Staging().stages(build(model, SHAPE, CLASSES)):
        for way in (TOGETHER, PIECES):
            asked = [sys.executable, __file__, "one", model, one.name, way, str(batch)]
            answer = subprocess.run(
                [*asked, str(options.micro_batch)], capture_output=True, text=True, check=True
            )
            row = {"model": model, "batch": batch, "stage": one.name, "way": way}
            found.append(row | json.loads(answer.stdout))
    return found


def child() -> None:
    contenders: Contenders = {}

    def prepare(model: str, names: list[str], batch: int, micro: int) -> None:
        for name in names:
            for way in WAYS:
                whole, frozen = stage_of(model, name)
                given = init_params(whole, 0)
                session, spec = opened(whole, frozen, given, way, batch, micro)
                x, y = batch_of(spec, batch)
                contenders[f"{name}/{way}"] = lambda s=session, x=x, y=y: s.step(x, y)

    serve({"prepare": prepare}, contenders)


def times(model: str, options: argparse.Namespace, batch: int) -> list[dict[str, Any]]:
    """A step's CPU time as a share of the whole model's; on disk without its share of the pass."""
    names = [one.name for one in Staging().stages(build(model, SHAPE, CLASSES))]
    contestants = Child(__file__)
    contestants.ask(
        "prepare", model=model, names=["", *names], batch=batch, micro=options.micro_batch
    )
    keys = [f"{name}/{way}" for name in ["", *names] for way in WAYS]
    found = compare(
        dict.fromkeys(keys, contestants), repeats=options.repeats, budget_seconds=options.budget
    )
    contestants.close()
    seconds = {key: timing.cpu_seconds for key, timing in found.timings.items()}
    return [
        {
            "model": model,
            "batch": batch,
            "stage": name,
            "way": way,
            "seconds": seconds[f"{name}/{way}"],
            "of_whole": seconds[f"{name}/{way}"] / seconds[f"/{TOGETHER}"],
        }
        for name in names
        for way in WAYS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = ("memory", "processes", "time")
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), help="as `fedlean run` has them"
    )
    parser.add_argument("--ends", default="", help="divides after these, for --parts memory")
    parser.add_argument("--density", type=float, default=1.0, help="SynFlow, for --parts memory")
    parser.add_argument("--batches", nargs="+", type=int, default=[32, 128])
    parser.add_argument("--parts", nargs="+", choices=known, default=["memory"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--examples", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--budget", type=float, default=120.0, help="seconds of a model's times")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    machine = describe()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    document: dict[str, Any] = {"machine": machine}
    pairs = [(model, batch) for model in options.models for batch in options.batches]
    if "memory" in options.parts:
        table = [row for model, batch in pairs for row in rows(model, options, batch)]
        document |= {"stages": [asdict(row) for row in table], "means": list(summary(table))}
        print_memory(table, document["means"])
    if "processes" in options.parts:
        document["processes"] = [p for pair in pairs for p in processes(pair[0], options, pair[1])]
        print_processes(document["processes"])
    if "time" in options.parts:
        document["times"] = [t for pair in pairs for t in times(pair[0], options, pair[1])]
        print_times(document["times"])
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n")


def print_memory(table: list[Row], means: list[dict[str, Any]]) -> None:
    print(
        f"\n{'model':30} {'batch':>5} {'stage':10} {'way':9} {'MB':>7} {'memory':>7} {'FLOPs':>6}"
    )
    for row in table:
        print(
            f"{row.model:30} {row.batch:5} {row.stage:10} {row.way:9} {row.peak_bytes / MB:7.1f} "
            f"{row.memory:7.3f} {row.flops:6.3f}"
        )
    print(
        f"\n{'model':30} {'batch':>5} {'parts':>5} {'way':9} {'mean':>7} {'most':>7} {'FLOPs':>6}"
    )
    for one in means:
        print(
            f"{one['model']:30} {one['batch']:5} {one['parts']:5} {one['way']:9} "
            f"{one['mean_memory']:7.3f} {one['most_memory']:7.3f} {one['mean_flops']:6.3f}"
        )


def print_processes(found: list[dict[str, Any]]) -> None:
    print(f"\n{'model':30} {'batch':>5} {'stage':10} {'way':9} {'plan':>7} {'VmHWM':>7} {'off':>6}")
    for one in found:
        plan = one["planned_bytes"]
        print(
            f"{one['model']:30} {one['batch']:5} {one['stage']:10} {one['way']:9} "
            f"{plan / MB:7.1f} {one['grown_bytes'] / MB:7.1f} "
            f"{(one['grown_bytes'] - plan) / MB:6.1f}"
        )


def print_times(found: list[dict[str, Any]]) -> None:
    print(f"\n{'model':30} {'batch':>5} {'stage':10} {'way':9} {'step':>9} {'of whole':>8}")
    for one in found:
        print(
            f"{one['model']:30} {one['batch']:5} {one['stage']:10} {one['way']:9} "
            f"{1e3 * one['seconds']:6.1f} ms {one['of_whole']:8.3f}"
        )
    for model, batch in dict.fromkeys((one["model"], one["batch"]) for one in found):
        for way in WAYS:
            own = [
                one["of_whole"]
                for one in found
                if (one["model"], one["batch"], one["way"]) == (model, batch, way)
            ]
            print(f"{model}, batch {batch}, {way}: mean {mean(own):.3f} of the whole model's step")


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        child()
    elif sys.argv[1:2] == ["one"]:
        _, _, model, name, way, batch, micro = sys.argv
        print(json.dumps(one_process(model, name, way, int(batch), int(micro))))
    else:
        main()
