"""Real processes over TLS with keys: a stock SuperLink, nodes of both kinds, the app.

Their final states must be bit-equal to the same run in one process.
"""

from __future__ import annotations

import json
import os
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("flwr") is None, reason="flwr is not installed"),
]
if find_spec("flwr") is not None:
    from runtime.flower.processes import (
        METHODS,
        ROUNDS,
        light_node,
        local,
        model,
        run_settings,
        same,
        stock_node,
    )
else:
    METHODS = {}


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    """Where nodes keep keys, logs and files."""
    return tmp_path_factory.mktemp("nodes")


@pytest.fixture
def light_nodes(superlink, places):
    pair = [light_node(superlink, places, client).start() for client in range(2)]
    for node in pair:
        node.until("connected to SuperLink")
    yield pair
    for node in pair:
        node.stop_if_running()


@pytest.fixture
def stock_nodes(superlink, places):
    pair = [stock_node(superlink, places, client).start() for client in range(2)]
    yield pair
    for node in pair:
        node.stop_if_running()


@pytest.mark.parametrize("method", METHODS)
def test_light_nodes(method, superlink, light_nodes, app, tmp_path):
    out = tmp_path / "deployed"
    superlink.run(app, "-c", run_settings(method, out), timeout_seconds=150)
    assert json.loads((out / "summary.json").read_text())["rounds"] == ROUNDS
    lines = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    stages = [line["stage"] for line in lines if line["stage"]]
    assert stages == (["stage1"] * 2 + ["head"] * 2 if method == "smartfreeze" else [])
    assert same(model(out), local(method, tmp_path / "local"))
    assert (out / "report.html").is_file()


def test_stock_nodes(superlink, stock_nodes, app, tmp_path):
    """One method, the one that sends most kinds of messages: the nodes' own code knows none."""
    method, out = "prunefl", tmp_path / "deployed"
    superlink.run(app, "-c", run_settings(method, out, rounds=3), timeout_seconds=240)
    assert same(model(out), local(method, tmp_path / "local", rounds=3))


@pytest.mark.skipif(find_spec("ray") is None, reason="flwr[simulation] is not installed")
def test_simulation(app, tmp_path):
    """Flower's own, on Ray; its local SuperLink is stopped again."""
    home = tmp_path / "home"
    home.mkdir()
    from runtime.flower.stock import COMMANDS

    environment = {
        **os.environ,
        "PATH": f"{COMMANDS}{os.pathsep}{os.environ.get('PATH', '')}",  # flwr starts others by name
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }
    try:
        for method in METHODS:
            out = tmp_path / method
            text = run_settings(method, out, state=str(tmp_path / "state"))
            command = [str(COMMANDS / "flwr"), "run", str(app), "local", "--stream", "-c", text]
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=150
            )
            assert done.returncode == 0, done.stdout + done.stderr
            assert (out / "summary.json").is_file(), done.stdout
            assert same(model(out), local(method, tmp_path / f"{method}-local"))
    finally:
        subprocess.run(["pkill", "-f", f"flower-superlink.*{home}"], check=False)
