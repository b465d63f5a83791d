"""Real processes over TLS with keys: a stock SuperLink, `fedlean node`, the app of `fedlean app new`.

The states must be bit-equal to the same run in one process.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedlean.runtime.flower.project import write_project
from fedlean.runtime.run import RunConfig, start

pytestmark = pytest.mark.skipif(find_spec("flwr") is None, reason="flwr is not installed")

METHODS = {
    "fedavg": {"local_steps": 2},
    "prunefl": {"local_steps": 2, "reconfigure_every": 2, "initial_max_passes": 4},
}
ROUNDS = 4


class Node:
    """A `fedlean node` process."""

    def __init__(self, stock, folder: Path, client: int, *options: str, seed: int = 0):
        from runtime.flower.stock import make_key

        self.log_path = folder / f"node{client}.log"
        key = folder / f"node{client}.key"
        if not key.exists():
            stock.register(make_key(key))
        self.command = [sys.executable, "-m", "fedlean", "node", "--superlink", stock.address]
        self.command += ["--data", "digits", "--tls-ca", str(stock.ca), "--key", str(key)]
        self.command += ["--state", str(folder / "state"), "--client", f"{client}/2"]
        self.command += ["--seed", str(seed), "--name", f"board {client}", "--poll", "0.3", *options]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Node:
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log)
        return self

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def until(self, text: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while text not in self.log():
            assert self.process and self.process.poll() is None, self.log()
            assert time.monotonic() < end, f"no {text!r} in {self.log()}"
            time.sleep(0.1)

    def stop(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(30)

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def app(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("project") / "app"
    write_project(folder)
    return folder


@pytest.fixture(scope="module")
def nodes(superlink, tmp_path_factory):
    folder = tmp_path_factory.mktemp("nodes")
    pair = [Node(superlink, folder, client).start() for client in range(2)]
    for node in pair:
        node.until("connected to SuperLink")
    yield pair
    for node in pair:
        if node.process and node.process.poll() is None:
            node.stop()


def run_settings(method: str, out: Path, **more) -> str:
    """The value of `flwr run -c`."""
    settings = " ".join(f"{key}={value}" for key, value in METHODS[method].items())
    fields = {
        "method": method,
        "settings": settings,
        "out": str(out),
        "clients": 2,
        "rounds": ROUNDS,
        "join-seconds": 60,
        "deadline-seconds": 60,
        **more,
    }
    return " ".join(
        f'{key}="{value}"' if isinstance(value, str) else f"{key}={value}"
        for key, value in fields.items()
    )


def local(method: str, folder: Path) -> dict[str, np.ndarray]:
    config = RunConfig(
        method=method, clients=2, rounds=ROUNDS, engine="native", settings=METHODS[method]
    )
    start(config, folder, lambda entry: None)
    return load_file(folder / "model.safetensors")


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].tobytes() == right[name].tobytes() for name in left
    )


@pytest.mark.parametrize("method", METHODS)
def test_bit_equal_to_one_process(method, superlink, nodes, app, tmp_path):
    out = tmp_path / "deployed"
    superlink.run(app, "-c", run_settings(method, out), timeout_seconds=120)
    assert json.loads((out / "summary.json").read_text())["rounds"] == ROUNDS
    assert same(load_file(out / "model.safetensors"), local(method, tmp_path / "local"))
