"""The project of `fedlean app new`, and what its run configuration may say."""

from __future__ import annotations

import tomllib
from importlib.util import find_spec

import pytest

from fedlean import cli
from fedlean.runtime.flower.project import FILES, write_project
from fedlean.runtime.flower.settings import KNOWN, server_settings

FLAT = {"method": "fedavg", "out": "runs/x"}


def test_files_are_whole_and_the_configuration_is_valid(tmp_path):
    folder = tmp_path / "app"
    cli.main(["app", "new", str(folder)])
    assert all((folder / name).stat().st_size > 40 for name in FILES)
    document = tomllib.loads((folder / "pyproject.toml").read_text())
    flat = document["tool"]["flwr"]["app"]["config"]
    settings = server_settings(flat)
    assert (
        settings.config.method == "prunefl" and settings.config.settings["reconfigure_every"] == 20
    )
    assert settings.terms.min_clients == settings.config.clients == 2
    assert set(flat) == KNOWN, "flwr run -c overrides only what stands there"
    components = document["tool"]["flwr"]["app"]["components"]
    assert components["serverapp"] == "fedlean_app.server_app:app"


@pytest.mark.skipif(find_spec("flwr") is None, reason="flwr is not installed")
def test_its_apps_can_be_imported(tmp_path, monkeypatch):
    import subprocess
    import sys

    write_project(tmp_path / "app")
    code = "import fedlean_app.server_app as s, fedlean_app.client_app as c; print(s.app, c.app)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "app", capture_output=True, text=True
    )
    assert "ServerApp" in done.stdout and "ClientApp" in done.stdout, done.stderr


def test_a_folder_with_something_in_it_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["app", "new", str(tmp_path)])
    assert stopped.value.code == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_everything_that_can_be_said():
    flat = {
        **FLAT,
        "settings": "lr=0.5 local_steps=3",
        "dataset": "digits",
        "partition": "dirichlet:0.5",
        "clients": 7,
        "rounds": 9,
        "target-accuracy": "0.9 0.95",
        "eval-every": 2,
        "eval-examples": 100,
        "max-update-norm": 5,
        "deadline-seconds": 12,
        "min-replies": 3,
        "min-clients": 4,
        "join-seconds": 1.5,
    }
    got = server_settings(flat)
    assert dict(got.config.settings) == {"lr": 0.5, "local_steps": 3}
    assert got.config.target_accuracy == (0.9, 0.95)
    assert (got.config.clients, got.config.rounds, got.config.eval_every) == (7, 9, 2)
    assert (got.config.eval_examples, got.config.max_update_norm) == (100, 5.0)
    terms = got.terms
    assert (terms.deadline_seconds, terms.min_replies, terms.min_clients) == (12.0, 3, 4)
    assert terms.join_seconds == 1.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methd": "x"}, "no key 'methd'; nearest: method"),
        ({"out": ""}, "'method' and 'out'"),
        ({"method": "fedavgg"}, "nearest: fedavg"),
        ({"settings": "lrr=1"}, "no hyper-parameter 'lrr'"),
        ({"rounds": "many"}, "rounds must be a whole number, got 'many'"),
        ({"min-replies": 0}, "min_replies must be at least 1"),
        ({"min-replies": 1.5}, "min-replies must be a whole number"),
        ({"deadline-seconds": "soon"}, "deadline-seconds must be a number"),
        ({"join-seconds": -1}, "join_seconds must be a positive number"),
        ({"target-accuracy": "high"}, "target-accuracy must be numbers"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        server_settings({**FLAT, **change})
