"""The command line: one clear line for whatever is wrong, and nothing written."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cyclopts import App
from safetensors.numpy import load_file

import fedlean
from fedlean import cli
from fedlean.cost import profile
from fedlean.data.load import available
from fedlean.models import catalog
from fedlean.runtime import method as methods
from fedlean.runtime.lock import hold

QUICK = ["--clients", "2", "--rounds", "1", "--local-steps", "1", "--batch", "4"]
Fails = Callable[..., str]


@pytest.fixture
def fails(capsys) -> Fails:
    """Runs a command line that must end with exit code 2 and one line; gives the line."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main(list(arguments))
        out, err = capsys.readouterr()
        assert stopped.value.code == 2
        assert "Traceback" not in err
        assert err.startswith("fedlean: ") and err.endswith("\n") and err.count("\n") == 1, err
        assert not out
        return err

    return run


@pytest.fixture
def refuses(fails, tmp_path, monkeypatch) -> Fails:
    """`fails` for `run`: adds --out, and checks that nothing at all was written."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def run(*arguments: str) -> str:
        line = fails("run", *arguments, "--out", "result")
        assert not list(work.iterdir())
        return line

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    cli.main(["run", "fedavg", *QUICK, "--out", str(folder)])
    return folder


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copied"))


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def listed(capsys, command: str) -> list[str]:
    capsys.readouterr()
    cli.main([command])
    out, err = capsys.readouterr()
    assert not err
    return out.splitlines()


# What there is


@pytest.mark.parametrize(
    ("command", "what"),
    [
        ("methods", methods.available),
        ("devices", profile.available),
    ],
)
def test_lists_one_line_each(capsys, command, what):
    lines, entries = listed(capsys, command), what()
    assert len(lines) == len(entries) > 1
    for line, (name, text) in zip(lines, entries.items(), strict=True):
        assert line.split()[0] == name
        assert line.rstrip().endswith(text)


def test_models_lists_one_line_each_with_the_options_of_each(capsys):
    found, entries = listed(capsys, "models"), catalog.available()
    assert [line.split()[0] for line in found] == list(entries)
    lines = dict(zip(entries, found, strict=True))
    assert all(entries[name] in line for name, line in lines.items())
    assert lines["lenet300"].endswith(entries["lenet300"])
    assert lines["vgg16"].endswith(" [,width=64]") and lines["conv2"].endswith(" [,width=32]")
    assert lines["resnet20"].endswith(" [,norm=group|batch,blocks=stage|unit]")
    assert lines["resnet18"].endswith(" [,norm=group|batch,blocks=stage|unit,width=64]")


def test_datasets_lists_every_form_one_line_each(capsys):
    lines = listed(capsys, "datasets")
    assert lines[0].startswith("digits ")
    for form in ("IDX", "LEAF", ".npz", "FOLDER:NAME"):
        assert any(form in line for line in lines), form
    assert len(lines) == len(available())


@pytest.mark.parametrize("arguments", [[], ["--help"], ["run", "--help"], ["resume", "--help"]])
def test_help(capsys, arguments):
    try:
        cli.main(arguments)
    except SystemExit as stopped:
        assert not stopped.code
    out, err = capsys.readouterr()
    assert "Usage" in out and not err


OPTIONS = [  # of `fedlean run`
    "batch",
    "clients",
    "cohort",
    "dataset",
    "deviation",
    "device",
    "engine",
    "eval-every",
    "eval-examples",
    "fleet",
    "init",
    "inputs",
    "label",
    "layout",
    "length",
    "local-steps",
    "log",
    "lr",
    "max-update-norm",
    "mean",
    "model",
    "out",
    "partition",
    "personalize",
    "rounds",
    "seed",
    "set",
    "start",
    "start-weights",
    "target-accuracy",
    "test-share",
    "threads",
]


def test_help_names_every_option(capsys):
    try:
        cli.main(["run", "--help"])
    except SystemExit as stopped:
        assert not stopped.code
    shown = re.findall(r"^\W*--([a-z-]+) ", capsys.readouterr().out, re.MULTILINE)
    assert sorted(shown) == OPTIONS, "scripts rely on these: docs and CHANGELOG say what changes"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_says_what_the_command_s_docstring_says(name):
    place, purpose = cli.COMMANDS[name]
    module, attribute = place.split(":")
    found = getattr(importlib.import_module(f"fedlean.cli.{module}"), attribute)
    said = found.help if isinstance(found, App) else (found.__doc__ or "").split("\n\n")[0]
    assert " ".join(said.split()) == purpose


def test_a_command_loads_what_it_needs():
    """Help and version no arrays; a run no measurement."""
    code = (
        "import sys; from fedlean import cli\n"
        "cli.main(['--help']); assert 'numpy' not in sys.modules\n"
        "try: cli.main(['run', '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'fedlean.runtime.run' in sys.modules and 'fedlean.measure' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_an_error_of_ours_is_no_bad_input(monkeypatch):
    """It keeps its traceback, which a run that cannot go on has not."""

    def broken():
        raise RuntimeError("a bug")

    monkeypatch.setattr("fedlean.cli.app", lambda *arguments, **settings: broken())
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main([])


def test_exit_codes_of_the_process(tmp_path):
    def code(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "fedlean.cli", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        return done.returncode, done.stderr

    assert code("--help") == (0, "")
    assert code("methods") == (0, "")
    status, said = code("run", "prunfl")
    assert status == 2 and said.count("\n") == 1 and "prunefl" in said
    assert not list(tmp_path.iterdir())


def test_version(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out.strip() == fedlean.__version__


# Names


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["prunfl"], ("'prunfl'", "prunefl")),
        (["nosuch.module:method"], ("nosuch.module:method",)),
        (["fedavg", "--model", "lenet30"], ("'lenet30'", "lenet300")),
        (["fedavg", "--model", "resnet"], ("'resnet'", "resnet8")),
        (["fedavg", "--partition", "dirichlett:0.5"], ("dirichlett", "dirichlet:A")),
        (["fedavg", "--partition", "dirichlet"], ("dirichlet:A",)),
        (["fedavg", "--partition", "dirichlet:-1"], ("'-1'",)),
        (["fedavg", "--partition", "natural"], ("client ids", "iid")),
        (["fedavg", "--partition", "shards:1000"], ("1000 shards",)),
        (["prunefl", "--set", "size_limt=0.5"], ("size_limt", "size_limit")),
        (["fedavg", "--set", "local_step=5"], ("local_step", "local_steps")),
        (["fedavg", "--set", "local_steps"], ("key=value",)),
        (["fedavg", "--engine", "torhc"], ("'torhc'", "torch")),
        (["fedavg", "--device", "raspbery"], ("'raspbery'", "raspberry_pi_4")),
        (["fedavg", "--device", "nosuch.json"], ("nosuch.json",)),
        (["fedavg", "--dataset", "digit"], ("'digit'", "digits")),
        (["fedavg", "--dataset", "no/such/folder"], ("no/such/folder", "no such folder")),
        (["fedavg", "--round", "3"], ("--round",)),
        (["fedavg", "extra"], ("extra",)),
        ([], ("METHOD",)),
    ],
)
def test_unknown_names(refuses, arguments, said):
    line = refuses(*arguments)
    assert all(part in line for part in said), line


def test_unknown_command(fails):
    assert "rum" in fails("rum", "fedavg")


# Engines


@pytest.fixture
def no_native(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "fedlean.engine.native", None)


@pytest.fixture
def no_torch(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "fedlean.engine.torch", None)


@pytest.fixture
def wide_pool(tmp_path, monkeypatch) -> str:
    """A model with a layer that the native engine lacks."""
    (tmp_path / "model_of_a_test.py").write_text(WIDE_POOL)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "model_of_a_test", raising=False)
    return "model_of_a_test:wide_pool"


WIDE_POOL = """
from fedlean.layers import Flatten, Linear, MaxPool2d
from fedlean.spec import sequential


