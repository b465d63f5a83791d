"""The server's half without Flower: over devices in this process."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from answering import Devices

from fedlean.runtime.config import RunConfig
from fedlean.runtime.flower.serve import serve
from fedlean.runtime.flower.settings import ServerSettings
from fedlean.runtime.how import How
from fedlean.runtime.lock import Superseded, hold
from fedlean.runtime.remote.dispatch import Terms
from fedlean.runtime.run import resume


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
    with hold(out, print, shared=True) as lock:
        with pytest.raises(ValueError, match=r"another configuration \(rounds\)"):
            serve(devices, settings(out, rounds=4))
        lock.check()  # the one that works there goes on


def test_an_app_that_cannot_go_on_ends_nobodys_run(tmp_path):
    devices, out = Devices(tmp_path / "nodes"), tmp_path / "run"
    serve(devices, settings(out))
    config = json.loads((out / "config.json").read_text())
    config["data"]["fingerprint"]["y_train"]["digest"] = "0" * 32
    (out / "config.json").write_text(json.dumps(config))
    with hold(out, print, shared=True) as lock:
        with pytest.raises(ValueError, match=r"the data changed.*training labels"):
            serve(devices, settings(out))
        lock.check()
    accepted = replace(settings(out), accept_changed_data=True)
    assert serve(devices, accepted)["data_changes"][0]["after_round"] == 3


def test_the_last_one_submitted_owns_the_folder(tmp_path):
    """The first finds out before its next step, and writes nothing more."""
    out = tmp_path / "run"

    class Twice(Devices):
        """The app is submitted again while the first one's second round is on its way."""

        again: dict[str, object] | None = None

        def send(self, letters, *, seconds):
            if self.again is None and len(self.replies) > 5:
                self.again = {}
                self.again = serve(Devices(tmp_path / "others"), settings(out))
            return super().send(letters, seconds=seconds)

    devices = Twice(tmp_path / "nodes")
    with pytest.raises(Superseded, match="another process has taken it over"):
        serve(devices, settings(out))
    assert devices.again and devices.again["rounds"] == 3
    entries = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    assert [entry["round"] for entry in entries] == [1, 2, 3]
    assert not (out / "run.lock").exists()


def test_a_local_run_and_an_app_exclude_each_other(tmp_path):
    devices, out = Devices(tmp_path / "nodes"), tmp_path / "run"
    serve(devices, settings(out))
    held = (
        r"is being written by fedlean, process \d+ on .* since .*: wait until it ends, or stop it"
    )
    with hold(out, print), pytest.raises(ValueError, match=held):
        serve(devices, settings(out))
    app = held.replace("fedlean", "a Flower app")
    with hold(out, print, shared=True), pytest.raises(ValueError, match=app):
        resume(out, How())
