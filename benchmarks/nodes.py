"""`fedlean node` against Flower's own SuperNode: time of a round and memory of a device.

One stock SuperLink with TLS and node authentication on loopback, for all.  Two nodes of each kind
are connected at once and one ServerApp (nodes_server.py) asks them in turn, a round with the one
kind, then one with the other: FedAvg, one local step on one example, so that transport is the rest.

    empty   logistic regression, 31 kB each way
    26 MB   Conv-2, dense: 6.5 million values, 26 MB each way

Both kinds run the same method on the same native engine; the stock node does so in FedLean's
ClientApp.  The first round of each kind is left out: it carries the model's description.  Times are
medians, memory is the larger of the two nodes: of `fedlean node` the kernel's own peak (VmHWM), of
a stock node, which is several processes, the largest sum of their RSS that a sampler saw, and of
their PSS, which counts a shared page once.  Peaks are since the start.

Then Conv-2 is trained by `fedlean node` with the app of `fedlean app new`: a node holds a tenth of
MNIST by writer, B = 20, 5 steps a round, dense (FedAvg) and at 10% (SynFlow in ten steps: pruned on
the server before the first round); free, and with --limit-mb as --memory-limit and as a hard limit
on the process's data (RLIMIT_DATA: all private memory that can be written, touched or not, which is
stricter than a limit on what is resident; code is not in it, so the peak RSS is held against the
limit, too).  Last, a stock node with the torch engine does the same training free and under that
limit for each of its processes.

    python benchmarks/nodes.py --data ../data/mnist_by_writer --json nodes.json
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import residency
from machine import describe

from fedlean.runtime.flower.project import write_project

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "tests"))
from runtime.flower.stock import COMMANDS, HOST, StockSuperLink, free_port, make_key  # noqa: E402

MB = 1e6
NODES = 2
PARTS = 10  # a node holds one of so many parts of the writers
BATCH, STEPS, TRAIN_ROUNDS = 20, 5, 5
PAYLOADS = {"empty": "empty", "26 MB": "conv2"}  # what it is called -> the model
METHODS = {"10%": ("synflow", " density=0.1 synflow_steps=10"), "dense": ("fedavg", "")}
CONNECT_SECONDS, RUN_SECONDS = 60, 600
# What the project set itself to reach.
PEAK_MB = {"10%": (100, 80), "dense": (170, None)}
EMPTY_SECONDS, EMPTY_RATIO, FULL_RATIO = 2.0, 1 / 3, 1 / 2


# --- data -----------------------------------------------------------------------------------------


def write_shares(source: Path, folder: Path) -> list[Path]:
    """A folder per node with every PARTS-th writer's images, and one test image: npz needs one."""
    with np.load(next(source.glob("*_by_writer.npz"))) as file:
        arrays = {name: file[name] for name in ("x", "y", "split", "client")}
    train = np.flatnonzero(arrays["split"] == 0)
    test = np.flatnonzero(arrays["split"] == 1)[:1]
    paths = []
    for node in range(NODES):
        chosen = train[arrays["client"][train] % PARTS == node]
        chosen = np.concatenate([chosen, test])
        paths.append(folder / f"data{node}")
        paths[-1].mkdir()
        np.savez(paths[-1] / "share.npz", **{name: a[chosen] for name, a in arrays.items()})
    return paths


# --- processes ------------------------------------------------------------------------------------


@dataclass
class Node:
    """A started node of either kind."""

    process: subprocess.Popen[bytes]
    log_path: Path
    id: int

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