def wide_pool(input_shape, classes):
    pool = MaxPool2d(17, stride=1, padding=8)
    return sequential(
        input_shape, [("wide", pool), ("flat", Flatten()), ("fc", Linear(classes))]
    )
"""


def run_and_read(folder: Path, capsys, *arguments: str) -> tuple[dict, dict, str]:
    """(config, summary, standard error)"""
    capsys.readouterr()
    cli.main(["run", "fedavg", *QUICK, *arguments, "--out", str(folder)])
    config, summary = (
        json.loads((folder / name).read_text()) for name in ("config.json", "summary.json")
    )
    return config, summary, capsys.readouterr().err


@pytest.mark.usefixtures("no_torch")
def test_native_is_the_default_and_needs_no_torch(tmp_path, capsys):
    config, summary, said = run_and_read(tmp_path / "run", capsys)
    assert (config["engine"], summary["engine"], summary["arithmetic"]) == (
        "native",
        "native",
        "sparse",
    )
    assert config["environment"]["engine"] == "native" and "engine" not in said


@pytest.mark.usefixtures("no_native")
def test_torch_serves_where_native_is_missing(tmp_path, capsys):
    config, summary, said = run_and_read(tmp_path / "run", capsys)
    assert (config["engine"], summary["engine"], summary["arithmetic"]) == (
        "torch",
        "torch",
        "masked",
    )
    (line,) = [line for line in said.splitlines() if "engine" in line]
    assert "torch" in line and "native engine is not installed" in line and "compiler" in line


def test_torch_serves_where_native_lacks_a_layer(tmp_path, capsys, wide_pool):
    config, _, said = run_and_read(tmp_path / "run", capsys, "--model", wide_pool)
    assert config["engine"] == "torch"
    (line,) = [line for line in said.splitlines() if "engine" in line]
    assert "'wide' (MaxPool2d)" in line and "torch" in line


def test_a_named_engine_is_taken_or_refused(tmp_path, capsys, refuses, wide_pool, monkeypatch):
    config, _, said = run_and_read(tmp_path / "run", capsys, "--engine", "torch")
    assert config["engine"] == "torch" and "engine" not in said
    line = refuses("fedavg", "--engine", "native", "--model", wide_pool)
    assert "'wide' (MaxPool2d)" in line and "--engine torch" in line
    monkeypatch.setitem(sys.modules, "fedlean.engine.native", None)
    assert "not installed" in refuses("fedavg", "--engine", "native")


@pytest.mark.usefixtures("no_native", "no_torch")
def test_without_any_engine_one_line_says_what_to_install(refuses):
    line = refuses("fedavg")
    assert "C++17" in line and "fedlean[torch]" in line


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_resume_keeps_the_engine(tmp_path, capsys, engine):
    """Both are there, and the run goes on with the one that it began with."""
    folder = tmp_path / "run"
    run_and_read(folder, capsys, "--engine", engine)
    (folder / "summary.json").unlink()
    cli.main(["resume", str(folder)])
    assert json.loads((folder / "summary.json").read_text())["engine"] == engine
    assert "other versions" not in capsys.readouterr().err


def test_resume_does_not_change_to_another_engine(tmp_path, capsys, fails, monkeypatch):
    folder = tmp_path / "run"
    run_and_read(folder, capsys)
    monkeypatch.setitem(sys.modules, "fedlean.engine.native", None)
    assert "native engine is not installed" in fails("resume", str(folder))


# Found at the start


BATCH_NORM = """
from fedlean.layers import BatchNorm, Conv2d, Flatten, Linear
from fedlean.spec import sequential


