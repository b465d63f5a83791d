"""Devices with training examples only, and a server with test examples only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answering import Devices

from fedlean.report.page import comparison_page, write_report
from fedlean.report.run_folder import read_run
from fedlean.runtime.config import RunConfig
from fedlean.runtime.flower.serve import serve
from fedlean.runtime.flower.settings import ServerSettings
from fedlean.runtime.how import How
from fedlean.runtime.remote import envelope as env
from fedlean.runtime.remote.dispatch import NobodyThere, Terms
from fedlean.runtime.remote.envelope import Envelope, seal, unseal
from fedlean.runtime.run import start

OWN = {"local_steps": 2, "batch_size": 5}
LABELS = np.array(["run", "sit", "walk"])


class Data:
    """Examples (3, 2, 4) of three devices that differ in size, level and classes."""

    def __init__(self, dtype: type = np.float32) -> None:
        rng = np.random.default_rng(0)
        self.owner = np.repeat([0, 1, 2], [12, 30, 7])
        self.y = np.where(self.owner == 2, 1, np.arange(49) % 3)
        level = rng.standard_normal((3, 3, 1, 1))[self.owner]
        level = level + 3 * rng.standard_normal((3, 3, 2, 4))[self.y]
        self.x = (50 * (level + 0.3 * rng.standard_normal((49, 3, 2, 4)))).astype(dtype)
        test = (50 * rng.standard_normal((9, 3, 2, 4))).astype(dtype)
        self.test = test, np.arange(9) % 3

    def folder(self, base: Path, client: int) -> str:
        """What one device holds."""
        mine = self.owner == client
        folder = base / f"device{client}"
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / "a.npz", x=self.x[mine], y=LABELS[self.y[mine]], layout="nchw")
        return str(folder)

    def server(self, base: Path) -> str:
        (base / "server").mkdir(parents=True, exist_ok=True)
        x, y = self.test
        np.savez(base / "server/a.npz", x_test=x, y_test=LABELS[y], layout="nchw")
        return str(base / "server")

    def whole(self, base: Path) -> str:
        (base / "whole").mkdir(parents=True, exist_ok=True)
        x, y = self.test
        np.savez(
            base / "whole/a.npz",
            x_train=self.x,
            y_train=LABELS[self.y],
            x_test=x,
            y_test=LABELS[y],
            client=self.owner,
            layout="nchw",
        )
        return str(base / "whole")


def settings(data: str, out: Path, **more: Any) -> ServerSettings:
    least = more.pop("min_clients", 3)
    config = RunConfig("fedavg", data, "mlp_13_7", clients=3, rounds=2, settings=OWN, **more)
    terms = Terms(min_clients=least, join_seconds=0.05, deadline_seconds=5, poll_seconds=0.01)
    return ServerSettings(config, terms, out)


def model(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def document(out: Path) -> dict[str, Any]:
    return json.loads((out / "config.json").read_text())


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
def test_such_a_run_has_the_bits_of_one_that_holds_everything(tmp_path: Path, dtype: type):
    data = Data(dtype)
    folders = [data.folder(tmp_path, client) for client in range(3)]
    serve(Devices(tmp_path / "nodes", folders), settings(data.server(tmp_path), tmp_path / "run"))
    local = RunConfig(
        "fedavg", data.whole(tmp_path), "mlp_13_7", partition="natural", rounds=2, settings=OWN
    )
    start(local, tmp_path / "local", How())
    assert model(tmp_path / "run") == model(tmp_path / "local")
    deployed, here = document(tmp_path / "run"), document(tmp_path / "local")
    assert deployed["normalisation"] == here["normalisation"]
    assert any("standardised by the examples of 3 clients" in note for note in deployed["notes"])
    mean = data.x.mean((0, 2, 3), dtype=np.float64)
    np.testing.assert_allclose(here["normalisation"]["mean"], mean, rtol=1e-6)
    one, other = (
        json.loads((tmp_path / name / "summary.json").read_text()) for name in ("run", "local")
    )
    assert one["final_accuracy"] == other["final_accuracy"]
    assert one["held"]["1"] == {"examples": 30, "classes": 3} and other["held"] == {}
    held = "as 3 devices hold it: 7 to 30 examples, 1 to 3 classes each"
    assert (one["partition"], other["partition"]) == (held, "natural")


def test_devices_of_other_types_agree_on_the_same_values(tmp_path: Path):
    """One stores bytes, one the same as floats from 0 to 1."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (20, 1, 4, 4), np.uint8), np.arange(20) % 2
    folders = []
    for i, stored in enumerate((x[:12], (x[12:] / 255.0).astype(np.float32))):
        (tmp_path / f"{i}").mkdir()
        np.savez(tmp_path / f"{i}/a.npz", x=stored, y=y[:12] if i == 0 else y[12:])
        folders.append(str(tmp_path / f"{i}"))
    (tmp_path / "server").mkdir()
    np.savez(tmp_path / "server/a.npz", x_test=x[:4], y_test=y[:4])
    given = settings(str(tmp_path / "server"), tmp_path / "run", min_clients=2)
    serve(Devices(tmp_path / "nodes", folders), given)
    found = document(tmp_path / "run")["normalisation"]
    assert found["mean"][0] == pytest.approx((x / 255).mean(), rel=1e-6)
    assert found["std"][0] == pytest.approx((x / 255).std(), rel=1e-6)


