"""What PruneFL's importance takes on a device: memory, time and, in pieces, accuracy.

Conv-2 on 28x28 with 62 classes, batch 20, 5 local steps, a reconfiguration every 50 rounds.

1. The native engine's plan for one client: FedAvg dense, a plain round of PruneFL at the density,
   its rounds of importance all at once and in pieces of several budgets, the initial client.
2. Peak resident memory (VmHWM) of whole processes that do such a round as a device does: the order
   arrives as bytes, the answer leaves as bytes.
3. What the importance of one reconfiguration takes longer than plain rounds, as a share of the
   rounds between two; CPU time, rounds of each kind in turn, the median of the repeats.
4. Accuracy with and without pieces on several seeds: on digits, and with --data on images.

    python benchmarks/prunefl_memory.py --threads 1 --json prunefl_memory.json
    python benchmarks/prunefl_memory.py --parts accuracy --data ../data/mnist_by_writer
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from machine import describe

from fedlean import wire
from fedlean.algorithm import Device, FederatedAlgorithm, Server
from fedlean.core import ClientTask, Model, Work, generator
from fedlean.cost.profile import load_profile
from fedlean.cost.way import work_memory_bytes
from fedlean.data.batches import ClientData
from fedlean.data.dataset import Dataset
from fedlean.engine.open import open_engine
from fedlean.engine.pieces import sweep
from fedlean.methods.prunefl import client_update, prunefl
from fedlean.models.conv2 import conv2
from fedlean.models.initialise import init_params
from fedlean.runtime.config import RunConfig
from fedlean.runtime.how import How
from fedlean.runtime.run import start
from fedlean.tree import apply_mask

PROCESS = Path(__file__).resolve().with_name("prunefl_process.py")
SPEC = conv2((1, 28, 28), 62)
BATCH, STEPS, EVERY = 20, 5, 50
MB, KIB = 10**6, 1 << 10
BUDGETS_KIB = (256, 512, 1024, 2048, 4096, 0)  # 0: all at once


def algorithm_with(budget_kib: int) -> FederatedAlgorithm:
    server = Server(SPEC, open_engine("native", 1), 0, 2 * EVERY, load_profile("raspberry_pi_4"))
    return prunefl(
        server,
        local_steps=STEPS,
        batch_size=BATCH,
        reconfigure_every=EVERY,
        importance_budget_bytes=budget_kib * KIB,
    )


def tasks_of(budget_kib: int, density: float) -> list[ClientTask]:
    """One client's orders from the first plain round to the reconfiguration: plain, importance."""
    algorithm, rng = algorithm_with(budget_kib), generator(0, 0, 0, "benchmark")
    masks = {name: rng.random(SPEC.param_shapes[name]) < density for name in SPEC.prunable}
    params = apply_mask(init_params(SPEC, 0), masks)
    state = replace(algorithm.init(Model(SPEC, params)), phase="train", masks=masks)
    tasks = [algorithm.configure(replace(state, round=r), [Device(0)])[0] for r in range(EVERY)]
    return [tasks[0], *(task for task in tasks if task.hparams["importance"])]


def plan_bytes(task: ClientTask, algorithm: FederatedAlgorithm) -> int:
    assert algorithm.work is not None
    return max(work_memory_bytes(task.spec, work) for work in algorithm.work(task))


def plans(density: float) -> list[dict[str, Any]]:
    """The native plan, of one thread."""
    rows = [{"client": "FedAvg, dense", "bytes": work_memory_bytes(SPEC, Work(STEPS, BATCH))}]
    plain = tasks_of(0, density)[0]
    whole = algorithm_with(0)
    step = plan_bytes(plain, whole)
    rows.append({"client": "PruneFL, plain round", "bytes": step})
    for budget in BUDGETS_KIB:
        algorithm = algorithm_with(budget)
        tasks = tasks_of(budget, density)[1:]
        peak = max(plan_bytes(task, algorithm) for task in tasks)
        row = {"client": label(budget), "bytes": peak, "rounds": len(tasks)}
        row["parts"] = len(sweep(SPEC, budget * KIB)) if budget else 1
        row["over_step"] = (peak - budget * KIB) / step
        rows.append(row)
    (first,) = whole.configure(whole.init(Model(SPEC, init_params(SPEC, 0))), [Device(0)])
    rows.append({"client": "PruneFL, initial client", "bytes": plan_bytes(first, whole)})
    return rows


def label(budget_kib: int) -> str:
    return f"PruneFL, {budget_kib} KiB" if budget_kib else "PruneFL, importance at once"


def processes(density: float, threads: int, repeats: int) -> list[dict[str, Any]]:
    """Whole processes, each for one round; in pieces the sweep's first, which has full parts."""
    orders = {"PruneFL, plain round": tasks_of(0, density)[0]}
    orders |= {label(budget): tasks_of(budget, density)[1] for budget in (256, 1024, 0)}
    rows = []
    with tempfile.TemporaryDirectory(prefix="fedlean-prunefl-") as folder:
        for name, task in orders.items():
            order = Path(folder) / "order"
            order.write_bytes(wire.encode_task(task))
            command = [sys.executable, str(PROCESS), str(order), str(threads)]
            done = [
                json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
                for _ in range(repeats)
            ]
            middle = {key: median(each[key] for each in done) for key in done[0]}
            rows.append({"round": name, "order_bytes": order.stat().st_size, **middle})
    return rows