def few(input_shape, classes):
    return sequential(input_shape, [("flat", Flatten()), ("fc", Linear(5))])


def many(input_shape, classes):
    return sequential(input_shape, [("flat", Flatten()), ("fc", Linear(12))])


def image(input_shape, classes):
    return sequential(input_shape, [("conv", Conv2d(classes, 3))])


def other_shape(input_shape, classes):
    return sequential((1, 9, 9), [("flat", Flatten()), ("fc", Linear(classes))])


def normed(input_shape, classes):
    layers = [("flat", Flatten()), ("fc", Linear(8)), ("bn", BatchNorm()), ("out", Linear(classes))]
    return sequential(input_shape, layers)
"""


@pytest.fixture
def own_models(tmp_path, monkeypatch) -> str:
    (tmp_path / "models_of_a_test.py").write_text(BATCH_NORM)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "models_of_a_test", raising=False)
    return "models_of_a_test"


@pytest.mark.parametrize(
    ("model", "more", "said"),
    [
        ("few", [], "has 5 outputs ('fc'), 'digits' has 10 classes (0, 1, 2, 3, 4, 5"),
        ("image", [], "ends in 'conv' of shape (10, 6, 6), but a loss needs one number per class"),
        ("other_shape", [], "takes inputs of shape (1, 9, 9), the examples of 'digits' are (1, 8"),
        ("normed", ["--batch", "1"], "BatchNorm 'bn' needs 2 values per channel to train: use a"),
    ],
)
@pytest.mark.parametrize("method", ["fedavg", "prunefl", "snip"])
def test_what_does_not_go_together_is_refused_at_the_start(
    refuses, own_models, method, model, more, said
):
    assert said in refuses(method, "--model", f"{own_models}:{model}", *more)


def test_the_corrected_command_may_use_the_same_folder(tmp_path, capsys, fails, own_models):
    folder = tmp_path / "deep" / "run"
    fails("run", "fedavg", "--model", f"{own_models}:few", "--out", str(folder))
    assert not folder.parent.exists()
    run_and_read(folder, capsys, "--model", f"{own_models}:normed")


def test_idle_outputs_are_said(tmp_path, capsys, own_models):
    config, _, said = run_and_read(tmp_path / "run", capsys, "--model", f"{own_models}:many")
    assert "the model has 12 outputs for 10 classes" in said and len(config["notes"]) == 1


def test_a_folder_that_cannot_be_written_is_found_before_the_data_is_read(fails, tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    assert "file" in fails("run", "fedavg", "--out", str(tmp_path / "file" / "run"))
    assert "/proc" in fails("run", "fedavg", "--dataset", "nowhere", "--out", "/proc/nothing/run")


# Said, not swallowed


def test_a_run_that_diverges_says_so_at_once_and_ends(fails, tmp_path, capsys):
    folder = tmp_path / "run"
    with pytest.raises(SystemExit) as stopped:
        cli.main(["run", "fedavg", "--lr", "50", "--rounds", "50", "--out", str(folder)])
    said = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    refused = [line for line in said if "10 of 10 updates refused" in line]
    assert len(refused) == 3 and all("try a lower --lr" in line for line in refused)
    assert "every update was refused 3 times in a row" in said[-1]
    assert said[-1].endswith("try a lower --lr")
    page = (folder / "report.html").read_text()
    assert "30 updates of 10 clients refused; the first, of client 0: round 1: is suspected" in page
    assert "every update was refused 3 times in a row" in page


def test_layers_without_a_kept_weight_are_named(tmp_path, capsys):
    folder = tmp_path / "run"
    sparse = ["--set", "density=0.0002", "--rounds", "3"]
    cli.main(["run", "snip", "--clients", "2", *sparse, "--out", str(folder)])
    said = capsys.readouterr().err
    assert said.count("no weight of fc") == 1 and "choose a higher density" in said
    assert "no weight of fc" in (folder / "report.html").read_text()


# Paths


def test_paths_are_stored_absolute_and_tildes_expanded(tmp_path, capsys, fails, mnist, monkeypatch):
    """From another folder, and when the data has moved."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(mnist.parent)
    folder = tmp_path / "run"
    cli.main(["run", "fedavg", *QUICK, f"--dataset={mnist.name}", "--out=~/run"])
    config = json.loads((folder / "config.json").read_text())
    assert config["dataset"] == str(mnist.resolve())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    cli.main(["resume", "~/run"])
    mnist.rename(tmp_path / "moved")
    line = fails("resume", "~/run")
    assert str(mnist) in line and "fedlean resume" in line and "--dataset FOLDER" in line
    cli.main(["resume", "~/run", "--dataset=~/moved"])
    again = json.loads((folder / "config.json").read_text())
    assert again == {**config, "dataset": str(tmp_path / "moved")}
    assert "continuing after step 1" in capsys.readouterr().err


