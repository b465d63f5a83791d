"""Runs with a fleet: from the command line to the page, and resumed without its files."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedlean import cli
from fedlean.cost.profile import load_profile
from fedlean.fleet.load import load_fleet
from fedlean.printable import megabytes
from fedlean.runtime import progress
from fedlean.runtime.config import RunConfig, differences, read_config
from fedlean.runtime.flower.settings import server_settings
from fedlean.runtime.how import How
from fedlean.runtime.rounds import RunFailed
from fedlean.runtime.run import resume, start

FLEET = """\
devices = 6
present = 0.8
memory_bytes = { uniform = [0.1e6, 0.6e6] }
uplink_bytes_per_second = { choice = [1e5, 1e6], redrawn = "once" }
"""
ROUNDS = 6


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def untimed(folder: Path) -> list[dict[str, Any]]:
    entries = lines(folder)
    for entry in entries:
        for key in ("wall_seconds", "measured_seconds"):
            entry.pop(key), entry["total"].pop(key)
    return entries


@pytest.fixture(scope="module")
def there(tmp_path_factory) -> Path:
    """A folder with a fleet and its run on digits."""
    folder = tmp_path_factory.mktemp("fleet")
    (folder / "boards.toml").write_text(FLEET)
    options = ["--fleet", str(folder / "boards.toml"), "--rounds", str(ROUNDS), "--batch", "10"]
    cli.main(["run", "fedavg", *options, "--seed", "3", "--out", str(folder / "run")])
    return folder


def test_a_run_leaves_out_whom_the_fleet_gives_too_little(there):
    """The same devices are there, and left out, as the file says for seed and step."""
    fleet = load_fleet(there / "boards.toml", load_profile("raspberry_pi_4")).fleet
    entries = lines(there / "run")
    needs = {entry["peak_memory_bytes"] for entry in entries if entry["cohort"]}
    (needed,) = needs
    assert any(entry["left_out"] for entry in entries) and any(e["cohort"] for e in entries)
    for step, entry in enumerate(entries, start=1):
        devices = fleet.present(3, step, 6)
        has = {device.id: device.memory_bytes or 0 for device in devices}
        assert entry["cohort"] == [client for client in has if has[client] >= needed]
        assert entry["devices"] == len(devices) and entry["able_devices"] == len(entry["cohort"])
        assert entry["left_out"] == {
            str(client): f"needs {megabytes(needed)}, has {megabytes(has[client])}"
            for client in has
            if has[client] < needed
        }
        shares = [needed / has[client] for client in entry["cohort"]]
        assert entry["memory_utilisation"] == pytest.approx(sum(shares) / len(shares))
        assert 0 < entry["link_utilisation"] < 1


def test_the_summary_counts_them(there):
    summary = json.loads((there / "run" / "summary.json").read_text())
    entries = lines(there / "run")
    left = [client for entry in entries for client in entry["left_out"]]
    assert summary["left_out_tasks"] == len(left) > 0
    assert summary["left_out"] == {client: left.count(client) for client in left}
    assert summary["clients"] == 6  # as many as the fleet has devices
    assert summary["fleet"] == str(there / "boards.toml")
    for key in ("memory_utilisation", "link_utilisation"):
        mean = sum(entry[key] for entry in entries) / len(entries)
        assert summary[key] == pytest.approx(mean)


def test_the_page_says_who_was_left_out(there):
    page = (there / "run" / "report.html").read_text()
    summary = json.loads((there / "run" / "summary.json").read_text())
    assert f"{summary['left_out_tasks']} tasks of " in page
    assert "Tasks not sent, by client" in page and "boards.toml" in page
    assert "memory used, of what devices have" in page


def test_a_run_is_resumed_without_its_files_and_ends_bit_equal(there, tmp_path):
    (tmp_path / "boards.toml").write_text(FLEET)
    config = replace(read_config(there / "run"), fleet=str(tmp_path / "boards.toml"))

    class Killed(Exception):
        pass

    def killed(entry: dict[str, Any]) -> None:
        if len(lines(tmp_path / "run")) == 3:
            raise Killed

    with pytest.raises(Killed):
        start(config, tmp_path / "run", How(killed, checkpoint_seconds=0.0))
    (tmp_path / "boards.toml").unlink()
    resume(tmp_path / "run", How())
    assert len(lines(tmp_path / "run")) == len(lines(there / "run"))
    assert untimed(tmp_path / "run") == untimed(there / "run")
    ends = [(folder / "run" / "model.safetensors").read_bytes() for folder in (there, tmp_path)]
    assert ends[0] == ends[1]


def test_a_damaged_record_of_the_fleet_is_refused(there, tmp_path):
    shutil.copytree(there / "run", tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    document = json.loads(path.read_text())
    del document["fleet_content"]["texts"]
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="is damaged: fleet_content: KeyError"):
        resume(tmp_path / "run", How())


def test_another_number_of_clients_than_devices_is_refused_before_a_folder_is_made(there, tmp_path):
    config = RunConfig("fedavg", fleet=str(there / "boards.toml"), clients=4)
    with pytest.raises(ValueError, match="the fleet has 6 devices, the run has 4 clients"):
        start(config, tmp_path / "run", How())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["memory_bytes = 'x'", None])
def test_a_wrong_fleet_ends_in_one_line(tmp_path, capsys, text):
    path = tmp_path / "fleet.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", "fedavg", "--fleet", str(path), "--out", str(tmp_path / "run")])
    assert ended.value.code == 2
    message = "".join(capsys.readouterr().err.split())
    assert "expectedbytesfrom1" in message if text else "doesnotexist" in message
    assert not (tmp_path / "run").exists()


def test_a_fleet_in_which_nobody_can_train_ends_with_need_and_budget(tmp_path):
    (tmp_path / "small.toml").write_text("devices = 2\nmemory_bytes = { uniform = [1e4, 2e4] }\n")
    config = RunConfig("fedavg", fleet=str(tmp_path / "small.toml"), rounds=3)
    with pytest.raises(RunFailed, match=r"the smallest task needs 0\.\d{3} MB and the largest dev"):
        start(config, tmp_path / "run", How())
    entries = lines(tmp_path / "run")
    assert [entry["cohort"] for entry in entries] == [[]] * 10
    assert all(entry["notes"][0].startswith("nobody was asked") for entry in entries)
    assert [entry["total"]["simulated_seconds"] for entry in entries] == [0.0] * 10


# What names a fleet


def test_a_run_of_the_same_fleet_is_the_same_however_its_path_is_written(there, monkeypatch):
    written = read_config(there / "run")
    monkeypatch.chdir(there)
    assert differences(replace(written, fleet="boards.toml", clients=None), written) == []
    assert differences(replace(written, fleet="other.toml"), written) == ["fleet"]
    assert differences(replace(written, fleet=None), written) == ["fleet"]


def test_the_app_has_the_setting():
    flat = {"method": "fedavg", "out": "runs/a", "clients": 3}
    assert server_settings({**flat, "fleet": "boards.toml"}).config.fleet == "boards.toml"
    assert server_settings({**flat, "fleet": ""}).config.fleet is None


# What the terminal shows


def shown(*entries: dict[str, Any]) -> list[str]:
    text = StringIO()
    console = Console(file=text, force_terminal=True, width=500, color_system="standard")
    show = progress.with_refusals(lambda entry: None, console)
    whole = {"rejected": [], "refused": {}, "left_out": {}, "cohort": [1], "server_only": False}
    for round, entry in enumerate(entries, start=1):
        show({**whole, "asked_round": round, "notes": [], **entry})
    return text.getvalue().splitlines()


def test_who_is_left_out_is_said_once_in_colour():
    lines = shown(
        {},
        {"left_out": {"4": "needs 2.0 MB, has 1.0 MB", "5": "x"}},
        {"left_out": {"6": "y"}},
    )
    assert len(lines) == 1 and "\x1b[" in lines[0]
    assert "round 2: 2 left out" in lines[0] and "client 4 needs 2.0 MB, has 1.0 MB" in lines[0]


def test_every_step_that_asks_nobody_is_said_in_colour_and_the_servers_own_is_not():
    nobody = {"cohort": [], "notes": ["nobody was asked: no device is there"]}
    lines = shown(nobody, {"cohort": [], "server_only": True}, nobody)
    assert len(lines) == 2 and all("\x1b[" in line for line in lines)
    assert "round 3: nobody was asked: no device is there" in lines[1]
    again = {**nobody, "asked_round": 7}  # asked again and again
    other = {**again, "notes": ["nobody was asked: no task fits its device"]}
    lines = shown(again, again, again, other, again)
    assert [line.count("no task fits") for line in lines] == [0, 1, 0]


@pytest.mark.parametrize(
    ("stage", "phase", "said"),
    [
        (None, "train", "fedavg round 10/10  accuracy"),
        ("stage2", "train", "fedavg round 10/10  stage2  accuracy"),
        ("stage2", "shrink", "fedavg round 10/10  shrink stage2  accuracy"),
        ("[red]\x1b[31m", "train", r"fedavg round 10/10  [red]\x1b[31m  accuracy"),
    ],
)
def test_lines_name_the_stage(stage: str | None, phase: str, said: str):
    text = StringIO()
    console = Console(file=text, width=500)
    entry = {"round": 10, "stage": stage, "phase": phase, "accuracy": 0.5, "density": 1.0}
    total = {"downlink_bytes": 1, "uplink_bytes": 1, "simulated_seconds": 2.0}
    show = progress._plain(RunConfig(method="fedavg", rounds=10), console)
    show({**entry, "metrics": {}, "total": total})
    assert text.getvalue().startswith(said)
