"""kill -9 of node, server app and SuperLink, each in the middle of a round.

With min-replies = all, what is lost is asked again, so the end is that of the undisturbed run, bit
for bit, however often something died.  PruneFL with importance in every round, so that nodes keep
something between rounds, and with an initial phase in which the model stays at one node.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from fedlean.runtime.config import RunConfig
from fedlean.runtime.how import How
from fedlean.runtime.run import start

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("flwr") is None, reason="flwr is not installed"),
]
if find_spec("flwr") is not None:
    from runtime.flower.processes import Process, light_node, model, same
    from runtime.flower.stock import COMMANDS

ROUNDS = 7
STEPS = 800  # half a second or so of training, to be killed in
SETTINGS = {
    "local_steps": STEPS,
    "reconfigure_every": 3,
    "importance_rounds": 0,
    "initial_max_passes": 3,
}
DEADLINE_SECONDS = 15  # of an attempt: three in a row would end before a killed node is let in


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("local") / "run"
    config = RunConfig(
        method="prunefl",
        clients=2,
        rounds=ROUNDS,
        engine="native",
        settings=SETTINGS,
    )
    start(config, folder, How())
    return model(folder)


@pytest.fixture
def nodes(superlink, tmp_path):
    pair = [light_node(superlink, tmp_path, client).start() for client in range(2)]
    for node in pair:
        node.until("connected to SuperLink")
    yield pair
    for node in pair:
        node.stop_if_running()


@pytest.fixture
def submit(superlink, app):
    """Runs the app with the folder `out`; each stream is ended with the test."""
    streams: list[Process] = []

    def run(out: Path) -> Process:
        streams.append(stream(superlink, app, out, len(streams)))
        return streams[-1].start()

    yield run
    for one in streams:
        one.kill()


def stream(superlink, app: Path, out: Path, number: int) -> Process:
    settings = " ".join(f"{key}={value}" for key, value in SETTINGS.items())
    text = (
        f'method="prunefl" settings="{settings}" out="{out}" clients=2 rounds={ROUNDS} '
        f"min-replies=2 deadline-seconds={DEADLINE_SECONDS} join-seconds=120"
    )
    command = [str(COMMANDS / "flwr"), "run", str(app), "test", "--stream", "-c", text]
    return Process(out.with_suffix(f".{number}.log"), command, superlink.environment)


def rounds_done(out: Path) -> int:
    path = out / "rounds.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def in_the_middle_of_a_round(out: Path, seen: int = 0) -> int:
    """Waits until `seen` and two more rounds are done, the next under way; how many are done."""
    # a node that was getting a task while its sender died waits until that run is declared over
    end = time.monotonic() + 180
    while rounds_done(out) < seen + 2:
        assert time.monotonic() < end, "no progress"
        time.sleep(0.05)
    time.sleep(0.3)
    assert not (out / "summary.json").exists(), "too late to kill anything"
    return rounds_done(out)


def until_finished(out: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not (out / "summary.json").exists():
        assert time.monotonic() < end, f"not finished: {rounds_done(out)} rounds"
        time.sleep(0.2)


def kill_server_app(superlink_log: Path) -> None:
    """The one that runs for the SuperLink whose log this is: its descendants' commands say so.

    -ww, for ps cuts its lines at 80 characters otherwise: within the name, in a long path.
    """
    command = ["ps", "-eww", "-o", "pid=,args="]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
    found = [
        int(line.split()[0])
        for line in listed.stdout.splitlines()
        if "flwr-serverapp" in line or "serverapp" in line.split()[1]
    ]
    ours = [pid for pid in found if _home(pid) == str(superlink_log)]
    assert ours, listed.stdout
    for pid in ours:
        os.kill(pid, signal.SIGKILL)


def _home(pid: int) -> str:
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return ""
    return next((p[10:].decode() for p in pairs if p.startswith(b"FLWR_HOME=")), "")


def test_a_node(submit, nodes, tmp_path, undisturbed):
    """Its key is refused for up to a minute; the round waits, is asked again, and is the same."""
    out = tmp_path / "run"
    submit(out)
    in_the_middle_of_a_round(out)
    nodes[1].kill()
    nodes[1].start()  # as systemd does it
    until_finished(out, 240)
    assert same(model(out), undisturbed)


def test_the_server_app_and_the_superlink(submit, superlink, nodes, tmp_path, undisturbed):
    """Each time the app is submitted again, with the same folder."""
    out = tmp_path / "run"
    submit(out)
    done = in_the_middle_of_a_round(out)
    kill_server_app(superlink.flwr_home)
    time.sleep(1)
    seen = rounds_done(out)
    assert seen <= done + 1
    submit(out)
    done = in_the_middle_of_a_round(out, seen)  # the stream's lines come too late to wait for
    superlink.restart()
    third = submit(out)
    third.until("which is continued", 90)
    until_finished(out, 150)
    assert done >= 4
    assert same(model(out), undisturbed)
