"""Processes and settings of a deployment on this machine, for tests."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from runtime.flower.stock import COMMANDS, free_port, make_key
from safetensors.numpy import load_file

from fedlean.runtime.config import RunConfig
from fedlean.runtime.how import How
from fedlean.runtime.run import start

METHODS = {
    "fedavg": {"local_steps": 2},
    "prunefl": {"local_steps": 2, "reconfigure_every": 2, "initial_max_passes": 4},
    "ntk_zo": {"directions": 8, "prune_steps": 2, "scalars": "int8", "download": "scalars"},
    # two rounds a stage; one client of two a round, drawn by what the one before it has sent
    "smartfreeze": {"local_steps": 2, "ends": "stage1", "cohort": 1, "momentum": 0.5},
    "model_selection": {"local_steps": 2, "explore": 0.5, "known": 0},
}
MODELS = {"smartfreeze": "resnet8,norm=batch"}
# memory that is drawn anew in every round, of which the least holds the smallest sub-network
FLEETS = {"model_selection": str(Path(__file__).with_name("two_boards.toml"))}
ROUNDS = 4


class Process:
    """A command whose output goes to a file."""

    def __init__(self, log_path: Path, command: list[str], environment: dict[str, str] | None):
        self.log_path, self.command, self.environment = log_path, command, environment
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Process:
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env=self.environment
            )
        return self

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def until(self, text: str, seconds: float = 60, count: int = 1) -> None:
        end = time.monotonic() + seconds
        while self.log().count(text) < count:
            assert self.process and self.process.poll() is None, self.log()
            assert time.monotonic() < end, f"no {text!r} in {self.log()}"
            time.sleep(0.05)

    def stop(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(30)

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop_if_running(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.stop()


def registered_key(stock, folder: Path, client: int) -> Path:
    key = folder / f"node{client}.key"
    if not key.exists():
        stock.register(make_key(key))
    return key


def light_node(stock, folder: Path, client: int, *options: str, clients: int = 2) -> Process:
    """`fedlean node`, holding its share of the digits."""
    key = registered_key(stock, folder, client)
    command = [sys.executable, "-m", "fedlean", "node", "--superlink", stock.address]
    command += ["--data", "digits", "--tls-ca", str(stock.ca), "--key", str(key)]
    command += ["--state", str(folder / "state"), "--client", f"{client}/{clients}"]
    command += ["--name", f"board {client}", "--poll", "0.3", *options]
    return Process(folder / f"node{client}.log", command, None)


def stock_node(stock, folder: Path, client: int, *, clients: int = 2) -> Process:
    """A SuperNode; the app's client half runs in processes of its own."""
    key = registered_key(stock, folder, client)
    state = folder / f"stock-state-{client}"
    config = f'partition-id={client} num-partitions={clients} state="{state}"'
    command = [str(COMMANDS / "flower-supernode"), "--superlink", stock.address]
    command += ["--host", "127.0.0.1", "--port", str(free_port()), "--node-config", config]
    command += ["--root-certificates", str(stock.ca), "--auth-supernode-private-key", str(key)]
    return Process(folder / f"stock{client}.log", command, stock.environment)


def run_settings(method: str, out: Path, **more) -> str:
    """The value of `flwr run -c`."""
    settings = " ".join(f"{key}={value}" for key, value in METHODS[method].items())
    fields = {
        "method": method,
        "model": MODELS.get(method, "lenet300"),
        "settings": settings,
        "out": str(out),
        "clients": 2,
        "rounds": ROUNDS,
        "join-seconds": 90,
        "deadline-seconds": 90,
        **({"fleet": FLEETS[method]} if method in FLEETS else {}),
        **{name.replace("_", "-"): value for name, value in more.items()},
    }
    return " ".join(
        f'{key}="{value}"' if isinstance(value, str) else f"{key}={value}"
        for key, value in fields.items()
    )


def local(method: str, folder: Path, rounds: int = ROUNDS) -> dict[str, np.ndarray]:
    """The same run in this process: its final model."""
    config = RunConfig(
        method=method,
        model=MODELS.get(method, "lenet300"),
        clients=2,
        rounds=rounds,
        engine="native",
        fleet=FLEETS.get(method),
        settings=METHODS[method],
    )
    start(config, folder, How())
    return model(folder)


def model(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].tobytes() == right[name].tobytes() for name in left
    )
