"""A run goes on with the data that it began with, or says that it does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fedlean import cli
from fedlean.runtime.config import RunConfig
from fedlean.runtime.how import How
from fedlean.runtime.lock import Superseded
from fedlean.runtime.run import resume, start

RNG = np.random.Generator(np.random.Philox(3))
X = RNG.integers(0, 255, (60, 6, 6), np.uint8)
Y = np.arange(60) % 3
SPLIT = (np.arange(60) >= 45).astype(np.uint8)


def written(folder: Path, x: np.ndarray = X, y: np.ndarray = Y, split: np.ndarray = SPLIT) -> Path:
    folder.mkdir(exist_ok=True)
    np.savez(folder / "set.npz", x=x, y=y, split=split)
    return folder


@pytest.fixture
def interrupted(tmp_path) -> Path:
    """A run that was cut after two of its six rounds."""

    def cut(entry):
        if entry["round"] == 2:
            raise KeyboardInterrupt

    data, folder = written(tmp_path / "data"), tmp_path / "run"
    settings = {"local_steps": 1, "batch_size": 5}
    config = RunConfig("fedavg", str(data), clients=3, rounds=6, settings=settings)
    with pytest.raises(KeyboardInterrupt):
        start(config, folder, How(cut, checkpoint_seconds=0.0))
    return folder


CHANGES = {
    "labels permuted": ({"y": RNG.permutation(Y)}, "the training labels"),
    "one label": ({"y": np.where(np.arange(60) == 6, 2 - Y, Y)}, "the training labels (y_train)"),
    "images permuted": ({"x": X[::-1]}, "the training images (x_train)"),
    "one pixel": ({"x": np.where(np.arange(X.size).reshape(X.shape) == 40, 255 - X, X)}, "x_train"),
    "another type": ({"x": X[:, None].astype(np.float32)}, "dtype float32, uint8 before"),
    "an example more to test": (
        {"split": np.where(np.arange(60) == 44, 1, SPLIT)},
        "44 examples, 45 before",
    ),
    "another class": ({"y": np.where(np.arange(60) == 59, 3, Y)}, "the classes: "),
    "another size": ({"x": X[:, :5]}, "shape"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_data_is_refused_and_named(name, interrupted, tmp_path):
    change, said = CHANGES[name]
    before = {p: p.read_bytes() for p in interrupted.rglob("*") if p.is_file()}
    written(tmp_path / "data", **change)
    with pytest.raises(ValueError, match="the data changed since the run began") as refused:
        resume(interrupted, How())
    assert said in str(refused.value) and "--accept-changed-data" in str(refused.value)
    assert {p: p.read_bytes() for p in interrupted.rglob("*") if p.is_file()} == before


def test_the_same_data_elsewhere_and_in_another_file_goes_on(interrupted, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    np.savez_compressed(other / "renamed.npz", x=X[:, None], y=Y.astype(np.int16), split=SPLIT)
    summary = resume(interrupted, How(), dataset=str(other))
    assert summary["rounds"] == 6 and summary["data_changes"] == []
    whole = start(
        RunConfig(
            "fedavg",
            str(written(tmp_path / "data")),
            clients=3,
            rounds=6,
            settings={"local_steps": 1, "batch_size": 5},
        ),
        tmp_path / "whole",
        How(),
    )
    assert summary["final_accuracy"] == whole["final_accuracy"]
    model = "model.safetensors"
    assert (interrupted / model).read_bytes() == (tmp_path / "whole" / model).read_bytes()


def test_accepted_changes_mark_the_run(interrupted, tmp_path, capsys):
    written(tmp_path / "data", y=RNG.permutation(Y))
    cli.main(["resume", str(interrupted), "--accept-changed-data"])
    marks = json.loads((interrupted / "config.json").read_text())["data"]["changes"]
    assert marks[0]["after_round"] == 2 and any("y_train" in part for part in marks[0]["changed"])
    assert json.loads((interrupted / "summary.json").read_text())["data_changes"] == marks
    page = (interrupted / "report.html").read_text()
    assert "After round 2 the run went on with other data: the training labels" in page
    cli.main(["resume", str(interrupted)])  # it is the data of the run by now


@pytest.mark.parametrize("name", ["another class", "another size"])
def test_data_that_asks_for_another_model_cannot_be_accepted(name, interrupted, tmp_path):
    written(tmp_path / "data", **CHANGES[name][0])
    with pytest.raises(ValueError, match="is not the one that the run began with"):
        resume(interrupted, How(), accept_changed_data=True)


def test_a_folder_of_an_early_version_learns_its_data(interrupted, tmp_path):
    document = json.loads((interrupted / "config.json").read_text())
    data = document.pop("data")
    del document["notes"]
    (interrupted / "config.json").write_text(json.dumps(document))
    assert resume(interrupted, How())["rounds"] == 6
    assert json.loads((interrupted / "config.json").read_text())["data"] == data


DAMAGED = [{}, "x", [], 3, {"fingerprint": 3}, {"fingerprint": {"x_train": 4}}, {"fingerprint": []}]


@pytest.mark.parametrize("data", DAMAGED, ids=str)
def test_damaged_words_about_the_data_are_said_to_be(data, interrupted):
    document = json.loads((interrupted / "config.json").read_text())
    (interrupted / "config.json").write_text(json.dumps({**document, "data": data}))
    with pytest.raises(ValueError, match=r"config\.json is damaged: data: |the data changed"):
        resume(interrupted, How())


def test_a_finished_run_keeps_its_result_whatever_is_accepted(interrupted, tmp_path):
    done = resume(interrupted, How())
    written(tmp_path / "data", y=RNG.permutation(Y))
    again = resume(interrupted, How(), accept_changed_data=True)
    assert again["final_accuracy"] == done["final_accuracy"]


def test_a_run_whose_folder_is_removed_ends_and_writes_nothing_more(tmp_path):
    def remove(entry):
        if entry["round"] == 2:
            shutil.rmtree(tmp_path / "run")

    config = RunConfig("fedavg", str(written(tmp_path / "data")), clients=3, rounds=6)
    with pytest.raises(Superseded, match="was removed; this one ends"):
        start(config, tmp_path / "run", How(remove, checkpoint_seconds=0.0))
    assert not (tmp_path / "run").exists()
