"""A node with a valid key whose answers are far too large, at a stock SuperLink."""

from __future__ import annotations

import json
import os
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from federation import Around, same

if find_spec("flwr") is None:
    pytest.skip("flwr is not installed", allow_module_level=True)

from runtime.flower.processes import (
    METHODS,
    Process,
    light_node,
    model,
    registered_key,
    run_settings,
)
from runtime.flower.rogue_answers import ATTACKS

from fedlean.runtime.config import RunConfig
from fedlean.runtime.how import How, Parts, in_process
from fedlean.runtime.local import Dispatch
from fedlean.runtime.run import start

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]
ROGUE = Path(__file__).with_name("rogue_node.py")
SIZE = 100_000_000


def rogue_node(stock, folder: Path, what: int | str) -> Process:
    key = registered_key(stock, folder, 1)
    command = [sys.executable, str(ROGUE), stock.address, str(key), str(stock.ca)]
    here = {**os.environ, "PYTHONPATH": str(ROGUE.parents[2])}
    return Process(folder / "rogue.log", [*command, str(folder / "rogue"), str(what)], here)


class Peak:
    """The most resident memory, in bytes, that a process of a server app has had, while entered."""

    def __init__(self, home: Path):
        self._home = f"FLWR_HOME={home}".encode()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.bytes = 0

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    if b"serverapp" not in (process / "cmdline").read_bytes():
                        continue
                    if self._home not in (process / "environ").read_bytes():
                        continue
                    status = (process / "status").read_text().splitlines()
                except OSError:
                    continue
                (most,) = [line.split()[1] for line in status if line.startswith("VmHWM")] or ["0"]
                self.bytes = max(self.bytes, int(most) << 10)


def test_a_reply_far_beyond_its_limit(superlink, app, tmp_path):
    peaks = {}
    for size in (1, SIZE):
        nodes = [light_node(superlink, tmp_path, 0), rogue_node(superlink, tmp_path, size)]
        try:
            for node, said in zip(nodes, ("connected to SuperLink", "connected"), strict=True):
                node.start().until(said)
            out = tmp_path / f"out{size}"
            settings = run_settings("fedavg", out, rounds=2, min_clients=2, deadline_seconds=60)
            with Peak(superlink.flwr_home) as peak:
                superlink.run(app, "-c", settings, timeout_seconds=200)
            peaks[size] = peak.bytes
        finally:
            for node in nodes:
                node.stop_if_running()
        entries = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
        first, second = (entry["refused"].get("1", "") for entry in entries)
        # on a busy machine its upload is not over when the next round begins
        assert second == first or any("client 1" in note for note in entries[1]["notes"])
    assert first.startswith(f"its reply has {SIZE} bytes")
    assert peaks[1] > 0 and peaks[SIZE] < peaks[1] + SIZE // 5


def without_odd_answers(folder: Path, rounds: int) -> dict[str, np.ndarray]:
    """The same run in this process, in which client 1 answers every second round only."""

    def connect(parts: Parts) -> tuple[Dispatch, list[str]]:
        inner, lines = in_process(parts)

        def change(tasks, updates):
            odd = tasks[0].round % 2
            return (update for update in updates if update.client != 1 or not odd)

        return Around(inner, change), lines

    config = RunConfig(
        "fedavg", clients=4, rounds=rounds, eval_every=100, settings=METHODS["fedavg"]
    )
    start(config, folder, How(connect=connect))
    return model(folder)


def test_no_attack_lands_and_each_is_said(superlink, app, tmp_path):
    """The run ends with the bits of one in which those answers were lost.

    It ends with the bomb, since on a busy machine its upload lasts into whatever follows.
    """
    assert [*ATTACKS][-1] == "bomb"
    rounds, out = 2 * len(ATTACKS) - 1, tmp_path / "out"
    nodes = [rogue_node(superlink, tmp_path, "attacks")]
    nodes += [light_node(superlink, tmp_path, client, clients=4) for client in (0, 2, 3)]
    try:
        for node in nodes:
            node.start().until("connected")
        settings = run_settings(
            "fedavg",
            out,
            clients=4,
            min_clients=4,
            rounds=rounds,
            eval_every=100,
            deadline_seconds=60,
        )
        superlink.run(app, "-c", settings, timeout_seconds=300)
    finally:
        for node in nodes:
            node.stop_if_running()
    assert same(model(out), without_odd_answers(tmp_path / "local", rounds))
    entries = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    said = [entry["refused"].get("1") for entry in entries]
    for (name, attack), reason in zip(ATTACKS.items(), said[::2], strict=True):
        assert reason is not None and attack.reason in reason, name
        assert reason.isprintable() and len(reason) < 400
    assert said[1::2] == [None] * (len(ATTACKS) - 1)
    work = [entry["flops_per_client"] for entry in entries]
    assert max(work) <= work[1]  # of a round in which all four were honest
