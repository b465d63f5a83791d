"""A run folder is data: what it names runs only where its user says so."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from fedlean import cli
from fedlean.report.page import comparison_page
from fedlean.report.run_folder import read_run
from fedlean.runtime.config import RunConfig, differences, read_config
from fedlean.runtime.how import How
from fedlean.runtime.run import resume
from fedlean.runtime.start import first_model
from fedlean.runtime.trust import Named, read_trusted, resume_command
from fedlean.spec import ModelSpec

QUICK = ["--clients", "2", "--rounds", "1", "--local-steps", "1", "--batch", "4"]
MODULE = """
from pathlib import Path
from fedlean.methods.snip import snip
from fedlean.models.lenet300 import lenet300
Path({log!r}).write_text("imported")
def model(input_shape, classes):
    return lenet300(input_shape, classes)
def method(server, **settings):
    raise ValueError("called")
"""


class Code:
    """A module of somebody's that leaves a trace when it is imported."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "log"
        (folder / "somebodys.py").write_text(MODULE.format(log=str(self._log)))

    def ran(self) -> bool:
        return self._log.exists()


@pytest.fixture
def code(tmp_path, monkeypatch) -> Code:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "somebodys", raising=False)
    return Code(tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trust") / "run"
    cli.main(["run", "snip", *QUICK, "--set", "density=0.5", "--out", str(folder)])
    return folder


def names(finished: Path, folder: Path, **changes: str) -> Path:
    """A copy of a finished run whose configuration names something else."""
    shutil.copytree(finished, folder)
    document = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(document))
    return folder


@pytest.fixture
def foreign(finished, tmp_path, code) -> Path:
    return names(finished, tmp_path / "their run", model="somebodys:model")


def refused(capsys, *arguments: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    return said


def test_the_code_of_a_folder_is_neither_imported_nor_called(foreign, code, capsys):
    said = refused(capsys, "resume", str(foreign))
    assert not code.ran()
    assert "would import and call somebodys:model (its model)" in said
    assert f"fedlean resume '{foreign}' --model somebodys:model (or --trust)" in said
    with pytest.raises(ValueError, match="would import and call"):
        resume(foreign, How())
    assert not code.ran()


@pytest.mark.parametrize("allowed", [["--model", "somebodys:model"], ["--trust"]])
def test_it_runs_where_the_user_names_it_or_trusts_the_folder(foreign, code, allowed):
    cli.main(["resume", str(foreign), *allowed])
    assert code.ran()


@pytest.mark.parametrize(
    ("option", "name"),
    [("--model", "somebodys:other"), ("--model", "lenet300"), ("--method", "snip2")],
)
def test_another_name_than_the_folders_is_refused(foreign, code, capsys, option, name):
    said = refused(capsys, "resume", str(foreign), option, name, "--trust")
    assert f"{option} {name} is not what the run in {foreign} has" in said
    assert not code.ran()


def test_a_method_of_the_folders(finished, tmp_path, code, capsys):
    both = names(finished, tmp_path / "run", method="somebodys:method", model="os:system")
    said = refused(capsys, "resume", str(both), "--model", "os:system")
    assert "import and call somebodys:method (its method) on" in said and not code.ran()
    said = refused(capsys, "resume", str(both))
    assert "somebodys:method (its method) and os:system (its model)" in said and not code.ran()
    assert "--method somebodys:method --model os:system" in said


def test_what_is_built_in_needs_no_word(finished, tmp_path):
    folder = names(finished, tmp_path / "run")
    cli.main(["resume", str(folder)])
    cli.main(["resume", str(folder), "--method", "snip", "--model", "lenet300"])


def test_reading_and_comparing_import_nothing(foreign, finished, code, capsys, tmp_path):
    odd = names(finished, tmp_path / "odd", method="somebodys:method")
    comparison_page([read_run(foreign), read_run(odd)])
    cli.main(["compare", str(foreign), str(odd), "--out", str(tmp_path / "compare.html")])
    spec = ModelSpec.from_json(json.dumps(json.loads((odd / "config.json").read_text())["spec"]))
    first_model(RunConfig("fedavg", start=str(odd)), spec)
    config = read_config(odd)
    assert differences(RunConfig(method="fedavg"), config) == ["method"]
    assert not code.ran()


def test_named_in_a_program_it_is_the_same(foreign, code):
    config, _ = read_trusted(foreign, Named(model="somebodys:model"))
    assert config.model == "somebodys:model" and not code.ran()
    with pytest.raises(ValueError, match=r"--method fedavg is not what the run in .* has, snip"):
        read_trusted(foreign, Named(method="fedavg", model="somebodys:model"))


def test_the_command_that_goes_on_names_it(tmp_path):
    config = RunConfig(method="fedavg", model="my.models:net")
    assert resume_command(Path("runs/a b"), config) == (
        "fedlean resume 'runs/a b' --model my.models:net"
    )
    assert resume_command(Path("runs/a"), RunConfig(method="fedavg")) == "fedlean resume runs/a"


def test_a_name_that_would_move_the_cursor_is_spelled_out(finished, tmp_path, capsys):
    folder = names(finished, tmp_path / "run", model="os:\x1b[2Jsystem")
    assert "os:\\x1b[2Jsystem" in refused(capsys, "resume", str(folder))
