"""The command line against values and functions that make no sense: one line, nothing written."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from fedlean import cli
from fedlean.algorithm import Server
from fedlean.cost.profile import load_profile
from fedlean.engine.open import open_engine
from fedlean.models import catalog
from fedlean.runtime import method as methods

HUGE = ["2147483649", "9" * 30, "9" * 5000, "-1", "0"]
ODD = ["nan", "inf", "-inf", "1e400", "-1"]
WHOLE = ("clients", "cohort", "rounds", "local-steps", "batch", "threads", "eval-every")
MEASURED = ("batch", "local-steps", "threads", "repeats", "classes", "input-shape")


@pytest.fixture
def refuses(capsys, tmp_path, monkeypatch):
    """A command that must end with exit code 2 and one line that is printable; gives the line."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main(list(arguments))
        said = capsys.readouterr().err
        assert stopped.value.code == 2
        assert said.startswith("fedlean: ") and said.count("\n") == 1 and said[:-1].isprintable()
        assert len(said) < 600
        assert not list(tmp_path.rglob("config.json"))
        return said

    return run


@pytest.mark.parametrize("value", HUGE, ids=range(len(HUGE)))
@pytest.mark.parametrize("option", [*WHOLE, "eval-examples"])
def test_counts(refuses, option, value):
    said = refuses("run", "fedavg", "--rounds=1", f"--{option}={value}")
    assert option.split("-")[0] in said


def test_seeds(refuses):
    assert "seed must be from -9223372036854775807" in refuses(
        "run", "fedavg", "--seed=" + "9" * 20
    )


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("option", ["lr", "max-update-norm", "target-accuracy"])
def test_numbers(refuses, option, value):
    assert option.split("-")[0] in refuses("run", "fedavg", f"--{option}={value}")


@pytest.mark.parametrize("value", HUGE, ids=range(len(HUGE)))
@pytest.mark.parametrize("option", MEASURED)
def test_counts_of_a_profile(refuses, option, value):
    said = refuses("profile", "--model=lenet300", f"--{option}={value}")
    assert option.split("-")[0] in said


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("option", ["seconds", "densities"])
def test_numbers_of_a_profile(refuses, option, value):
    assert option in refuses("profile", "--model=lenet300", f"--{option}={value}")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["os:system"], "method 'os:system' failed when it was called: TypeError"),
        (["sys:exit"], "method 'sys:exit' failed when it was called: SystemExit"),
        (["pprint:pformat"], "method 'pprint:pformat' must return a FederatedAlgorithm, got str"),
        (["builtins:dict"], "expected a method, a function (server, *, settings)"),
        (["os:sep"], "method 'os:sep' must be a function, got str"),
        (["..:x"], "method '..:x' cannot be imported, expected package.module:function"),
        (["fedavg", "--model=os:system"], "model 'os:system' needs command, but is called with"),
        (["fedavg", "--model=operator:eq"], "returns must be a ModelSpec, a Model"),
        (["fedavg", "--model=:"], "model ':' cannot be imported"),
        (["fedavg", "--model=broken:f"], "model 'broken:f' cannot be imported"),
        (["fedavg", "--model=leaves:f"], "model 'leaves:f' cannot be imported"),
        (["fedavg", "--model=os:a\x1b[31m\u202e"], "'os:a\\x1b[31m\\u202e'"),
    ],
)
def test_functions_that_are_no_method_or_model(refuses, tmp_path, monkeypatch, arguments, said):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit('bye')\n")
    assert said in refuses("run", *arguments)


@pytest.mark.parametrize("name", sorted(methods.available()))
def test_no_setting_of_another_type_reaches_a_method(name):
    """As a folder's `config.json` may have it; and no number that is none."""
    spec = catalog.build("lenet300", (1, 8, 8), 10)
    server = Server(spec, open_engine("torch", 1), 0, 5, load_profile("raspberry_pi_4"))
    method = methods.find_method(name)
    for key, parameter in inspect.signature(method).parameters.items():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        for odd in ([], {}, "\x1b", float("nan"), -(10**30), 10**30):
            with pytest.raises(ValueError, match=key) as error:
                methods.build(name, server, {key: odd})  # pyright: ignore[reportArgumentType]
            assert "\n" not in str(error.value) and str(error.value).isprintable()


def test_what_is_printed_of_a_folders_name(tmp_path: Path, refuses):
    said = refuses("resume", str(tmp_path / "a\x1b[2J\x07"))
    assert "a\\x1b[2J\\x07 holds no run" in said