def test_a_folder_that_another_process_writes_is_left_alone(copied, fails):
    before = content(copied)
    with hold(copied, print):
        locked = content(copied)
        for command in (["resume"], ["run", "fedavg", "--out"]):
            line = fails(*command, str(copied))
            assert f"is being written by fedlean, process {os.getpid()} on" in line
        assert content(copied) == locked
    assert content(copied) == before


def test_one_setting_has_one_door(refuses):
    line = refuses("fedavg", "--lr", "0.2", "--set", "lr=0.05")
    assert "one setting: give it once" in line
    assert "--lr" in refuses("fedavg", "--lr", "0.2", "--lr", "0.1")
    assert "given twice" in refuses("fedavg", "--set", "momentum=0", "--set", "momentum=0.9")
    line = refuses("fedavg", "--set", "warmup_client=1")
    assert "warmup_client has no effect on fedavg, since warmup_steps is 0" in line


# Values


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rounds", "0"], "rounds"),
        (["--rounds", "-3"], "rounds"),
        (["--rounds", "many"], "many"),
        (["--clients", "0"], "clients"),
        (["--clients", "5000"], "5000"),
        (["--cohort", "11"], "11"),
        (["--cohort", "0"], "cohort"),
        (["--set", "cohort=11"], "11"),
        (["--lr", "0"], "lr"),
        (["--lr", "-1"], "lr"),
        (["--lr", "nan"], "lr"),
        (["--lr", "inf"], "lr"),
        (["--lr", "fast"], "fast"),
        (["--local-steps", "0"], "local_steps"),
        (["--batch", "0"], "batch_size"),
        (["--threads", "0"], "threads"),
        (["--eval-every", "0"], "eval_every"),
        (["--eval-examples", "0"], "eval_examples"),
        (["--target-accuracy", "1.2"], "1.2"),
        (["--target-accuracy", "0"], "target accuracy"),
        (["--target-accuracy", "nan"], "nan"),
        (["--target-accuracy", "0.5", "80%"], "80%"),
        (["--set", "momentum=1.5"], "momentum"),
        (["--set", "loss=mse"], "ce, bce"),
        (["--set", "lr_half_life_rounds=-1"], "lr_half_life_rounds"),
        (["--set", "lr_half_life_rounds=nan"], "lr_half_life_rounds"),
    ],
)
@pytest.mark.parametrize("method", ["fedavg", "prunefl"])
def test_values_out_of_range(refuses, method, arguments, said):
    assert said in refuses(method, *arguments)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("size_limit=1.5", "(0, 1]"),
        ("size_limit=0", "size_limit"),
        ("size_limit=nan", "size_limit"),
        ("size_limit=half", "number"),
        ("size_target=0.5", "size_limit"),
        ("prunable_fraction=-0.1", "prunable_fraction"),
        ("initial_pruning=maybe", "true or false"),
        ("initial_client=10", "initial_client"),
        ("initial_examples=-1", "initial_examples"),
        ("time_model=quadratic", "linear, device"),
        ("reconfigure_every=-1", "reconfigure_every"),
        ("readd_scale=nan", "readd_scale"),
    ],
)
def test_prunefl_settings_out_of_range(refuses, setting, said):
    assert said in refuses("prunefl", "--set", setting)