class Bench:
    """A SuperLink, its folder, and how nodes of it are started."""

    def __init__(self, folder: Path, shares: list[Path]):
        self.folder, self.shares = folder, shares
        self.superlink = StockSuperLink(folder)
        self._started = 0

    def light(self, index: int, limit_bytes: int | None = None) -> Node:
        """`fedlean node` as client `index`."""
        command = [sys.executable, "-m", "fedlean", "node", "--data", str(self.shares[index])]
        command += ["--superlink", self.superlink.address, "--tls-ca", str(self.superlink.ca)]
        command += ["--client", f"{index}/{NODES}", "--whole"]
        if limit_bytes:
            command += ["--memory-limit", f"{limit_bytes / MB:g}MB"]

        def options(key: Path) -> list[str]:
            return ["--key", str(key), "--state", f"{key}-state"]

        return self._start(f"fedlean{index}", command, options, limit_bytes)

    def stock(self, index: int, limit_bytes: int | None = None) -> Node:
        """A SuperNode whose ClientApp is the same client; the limit is each process's."""
        command = [str(COMMANDS / "flower-supernode"), "--superlink", self.superlink.address]
        command += ["--root-certificates", str(self.superlink.ca)]
        command += ["--host", HOST, "--port", str(free_port())]

        def options(key: Path) -> list[str]:
            # One partition, so that all of its data is its own; told apart by what it holds.
            config = f'data="{self.shares[index]}" state="{key}-state"'
            return ["--auth-supernode-private-key", str(key), "--node-config", config]

        return self._start(f"stock{index}", command, options, limit_bytes)

    def _start(
        self,
        name: str,
        command: list[str],
        options: Callable[[Path], list[str]],
        limit_bytes: int | None,
    ) -> Node:
        self._started += 1
        key = self.folder / f"{name}-{self._started}.key"
        node_id = self.superlink.register(make_key(key))
        log_path = key.with_suffix(".log")

        def limit() -> None:
            if limit_bytes:
                resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))

        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [*command, *options(key)],
                stdout=log,
                stderr=log,
                env=self.superlink.environment,
                preexec_fn=limit,
            )
        return Node(process, log_path, node_id)

    def wait_online(self, nodes: list[Node]) -> bool:
        """Whether all of them connect."""
        end = time.monotonic() + CONNECT_SECONDS
        while time.monotonic() < end:
            status = self.superlink.nodes()
            if all(status.get(node.id) == "online" for node in nodes):
                return True
            if any(node.process.poll() is not None for node in nodes):
                return False
            time.sleep(0.2)
        return False

    @contextmanager
    def nodes(self, *started: Node) -> Iterator[bool]:
        """Connected, or False; stopped afterwards."""
        try:
            yield self.wait_online(list(started))
        finally:
            for node in started:
                node.stop()

    def run(self, app: Path, config: dict[str, Any]) -> str:
        """`flwr run`, to its end; what it printed."""
        options = " ".join(
            f'{key}="{value}"' if isinstance(value, str | Path) else f"{key}={value}"
            for key, value in config.items()
        )
        command = [str(COMMANDS / "flwr"), "run", str(app), "test", "--stream", "-c", options]
        done = subprocess.run(
            command,
            env=self.superlink.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=RUN_SECONDS,
            check=False,
        )
        return done.stdout


# --- rounds ---------------------------------------------------------------------------------------


def rounds(bench: Bench, repeats: int) -> list[dict[str, Any]]:
    """Rows of both payloads, and of the nodes before either, printed as they come."""
    app = bench.folder / "rounds_app"
    write_project(app)
    shutil.copy(HERE / "nodes_server.py", app / "fedlean_app" / "server_app.py")
    kinds = {
        "fedlean node": [bench.light(index) for index in range(NODES)],
        "stock node": [bench.stock(index) for index in range(NODES)],
    }
    everyone = [node for nodes in kinds.values() for node in nodes]
    with bench.nodes(*everyone) as connected:
        if not connected:
            raise SystemExit(f"nodes did not connect: {everyone[0].log()}{everyone[-1].log()}")
        sampler = residency.Sampler(kinds["stock node"][0].process.pid)
        time.sleep(5)
        rows = _rows("connected", kinds, sampler, None)
        for payload, model in PAYLOADS.items():
            sampler.reset()
            before = _cpu(kinds)
            out = bench.folder / payload.replace(" ", "")
            out.mkdir()
            plan = {
                "data": str(bench.shares[0]),
                "model": model,
                "nodes": NODES,
                "rounds": repeats + 1,
                "kinds": {kind: [node.id for node in nodes] for kind, nodes in kinds.items()},
            }
            (out / "plan.json").write_text(json.dumps(plan))
            printed = bench.run(app, {"out": out})
            if not (out / "rounds.json").is_file():
                raise SystemExit(f"no rounds were measured:\n{printed[-3000:]}")
            done = json.loads((out / "rounds.json").read_text())["rounds"]
            used = {kind: now - before[kind] for kind, now in _cpu(kinds).items()}
            rows += _rows(payload, kinds, sampler, done, used)
        sampler.stop()
    return rows


def _cpu(kinds: dict[str, list[Node]]) -> dict[str, float]:
    """Processor seconds so far, of the mean node."""
    return {
        kind: sum(residency.cpu_seconds(residency.descendants(n.process.pid)) for n in nodes)
        / len(nodes)
        for kind, nodes in kinds.items()
    }


def _rows(
    payload: str,
    kinds: dict[str, list[Node]],
    sampler: residency.Sampler,
    done: dict[str, list[dict[str, Any]]] | None,
    cpu: dict[str, float] | None = None,
) -> list[dict[str, Any]]:
    rows = []
    for kind, nodes in kinds.items():
        row: dict[str, Any] = {"payload": payload, "node": kind}
        if kind == "fedlean node":
            row["peak_bytes"] = max(residency.peak_bytes(node.process.pid) for node in nodes)
        else:
            row |= {"peak_bytes": sampler.resident_bytes, "pss_bytes": sampler.proportional_bytes}
            row["processes"] = sampler.processes
        if done is not None and cpu is not None:
            counted = done[kind][1:]
            row |= {
                "seconds": median(each["seconds"] for each in counted),
                "all_seconds": [each["seconds"] for each in done[kind]],
                "cpu_seconds": cpu[kind] / len(done[kind]),
                "rounds": len(counted),
                "unanswered": sum(NODES - each["answered"] for each in done[kind]),
            }
        rows.append(row)
        print(_round_line(row), flush=True)
    return rows


