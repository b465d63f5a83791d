"""`fedlean profile` from the command line: what it writes, and that runs take it."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fedlean import cli
from fedlean.cost.profile import load_profile
from fedlean.measure import link, responder, visit

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("fedlean._native") is None,
    reason="the native engine is not built: there is no fedlean._native",
)

TINY = ["profile", "--model", "lenet300", "--batch", "4", "--local-steps", "2", "--repeats", "1"]
TINY += ["--densities", "1", "0.5", "0.3", "0.1"]
DIGITS = ["--input-shape", "1", "8", "8", "--classes", "10"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(visit, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(visit, "TRIES", 1)
    monkeypatch.setattr(link, "TRANSFER_SECONDS", 0.002)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("profiles") / "board.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(visit, "LEAST_SECONDS", 0.0)
        cli.main([*TINY, *DIGITS, "--out", str(path)])
    return path


def fails(capsys, *arguments: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.main(["profile", *arguments])
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and not out
    assert err.startswith("fedlean: ") and err.count("\n") == 1, err
    return err


def test_a_profile_and_its_page(measured):
    profile = load_profile(str(measured))
    assert profile.name == "board" and profile.measured is not None
    assert set(profile.measured.step.layers) == {"fc1.weight", "fc2.weight", "fc3.weight"}
    assert profile.measured.batch_size == 4
    assert all(layer.full_seconds is not None for layer in profile.measured.step.layers.values())
    assert measured.with_suffix(".html").read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in measured.parent.iterdir()) == ["board.html", "board.json"]


def test_what_it_prints(tmp_path, capsys):
    path = tmp_path / "a" / "board.json"
    cli.main([*TINY, *DIGITS, "--out", str(path)])
    out = capsys.readouterr().out
    for part in ("fc1", "fc3", "R²", "speed-up", "inference", "not measured", f"--device {path}"):
        assert part in out, part


def test_a_dataset_gives_shape_and_classes(measured, tmp_path, capsys):
    path = tmp_path / "board.json"
    cli.main([*TINY, "--dataset", "digits", "--out", str(path)])
    hashes = [load_profile(str(p)).measured.spec_hash for p in (path, measured)]  # pyright: ignore
    assert hashes[0] == hashes[1]
    assert "leave out" in fails(capsys, "--dataset", "digits", "--classes", "10")


def test_without_matplotlib_there_is_a_profile_and_no_page(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "fedlean.report.profile_plots", None)
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "fedlean.report.profile_plots")
    monkeypatch.delitem(sys.modules, "fedlean.report.figure", raising=False)
    path = tmp_path / "board.json"
    cli.main([*TINY, *DIGITS, "--out", str(path)])
    assert "no page: plots need matplotlib" in capsys.readouterr().out
    assert load_profile(str(path)) and not path.with_suffix(".html").exists()


def test_with_a_link(tmp_path, capsys):
    path = tmp_path / "board.json"
    with responder.listen("127.0.0.1", 0) as listener:
        arguments = (listener, lambda line: None, 1)
        thread = threading.Thread(target=responder.serve, args=arguments, daemon=True)
        thread.start()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        cli.main([*TINY, *DIGITS, "--link", address, "--out", str(path)])
        thread.join(timeout=10)
    document = json.loads(path.read_text())
    assert document["uplink_bytes_per_s"] == document["derivation"]["link"]["uplink_bytes_per_s"]
    assert "link measured" in document["source"]
    assert "The link: up" in capsys.readouterr().out


def test_serve_answers_until_interrupted(tmp_path):
    """As a user runs it: two processes."""
    command = [sys.executable, "-m", "fedlean.cli", "profile", "--serve", "127.0.0.1:0"]
    # A suite that runs as a job in the background ignores SIGINT, and so would what it starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        serving = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        assert serving.stderr is not None
        port = re.search(r"port (\d+)", serving.stderr.readline())
        assert port is not None
        found = link.measure_link("127.0.0.1", int(port[1]), repeats=1)
        assert found.downlink_bytes_per_s > 0
        assert "127.0.0.1: measured" in serving.stderr.readline()
        serving.send_signal(signal.SIGINT)
        said = serving.communicate(timeout=60)[1]
        assert serving.returncode == 130 and "Traceback" not in said
    finally:
        serving.kill()
        serving.communicate()


# Runs take the file


def run(folder: Path, device: str) -> dict:
    options = ["--clients", "2", "--rounds", "2", "--batch", "4", "--model", "lenet300"]
    initial = ["--set", "initial_max_passes=3", "reconfigure_every=1"]
    cli.main(["run", "prunefl", *options, *initial, "--device", device, "--out", str(folder)])
    return json.loads((folder / "summary.json").read_text())


def test_prunefl_and_the_clock_take_it(measured, tmp_path, capsys):
    """A file with a layer a million times slower: another clock, and the other layers stay.

    Beside it they cost nothing; the slow one is cut as far as φ allows, in both runs.
    """
    document = json.loads(measured.read_text())
    for name in ("uplink_bytes_per_s", "downlink_bytes_per_s"):
        document[name] = 1e12  # the link must not decide
    for operation in ("session", "step", "forward"):
        document["measured"][operation]["dense_seconds"] = None
        for layer in document["measured"][operation]["layers"].values():
            layer |= {"seconds_per_weight": 1e-6, "full_seconds": None}
    even = tmp_path / "even.json"
    even.write_text(json.dumps(document))
    document["measured"]["step"]["layers"]["fc1.weight"]["seconds_per_weight"] = 1.0
    slow = tmp_path / "slow"  # a path of any name
    slow.write_text(json.dumps(document))
    first, second = run(tmp_path / "a", str(even)), run(tmp_path / "b", str(slow))
    assert second["simulated_seconds"] > 1000 * first["simulated_seconds"]
    kept = [
        json.loads((tmp_path / name / "rounds.jsonl").read_text().splitlines()[-1])["layer_density"]
        for name in ("a", "b")
    ]
    assert kept[1]["fc1.weight"] < kept[0]["fc1.weight"]
    assert kept[1]["fc2.weight"] > 1.3 * kept[0]["fc2.weight"]
    assert "measured on another model" not in capsys.readouterr().err


def test_a_run_of_another_model_says_that_the_rates_count(measured, tmp_path, capsys):
    options = ["--clients", "2", "--rounds", "1"]
    other = tmp_path / "other.json"
    cli.main([*TINY, "--input-shape", "1", "8", "8", "--classes", "3", "--out", str(other)])
    capsys.readouterr()
    cli.main(["run", "fedavg", *options, "--device", str(other), "--out", str(tmp_path / "run")])
    assert "measured on another model or shape (lenet300)" in capsys.readouterr().err


def test_a_run_resumes_without_the_file(measured, tmp_path):
    """The run folder holds the profile that the run began with."""
    mine = tmp_path / "mine.json"
    shutil.copy(measured, mine)
    whole = run(tmp_path / "whole", str(mine))
    folder = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole", folder)
    mine.unlink()
    for path in (folder / "checkpoint").iterdir():
        path.unlink()
    cli.main(["resume", str(folder)])
    again = json.loads((folder / "summary.json").read_text())
    assert again["simulated_seconds"] == whole["simulated_seconds"]
    bytes_of = [(tmp_path / f / "model.safetensors").read_bytes() for f in ("whole", "resumed")]
    assert bytes_of[0] == bytes_of[1]


def test_a_damaged_profile_in_a_run_folder(measured, tmp_path, capsys):
    run(tmp_path / "run", str(measured))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["profile"]["measured"]["step"]["constant_seconds"] = -1
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.main(["resume", str(tmp_path / "run")])
    assert stopped.value.code == 2
    assert "measured.step.constant_seconds" in capsys.readouterr().err


# What is refused


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--densities", "0.1", "0.2"), "at least three"),
        (("--densities", "0.1", "0.2", "2"), "(0, 1]"),
        (("--batch", "0"), "batch_size must be at least 1"),
        (("--repeats", "0"), "repeats"),
        (("--threads", "0"), "threads"),
        (("--local-steps", "-1"), "local_steps"),
        (("--seconds", "0"), "seconds"),
        (("--seconds", "nan"), "seconds"),
        (("--seconds", "1e-6"), "measurements that a fit needs"),
        (("--link", "nowhere"), "HOST:PORT"),
        (("--serve", "nowhere"), "HOST:PORT"),
        (("--model", "lenet"), "lenet300"),
        (("--input-shape", "1", "2.5"), "2.5"),
        (("--out", "."), "is a folder"),
        (("--out", "board.html"), "where the page goes"),
        (("--dataset", "absent"), "absent"),
    ],
)
def test_bad_input_is_one_line(capsys, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert said in fails(capsys, *arguments)
    assert not list(tmp_path.iterdir())
