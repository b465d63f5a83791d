"""The server's half without Flower: over devices in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlean.data.load import load_dataset
from fedlean.runtime.flower.serve import _owned, serve
from fedlean.runtime.flower.settings import ServerSettings
from fedlean.runtime.remote.dispatch import Terms
from fedlean.runtime.remote.share import Share, client_share
from fedlean.runtime.remote.worker import Worker
from fedlean.runtime.rounds import RunFailed
from fedlean.runtime.run import RunConfig


class Devices:
    """Two workers on the digits, answering at once."""

    def __init__(self, folder: Path):
        data = load_dataset("digits")
        self.workers = {
            10 + i: Worker(folder / str(i), client_share(data, Share(i, 2)), client=i)
            for i in range(2)
        }
        self.replies: dict[str, bytes] = {}

    def nodes(self):
        return list(self.workers)

    def send(self, letters, *, seconds):
        keys = [f"m{len(self.replies) + i}" for i in range(len(letters))]
        for key, (node, content) in zip(keys, letters, strict=True):
            self.replies[key] = self.workers[node].answer(content)
        return keys

    def fetch(self, ids, *, seconds):
        return [(key, self.replies[key]) for key in ids if key in self.replies]


def settings(out: Path, rounds: int = 3, **more) -> ServerSettings:
    config = RunConfig("fedavg", clients=2, rounds=rounds, settings={"local_steps": 1}, **more)
    return ServerSettings(config, Terms(min_clients=2, poll_seconds=0.01), out)


def test_a_folder_is_begun_and_then_continued(tmp_path):
    devices, out = Devices(tmp_path / "nodes"), tmp_path / "run"
    assert serve(devices, settings(out))["rounds"] == 3
    again = serve(devices, settings(out))  # nothing is left to do
    assert again["rounds"] == 3
    assert (out / "rounds.jsonl").read_bytes().count(b"\n") == 3


def test_another_configuration_is_refused_by_name(tmp_path):
    devices, out = Devices(tmp_path / "nodes"), tmp_path / "run"
    serve(devices, settings(out))
    owner = (tmp_path / "run.owner").read_text()
    with pytest.raises(ValueError, match=r"another configuration \(rounds\)"):
        serve(devices, settings(out, rounds=4))
    assert (tmp_path / "run.owner").read_text() == owner, "the one that works there goes on"


def test_the_last_one_owns_the_folder(tmp_path):
    first = _owned(tmp_path / "run")
    first()
    second = _owned(tmp_path / "run")
    second()
    with pytest.raises(RunFailed, match="submitted again"):
        first()