_ROUND_HEADER = (
    f"{'payload':10} {'node':13} {'round s':>8} {'CPU s':>6} {'peak RSS':>9} {'PSS':>7} "
    f"{'processes':>9} {'rounds':>6} {'lost':>4}"
)


def _round_line(row: dict[str, Any]) -> str:
    seconds = f"{row['seconds']:.2f}" if "seconds" in row else ""
    cpu = f"{row['cpu_seconds']:.2f}" if "seconds" in row else ""
    pss = f"{row['pss_bytes'] / MB:.0f}" if "pss_bytes" in row else ""
    return (
        f"{row['payload']:10} {row['node']:13} {seconds:>8} {cpu:>6} "
        f"{row['peak_bytes'] / MB:>9.1f} {pss:>7} {row.get('processes', 1):>9} "
        f"{row.get('rounds', ''):>6} {row.get('unanswered', ''):>4}"
    )


# --- training -------------------------------------------------------------------------------------


def training(bench: Bench, server_data: Path, limit_bytes: int) -> list[dict[str, Any]]:
    """Conv-2, trained by `fedlean node`, free and under the limit."""
    rows = []
    for density in METHODS:
        for limit in (None, limit_bytes):
            nodes = [bench.light(index, limit) for index in range(NODES)]
            with bench.nodes(*nodes) as connected:
                idle = max(residency.peak_bytes(node.process.pid) for node in nodes)
                row = {"node": "fedlean node", "engine": "native", "model": density}
                row |= {"limit_bytes": limit, "started": connected, "connected_bytes": idle}
                row |= _trained(bench, server_data, density, "native", f"{density}-{limit}")
                alive = [node for node in nodes if node.process.poll() is None]
                peaks = [residency.peak_bytes(node.process.pid) for node in alive]
                row["peak_bytes"] = max(peaks, default=0)
                row["survived"] = len(alive) == len(nodes)
            rows.append(row)
            print(_training_line(row), flush=True)
    return rows


def stock_training(bench: Bench, server_data: Path, limit_bytes: int) -> list[dict[str, Any]]:
    """Conv-2, dense, trained by stock nodes with PyTorch, free and under the limit."""
    rows = []
    for limit in (None, limit_bytes):
        nodes = [bench.stock(index, limit) for index in range(NODES)]
        sampler = residency.Sampler(nodes[0].process.pid)
        with bench.nodes(*nodes) as connected:
            row = {"node": "stock node", "engine": "torch", "model": "dense"}
            row |= {"limit_bytes": limit, "started": connected}
            row["connected_bytes"] = sampler.resident_bytes
            row |= _trained(bench, server_data, "dense", "torch", f"torch-{limit}")
            row |= {"peak_bytes": sampler.resident_bytes, "pss_bytes": sampler.proportional_bytes}
            row["log"] = nodes[0].log()[-2000:]
            row["survived"] = all(node.process.poll() is None for node in nodes)
            sampler.stop()
        rows.append(row)
        print(_training_line(row), flush=True)
    return rows


def _trained(
    bench: Bench, server_data: Path, density: str, engine: str, name: str
) -> dict[str, Any]:
    """Rounds of the app of `fedlean app new`: how many were answered by all, and how fast."""
    app = bench.folder / f"app-{name.replace('%', '')}"
    write_project(app)
    method, setting = METHODS[density]
    out = bench.folder / f"out-{name.replace('%', '')}"
    printed = bench.run(
        app,
        {
            "method": method,
            "settings": f"local_steps={STEPS} batch_size={BATCH}{setting}",
            "dataset": server_data,
            "model": "conv2",
            "engine": engine,
            "eval-every": 1000,
            "rounds": TRAIN_ROUNDS,
            "clients": NODES,
            "out": out,
            "deadline-seconds": 60,
            "join-seconds": 60,
        },
    )
    log = out / "rounds.jsonl"
    entries = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    # A step of the server alone, as SynFlow's pruning, asks nobody.
    asked = [entry for entry in entries if entry["cohort"]]
    whole = [entry for entry in asked if not entry["absent"] and not entry["refused"]]
    answer: dict[str, Any] = {"rounds": len(whole)}
    if whole:
        answer["seconds"] = median(entry["wall_seconds"] for entry in whole)
        answer["density"] = whole[-1]["density"]
    if len(whole) < TRAIN_ROUNDS:
        answer["refusals"] = [entry["refused"] for entry in asked][:2]
        answer["printed"] = printed[-1500:]
    return answer


