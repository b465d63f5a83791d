"""Two `fedlean node`s, each with a folder of training data only, and a server with a test set."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from fedlean.runtime.config import RunConfig
from fedlean.runtime.how import How
from fedlean.runtime.run import start

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("flwr") is None, reason="flwr is not installed"),
]
if find_spec("flwr") is not None:
    from runtime.flower.processes import light_node, model, same

COLUMNS = ("temperature", "humidity", "vibration")


def table(path: Path, x: np.ndarray, y: np.ndarray, client: np.ndarray | None = None) -> str:
    """Readings of sensors as CSV; the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [*COLUMNS, "label", *(() if client is None else ("client",))]
    rows = [
        [*map(repr, map(float, row)), f"state {label}"] for row, label in zip(x, y, strict=True)
    ]
    if client is not None:
        rows = [[*row, f"pump {each}"] for row, each in zip(rows, client, strict=True)]
    path.write_text("\n".join(",".join(row) for row in [names, *rows]) + "\n")
    return str(path.parent)


def test_two_nodes_with_tables_of_their_own(superlink, app, tmp_path: Path):
    rng = np.random.default_rng(0)
    y = np.arange(90) % 3
    x = rng.standard_normal((90, 3)) + 3 * np.eye(3)[y]
    owner = (np.arange(90) > 30).astype(int)
    train, test = np.arange(90) < 70, np.arange(90) >= 70
    nodes = []
    for client in range(2):
        mine = train & (owner == client)
        data = table(tmp_path / f"device{client}/train.csv", x[mine], y[mine])
        options = ("--data", data, "--whole", "--memory-limit", "160MB")
        nodes.append(light_node(superlink, tmp_path, client, *options).start())
    out = tmp_path / "out"
    server = table(tmp_path / "server/test.csv", x[test], y[test])
    fields = 'method="fedavg" settings="local_steps=3 batch_size=10" model="mlp_13_7" clients=2'
    more = f'rounds=3 join-seconds=90 deadline-seconds=90 dataset="{server}" out="{out}"'
    try:
        superlink.run(app, "-c", f"{fields} {more}", timeout_seconds=150)
    finally:
        for node in nodes:
            node.stop_if_running()
    whole = tmp_path / "whole"
    table(whole / "train.csv", x[train], y[train], owner[train])
    table(whole / "test.csv", x[test], y[test])
    local = RunConfig(
        "fedavg",
        str(whole),
        "mlp_13_7",
        partition="natural",
        rounds=3,
        engine="native",
        settings={"local_steps": 3, "batch_size": 10},
    )
    start(local, tmp_path / "local", How())
    assert same(model(out), model(tmp_path / "local"))
    one, other = (
        json.loads((folder / "config.json").read_text()) for folder in (out, tmp_path / "local")
    )
    assert one["normalisation"] == other["normalisation"]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["partition"].startswith("as 2 devices hold it: 31 to 39 examples")