# Data


def idx(array: np.ndarray) -> bytes:
    head = struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape)
    return head + array.tobytes()


@pytest.fixture
def mnist(tmp_path) -> Path:
    folder = tmp_path / "mnist"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for part, count in (("train", 20), ("t10k", 8)):
        images = rng.integers(0, 256, (count, 8, 8), np.uint8)
        labels = (np.arange(count) % 4).astype(np.uint8)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    return folder


def test_a_folder_of_idx_files_runs(mnist, tmp_path):
    cli.main(["run", "fedavg", *QUICK, "--dataset", str(mnist), "--out", str(tmp_path / "run")])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["dataset"] == str(mnist)


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
@pytest.mark.parametrize("left", [0, 3, 11, -1])
def test_truncated_idx(refuses, mnist, name, left):
    path = mnist / name
    path.write_bytes(path.read_bytes()[:left])
    assert name in refuses("fedavg", "--dataset", str(mnist))


def test_missing_idx(refuses, mnist):
    (mnist / "train-labels-idx1-ubyte").unlink()
    assert "train-labels" in refuses("fedavg", "--dataset", str(mnist))


def test_a_test_label_that_training_lacks_is_a_class_and_said(tmp_path, capsys, mnist):
    labels = np.array([0, 1, 2, 3, 0, 1, 2, 9], np.uint8)
    (mnist / "t10k-labels-idx1-ubyte").write_bytes(idx(labels))
    config, _, said = run_and_read(tmp_path / "run", capsys, "--dataset", str(mnist))
    line = "no training example has the class 4, 5, 6 and 3 more: it cannot be learnt"
    assert line in said.splitlines() and line in config["notes"]
    assert config["data"]["class_names"] == list("0123456789")
    assert line in (tmp_path / "run" / "report.html").read_text()