def seconds(density: float, threads: int, repeats: int) -> list[dict[str, Any]]:
    """Client halves of rounds in this process, of every kind in turn."""
    rng, engine = generator(0, 0, 0, "benchmark"), open_engine("native", threads)
    images, labels = rng.integers(0, 256, (600, 1, 28, 28), np.uint8), rng.integers(0, 62, 600)
    data = Dataset.from_images("noise", (images, labels), (images, labels), classes=62, scale=255.0)
    batches = ClientData(data, np.arange(600))
    kinds = {budget: tasks_of(budget, density) for budget in BUDGETS_KIB}
    took: dict[int, list[list[float]]] = {budget: [] for budget in kinds}
    for _ in range(repeats):
        for budget, tasks in kinds.items():
            times = []
            for task in tasks:
                began = time.process_time()
                client_update(task, batches, engine, {})
                times.append(time.process_time() - began)
            took[budget].append(times)
    plain = median(times[0] for each in took.values() for times in each)
    rows = []
    for budget, each in took.items():
        sweeps = [sum(times[1:]) - (len(times) - 1) * plain for times in each]
        extra = median(sweeps)
        rows.append(
            {
                "round": label(budget),
                "plain_ms": 1e3 * plain,
                "extra_ms": 1e3 * extra,
                "share": extra / (EVERY * plain),
            }
        )
    return rows


def accuracies(
    data: str, model: str, budgets: Sequence[int], seeds: Sequence[int], **changes: Any
) -> list[dict[str, Any]]:
    """Of whole runs, at the end and at the best round."""
    rows = []
    for budget in budgets:
        ends = []
        for seed in seeds:
            settings = {**changes["settings"], "importance_budget_bytes": budget * KIB}
            config = RunConfig(
                "prunefl",
                dataset=data,
                model=model,
                seed=seed,
                **{**changes, "settings": settings},
            )
            with tempfile.TemporaryDirectory(prefix="fedlean-prunefl-") as folder:
                ends.append(start(config, Path(folder) / "run", How()))
        rows.append(
            {
                "budget_kib": budget,
                "final": [end["final_accuracy"] for end in ends],
                "density": [end["density"] for end in ends],
                "uplink_bytes": mean(end["uplink_bytes"] for end in ends),
            }
        )
        print(_accuracy_line(rows[-1]), flush=True)
    return rows


def _accuracy_line(row: dict[str, Any]) -> str:
    name = f"{row['budget_kib']} KiB" if row["budget_kib"] else "at once"
    ends = zip(row["final"], row["density"], strict=True)
    runs = "  ".join(f"{accuracy:.4f} at {density:.3f}" for accuracy, density in ends)
    sent = row["uplink_bytes"] / MB
    return f"{name:>9}  mean {mean(row['final']):.4f}  {runs}  {sent:8.1f} MB up"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = ("plan", "processes", "time", "accuracy")
    parser.add_argument("--parts", nargs="+", choices=known, default=known)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--data", help="folder of 28x28 images with client ids, for Conv-2")
    parser.add_argument("--rounds", type=int, default=60, help="of the runs on --data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    document: dict[str, Any] = {"machine": describe(), "options": vars(options) | {"json": None}}
    print(", ".join(f"{name} {value}" for name, value in document["machine"].items()))
    print(f"Conv-2, density {options.density:g}, batch {BATCH}, {STEPS} steps; MB of 10^6 bytes")
    if "plan" in options.parts:
        document["plan"] = rows = plans(options.density)
        print(f"\n{'native plan':30} {'MB':>7} {'parts':>6} {'rounds':>6}  (peak - budget) / plain")
        for row in rows:
            over = f"{row['over_step']:.2f}" if "over_step" in row else ""
            numbers = f"{row.get('parts', '')!s:>6} {row.get('rounds', '')!s:>6}  {over}"
            print(f"{row['client']:30} {row['bytes'] / MB:7.2f} {numbers}")
    if "processes" in options.parts:
        document["processes"] = rows = processes(options.density, options.threads, options.repeats)
        print(
            f"\n{'a process for one round':30} {'VmHWM':>7} {'before':>7} {'grown':>7} {'MB up':>7}"
        )
        for row in rows:
            sizes = (row["peak_bytes"], row["before_bytes"])
            columns = (*sizes, sizes[0] - sizes[1], row["answer_bytes"])
            print(f"{row['round']:30} " + " ".join(f"{size / MB:7.1f}" for size in columns))
    if "time" in options.parts:
        document["time"] = rows = seconds(options.density, options.threads, options.repeats)
        print(f"\n{'importance':30} {'plain round':>12} {'extra':>9}  share of {EVERY} rounds")
        for row in rows:
            print(
                f"{row['round']:30} {row['plain_ms']:9.1f} ms {row['extra_ms']:6.1f} ms  "
                f"{row['share']:.1%}"
            )
    if "accuracy" in options.parts:
        print(f"\nfinal accuracy and density of seeds {options.seeds}, digits, LeNet-300-100")
        settings = {"reconfigure_every": 10, "local_steps": 5, "batch_size": 20}
        document["digits"] = accuracies(
            "digits", "lenet300", (0, 64, 32), options.seeds, rounds=60, settings=settings
        )
        if options.data:
            print(f"\n{Path(options.data).name}, Conv-2, {options.rounds} rounds of 10 clients")
            document["data"] = accuracies(
                options.data,
                "conv2",
                (0, 1024),
                options.seeds,
                inputs="unit",
                partition="natural",
                clients=10,
                rounds=options.rounds,
                eval_examples=2000,
                eval_every=options.rounds,
                threads=options.threads,
                settings={**settings, "lr": 0.25, "reconfigure_every": 20},
            )
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