def test_a_run_that_goes_on_asks_nobody_again(tmp_path: Path):
    data = Data()
    folders = [data.folder(tmp_path, client) for client in range(3)]
    given = settings(data.server(tmp_path), tmp_path / "run")
    serve(Devices(tmp_path / "nodes", folders), given)
    post, kinds = Devices(tmp_path / "nodes", folders), []
    for path in (tmp_path / "run").glob("checkpoint/*"):
        path.unlink()

    def send(letters, *, seconds):
        kinds.extend(unseal(content, expected=tuple(env.KINDS)).kind for _, content in letters)
        return Devices.send(post, letters, seconds=seconds)

    post.send = send
    before = model(tmp_path / "run")
    serve(post, given)
    assert env.TASK in kinds and env.MEASURE not in kinds
    assert model(tmp_path / "run") == before


@pytest.mark.parametrize("more", [{"mean": (1.0,), "deviation": (50.0,)}, {"inputs": "unit"}])
def test_what_is_fixed_is_not_asked(tmp_path: Path, more: dict[str, Any]):
    data = Data()
    if more.get("inputs"):
        data.x, data.test = np.abs(data.x) / 1000, (np.abs(data.test[0]) / 1000, data.test[1])
    folders = [data.folder(tmp_path, client) for client in range(3)]
    serve(
        Devices(tmp_path / "nodes", folders),
        settings(data.server(tmp_path), tmp_path / "run", **more),
    )
    found = document(tmp_path / "run")["normalisation"]
    assert found["mean"] == [more.get("mean", (0.0,))[0]] * 3
    assert found["std"] == [more.get("deviation", (1.0,))[0]] * 3
    local = RunConfig(
        "fedavg",
        data.whole(tmp_path),
        "mlp_13_7",
        partition="natural",
        rounds=2,
        settings=OWN,
        **more,
    )
    start(local, tmp_path / "local", How())
    assert model(tmp_path / "run") == model(tmp_path / "local")


class Liar(Devices):
    """Device 0 says that its examples add up to something else."""

    answer: dict[str, Any]

    def send(self, letters, *, seconds):
        keys = super().send(letters, seconds=seconds)
        for key, (node, content) in zip(keys, letters, strict=True):
            if node == 10 and unseal(content, expected=tuple(env.KINDS)).kind == env.MEASURE:
                self.replies[key] = seal(Envelope(env.MOMENTS, self.answer))
        return keys


GOOD = {"scale": 1.0, "count": 96, "totals": ["0x0"] * 3, "squares": ["0x0"] * 3}


@pytest.mark.parametrize(
    "change",
    [
        {"count": 0},
        {"totals": ["0x0"] * 2},
        {"totals": ["0x1"] * 3},  # no squares can be 0 then
        {"squares": ["-0x1"] * 3},
        {"squares": [hex(1 << 640)] * 3},  # values far beyond those of the run
    ],
)
def test_impossible_sums_are_refused(tmp_path: Path, change: dict[str, Any], caplog):
    data = Data()
    folders = [data.folder(tmp_path, client) for client in range(3)]
    post = Liar(tmp_path / "nodes", folders)
    post.answer = GOOD | change
    caplog.set_level("INFO", "flwr")
    with pytest.raises(NobodyThere, match="2 of 3 clients said within 5 s what their examples add"):
        serve(post, settings(data.server(tmp_path), tmp_path / "run"))
    assert "client 0: sums" in caplog.text
    assert not (tmp_path / "run/config.json").exists()
    serve(post, settings(data.server(tmp_path), tmp_path / "two", min_clients=2))
    assert any(
        "by the examples of 2 clients: 1, 2" in n for n in document(tmp_path / "two")["notes"]
    )


def test_a_server_without_any_example(tmp_path: Path):
    """It knows the shape, the classes and the range, and measures no accuracy."""
    data = Data()
    folders = [data.folder(tmp_path, client) for client in range(3)]
    (tmp_path / "server").mkdir()
    about = {"input_shape": [3, 2, 4], "classes": [*LABELS], "range": [-500, 500]}
    (tmp_path / "server/dataset.json").write_text(json.dumps(about))
    given = settings(str(tmp_path / "server"), tmp_path / "run")
    summary = serve(Devices(tmp_path / "nodes", folders), given)
    assert summary["final_accuracy"] is None and summary["best_accuracy"] is None
    local = RunConfig(
        "fedavg", data.whole(tmp_path), "mlp_13_7", partition="natural", rounds=2, settings=OWN
    )
    start(local, tmp_path / "local", How())
    assert model(tmp_path / "run") == model(tmp_path / "local")
    assert any(
        "the accuracy is not measured" in note for note in document(tmp_path / "run")["notes"]
    )
    assert write_report(tmp_path / "run").startswith("report: ")
    page = (tmp_path / "run/report.html").read_text()
    assert "as 3 devices hold it: 7 to 30 examples" in page
    compare = comparison_page([read_run(tmp_path / name) for name in ("run", "local")])
    assert "<html" in compare
    with pytest.raises(ValueError, match="has no training examples"):
        start(local.__class__("fedavg", str(tmp_path / "server")), tmp_path / "no", How())