_TRAINING_HEADER = (
    f"{'node':13} {'engine':7} {'model':>6} {'limit':>6} {'connected':>9} {'peak RSS':>9} "
    f"{'PSS':>6} {'round s':>8} {'rounds':>7}"
)


def _training_line(row: dict[str, Any]) -> str:
    limit = f"{row['limit_bytes'] / MB:.0f}" if row["limit_bytes"] else ""
    pss = f"{row['pss_bytes'] / MB:.0f}" if "pss_bytes" in row else ""
    seconds = f"{row['seconds']:.2f}" if "seconds" in row else ""
    return (
        f"{row['node']:13} {row['engine']:7} {row['model']:>6} {limit:>6} "
        f"{row['connected_bytes'] / MB:>9.1f} {row['peak_bytes'] / MB:>9.1f} {pss:>6} "
        f"{seconds:>8} {row['rounds']:>4}/{TRAIN_ROUNDS}"
    )


# --- what was aimed at ----------------------------------------------------------------------------


def aims(measured: list[dict[str, Any]], trained: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each with what was measured and whether it was met."""
    seconds = {(row["payload"], row["node"]): row.get("seconds") for row in measured}
    found: list[tuple[str, float, float]] = []
    if seconds:
        empty, full = seconds["empty", "fedlean node"], seconds["26 MB", "fedlean node"]
        found += [
            ("empty round, s", empty, EMPTY_SECONDS),
            ("empty round, of stock", empty / seconds["empty", "stock node"], EMPTY_RATIO),
            ("26 MB round, of stock", full / seconds["26 MB", "stock node"], FULL_RATIO),
        ]
    for row in trained:
        if row["node"] != "fedlean node":
            continue
        name = row["model"]
        if row["limit_bytes"] is None:
            floor, stretch = PEAK_MB[name]
            found.append((f"Conv-2 {name}, MB", row["peak_bytes"] / MB, floor))
            if stretch:
                found.append((f"Conv-2 {name}, MB, stretch", row["peak_bytes"] / MB, stretch))
        else:
            lost = TRAIN_ROUNDS - row["rounds"]
            limit = row["limit_bytes"] / MB
            found.append((f"Conv-2 {name} in {limit:.0f} MB, rounds lost", lost, 0))
            peak = row["peak_bytes"] / MB
            found.append((f"Conv-2 {name} in {limit:.0f} MB, peak MB", peak, limit))
    return [
        {"aim": what, "measured": value, "at_most": most, "met": value <= most}
        for what, value, most in found
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of MNIST by writer (npz)")
    parser.add_argument("--repeats", type=int, default=7, help="rounds per kind and payload")
    parser.add_argument("--limit-mb", type=float, default=192)
    parser.add_argument(
        "--parts",
        nargs="+",
        default=("rounds", "training", "stock"),
        choices=("rounds", "training", "stock"),
    )
    parser.add_argument("--json", type=Path)
    settings = parser.parse_args()
    limit_bytes = int(settings.limit_mb * MB)
    machine = {**describe(), "load_average": round(os.getloadavg()[0], 2)}
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"{NODES} nodes of each kind, 1 thread each; MB of 10^6 bytes; seed 0")
    measured: list[dict[str, Any]] = []
    trained: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="fedlean-nodes-") as name:
        folder = Path(name)
        bench = Bench(folder, write_shares(settings.data, folder))
        bench.superlink.start()
        try:
            if "rounds" in settings.parts:
                print(f"\n{_ROUND_HEADER}")
                measured = rounds(bench, settings.repeats)
            if "training" in settings.parts or "stock" in settings.parts:
                print(f"\nConv-2, B={BATCH}, {STEPS} steps\n{_TRAINING_HEADER}")
            if "training" in settings.parts:
                trained += training(bench, settings.data.resolve(), limit_bytes)
            if "stock" in settings.parts:
                trained += stock_training(bench, settings.data.resolve(), limit_bytes)
        finally:
            bench.superlink.stop()
    print()
    reached = aims(measured, trained)
    for aim in reached:
        met = "yes" if aim["met"] else "NO"
        print(f"{aim['aim']:40} {aim['measured']:8.2f}  at most {aim['at_most']:7.2f}  {met}")
    if settings.json:
        document = {
            "machine": machine,
            "nodes": NODES,
            "batch_size": BATCH,
            "local_steps": STEPS,
            "seed": 0,
            "rounds": measured,
            "training": trained,
            "aims": reached,
        }
        settings.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