def test_an_empty_folder(refuses, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "IDX" in refuses("fedavg", "--dataset", str(tmp_path / "empty"))


def test_a_file_as_data_set(refuses, tmp_path):
    (tmp_path / "data.bin").write_bytes(b"x")
    assert "is a file" in refuses("fedavg", "--dataset", str(tmp_path / "data.bin"))


def test_a_model_that_does_not_take_the_data(refuses):
    assert "larger images" in refuses("fedavg", "--model", "vgg11")


def test_a_damaged_device_profile(refuses, tmp_path):
    path = tmp_path / "board.json"
    for text in ("{", "[]", '{"name": "board"}'):
        path.write_text(text)
        assert "board.json" in refuses("fedavg", "--device", str(path))


# Where it goes


def test_out_already_holds_a_run(fails, copied):
    before = content(copied)
    line = fails("run", "fedavg", *QUICK, "--out", str(copied))
    assert "already holds a run" in line and f"fedlean resume {copied}" in line
    assert content(copied) == before


def test_out_holds_something_else(fails, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert str(tmp_path) in fails("run", "fedavg", *QUICK, "--out", str(tmp_path))
    assert content(tmp_path) == {"notes.txt": b"mine"}


def test_out_is_a_file(fails, tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    line = fails("run", "fedavg", *QUICK, "--out", str(path))
    assert str(path) in line and "resume" not in line  # there is nothing to resume
    assert content(tmp_path) == {"file": b"mine"}


def test_out_below_a_file(fails, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "file" in fails("run", "fedavg", *QUICK, "--out", str(tmp_path / "file" / "run"))
    assert content(tmp_path) == {"file": b"mine"}


def test_out_may_be_an_empty_folder(tmp_path):
    cli.main(["run", "fedavg", *QUICK, "--out", str(tmp_path)])
    assert (tmp_path / "summary.json").is_file()


def test_default_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli.main(["run", "fedavg", *QUICK, "--seed", "3"])
    assert (tmp_path / "runs" / "fedavg-digits-lenet300-s3" / "summary.json").is_file()


def test_a_folder_name_is_shown_as_it_is(tmp_path, capsys):
    """No markup, and on one line however long, so that it can be copied."""
    folder = tmp_path / ("long" * 30) / "[bold]run[/x]:smile:"
    cli.main(["run", "fedavg", *QUICK, "--out", str(folder)])
    assert f"report: {folder / 'report.html'}\n" in capsys.readouterr().out


# Resume and compare


@pytest.mark.parametrize("name", ["absent", "."])
def test_resume_of_a_folder_without_a_run(fails, tmp_path, name):
    assert "holds no run" in fails("resume", str(tmp_path / name))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "damaged", [b"", b"{", b"[]", b"3", b"null", b'"text"', b"\xff\xfe", b"{}", b'{"format": 1}']
)
def test_resume_with_a_damaged_config(fails, copied, damaged):
    (copied / "config.json").write_bytes(damaged)
    before = content(copied)
    assert "config.json" in fails("resume", str(copied))
    assert content(copied) == before


@pytest.mark.parametrize(
    "change",
    [
        {"clients": "ten"},
        {"rounds": None},
        {"rounds": 1.5},
        {"method": 3},
        {"dataset": ["digits"]},
        {"settings": None},
        {"settings": {"lr": "fast"}},
        {"settings": {"nosuch": 1}},
        {"settings": ["lr"]},
        {"target_accuracy": 0.5},
        {"target_accuracy": ["high"]},
        {"format": 99},
        {"nosuch": 1},
        {"eval_every": "x"},
    ],
)
def test_resume_with_a_config_of_wrong_values(fails, copied, change):
    path = copied / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    before = content(copied)
    fails("resume", str(copied))
    assert content(copied) == before


def test_resume_of_a_finished_run(copied, capsys):
    before = content(copied)
    cli.main(["resume", str(copied)])
    after = content(copied)
    assert {name for name in after if after[name] != before.get(name)} <= {"report.html"}
    assert "accuracy" in capsys.readouterr().out


def test_resume_with_every_checkpoint_damaged(fails, copied):
    for path in (copied / "checkpoint").glob("*.safetensors"):
        path.write_bytes(b"")
    before = content(copied)
    assert "no usable checkpoint" in fails("resume", str(copied))
    assert content(copied) == before


def test_resume_with_a_log_cut_behind_the_checkpoint(copied, capsys):
    (copied / "rounds.jsonl").write_bytes(b"")
    before = content(copied)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["resume", str(copied)])
    assert stopped.value.code == 2
    assert "rounds.jsonl has 0 bytes" in capsys.readouterr().err.splitlines()[-1]
    assert content(copied) == before


def test_compare(finished, copied, tmp_path, capsys):
    page = tmp_path / "page.html"
    cli.main(
        ["compare", str(finished), str(copied), "--target-accuracy", "0.05", "--out", str(page)]
    )
    assert "finished" in page.read_text() and "copied" in page.read_text()
    assert "finished" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["absent", "."])
def test_compare_with_a_folder_without_a_run(fails, finished, tmp_path, missing):
    page = tmp_path / "page.html"
    fails("compare", str(finished), str(tmp_path / missing), "--out", str(page))
    assert not list(tmp_path.iterdir())


def test_compare_without_folders(fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails("compare")
    assert not list(tmp_path.iterdir())


# Methods of one's own


OWN = '''
from fedlean.methods.fedavg import fedavg


def gentle(server, *, strength: int = 1, lr: float = 0.1, local_steps: int = 1):
    """FedAvg at a fraction of the learning rate."""
    if strength < 1:
        raise ValueError(f"strength must be at least 1, got {strength}")
    return fedavg(server, lr=lr / strength, local_steps=local_steps, batch_size=4)


def broken(server, *, local_steps: int = 1):
    """Every client fails."""

    def fail(task, batches, engine, held):
        raise IndexError("no such layer")

    return gentle(server)._replace(client_update=fail)
'''


@pytest.fixture
def own(tmp_path, monkeypatch) -> str:
    (tmp_path / "own_methods_of_a_test.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_methods_of_a_test", raising=False)
    return "own_methods_of_a_test"


def test_a_method_of_ones_own(own, fails, tmp_path):
    few = ["--clients", "2", "--rounds", "1"]
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    cli.main(["run", f"{own}:gentle", *few, "--set", "strength=4", "--out", str(mine)])
    same = ["--lr", "0.025", "--local-steps", "1", "--batch", "4"]
    cli.main(["run", "fedavg", *few, *same, "--out", str(theirs)])
    left, right = (load_file(each / "model.safetensors") for each in (mine, theirs))
    assert left.keys() == right.keys()
    assert all(left[name].tobytes() == right[name].tobytes() for name in left)
    config = json.loads((mine / "config.json").read_text())
    assert config["method"] == f"{own}:gentle"
    assert config["settings"]["strength"] == 4
    assert "--method own_methods_of_a_test:gentle" in fails("resume", str(mine))
    cli.main(["resume", str(mine), "--method", "own_methods_of_a_test:gentle"])


def test_settings_of_ones_own_method(own, refuses):
    assert "strength" in refuses(f"{own}:gentle", "--set", "strenght=4")
    assert "at least 1" in refuses(f"{own}:gentle", "--set", "strength=0")
    assert "batch_size" in refuses(f"{own}:gentle", "--batch", "3")
    assert "nosuch" in refuses(f"{own}:nosuch")


def test_a_failing_client_is_one_line(own, fails, tmp_path):
    line = fails("run", f"{own}:broken", "--out", str(tmp_path / "run"))
    assert "round 1 (train), client 0, seed " in line and "IndexError: no such layer" in line


def test_options_hold_where_pydantic_checks_them(tmp_path):
    """Cyclopts has it check the options in a process that has loaded it, as Flower's does."""
    pytest.importorskip("pydantic")
    options = ["--rounds", "1", "--clients", "2", "--out", str(tmp_path / "run")]
    cli.main(["run", "fedavg", *options])
    assert (tmp_path / "run" / "summary.json").is_file()
