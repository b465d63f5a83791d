"""`fedlean.train`: one way to a run, in memory or in a folder, with the same bits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import fedlean as fl
from fedlean import cli
from fedlean.methods.fedavg import fedavg
from fedlean.models.catalog import build
from fedlean.models.initialise import init_params
from fedlean.runtime.modelfile import read_model

QUICK = {"rounds": 3, "clients": 2, "local_steps": 2, "batch_size": 8, "say": lambda line: None}


def gentle(server, *, lr: float = 0.1, strength: float = 2.0):
    """FedAvg at a lower rate."""
    return fedavg(server, lr=lr / strength, local_steps=2, batch_size=8)


def same(one: fl.Model, other) -> bool:
    return one.params.keys() == other.params.keys() and all(
        one.params[name].tobytes() == other.params[name].tobytes() for name in one.params
    )


@pytest.mark.parametrize("method", ["fedavg", "prunefl"])
def test_it_is_what_the_command_line_does(method, tmp_path):
    """Same arrays and figures in memory, in a folder, and from `fedlean run`."""
    words = ["--rounds", "3", "--clients", "2", "--local-steps", "2", "--batch", "8"]
    cli.main(["run", method, *words, "--out", str(tmp_path / "cli")])
    run = fl.train(method, **QUICK)
    kept = fl.train(method, **QUICK, out=tmp_path / "folder", on_round=lambda entry: None)
    spec = run.model.spec
    for folder in ("cli", "folder"):
        assert same(run.model, read_model(tmp_path / folder / "model.safetensors", spec))
    assert same(kept.model, run.model) and same(kept.best, run.best)
    names = {path.name for path in (tmp_path / "cli").iterdir()}
    assert {path.name for path in (tmp_path / "folder").iterdir()} == names
    told = json.loads((tmp_path / "cli" / "config.json").read_text())
    assert json.loads((tmp_path / "folder" / "config.json").read_text()) == told
    assert json.loads(json.dumps(run.config)) == told
    assert run.accuracy == run.log[-1]["accuracy"] == kept.accuracy
    assert run.rounds == 3 and run.folder is None and kept.folder == tmp_path / "folder"


def test_without_out_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    fl.train("prunefl", **QUICK)
    assert not list(tmp_path.iterdir())


def test_a_record_for_every_step_and_an_early_end(tmp_path):
    seen = []

    def stop(entry):
        seen.append(entry["round"])
        return entry["round"] < 2

    options = {**QUICK, "rounds": 50}
    run = fl.train("fedavg", **options, out=tmp_path / "run", on_round=stop)
    assert seen == [1, 2] and run.rounds == 2 and not run.interrupted
    assert same(run.model, fl.train("fedavg", **{**QUICK, "rounds": 2}).model)
    on = fl.resume(tmp_path / "run", on_round=lambda entry: entry["round"] < 4)
    assert on.rounds == 4 and [entry["round"] for entry in on.log] == [1, 2, 3, 4]
    assert same(on.model, fl.train("fedavg", **{**QUICK, "rounds": 4}).model)


@pytest.mark.parametrize("out", [None, "run"])
def test_ctrl_c_leaves_what_was_reached(tmp_path, out):
    def interrupt(entry):
        if entry["round"] == 2:
            raise KeyboardInterrupt

    folder = out and tmp_path / out
    run = fl.train("fedavg", **{**QUICK, "rounds": 50}, out=folder, on_round=interrupt)
    assert run.interrupted and run.rounds == 2 and "interrupted" in str(run)
    assert same(run.model, fl.train("fedavg", **{**QUICK, "rounds": 2}).model)
    assert run.model.predict(np.zeros((2, 1, 8, 8))).shape == (2,)
    if folder:
        assert not (folder / "summary.json").exists()  # of runs that have ended
        assert same(fl.load(folder), run.model)
        on = fl.resume(folder, on_round=lambda entry: entry["round"] < 3)
        assert same(on.model, fl.train("fedavg", **QUICK).model)


def test_the_best_model_is_that_of_the_best_evaluation(tmp_path):
    seen = {}

    def remember(entry):
        seen[entry["round"]] = entry["accuracy"]

    options = {**QUICK, "rounds": 6, "lr": 0.9, "say": lambda line: None}
    run = fl.train("fedavg", **options, out=tmp_path / "run", on_round=remember)
    first = min(round for round, accuracy in seen.items() if accuracy == max(seen.values()))
    assert same(run.best, fl.train("fedavg", **{**options, "rounds": first}).model)
    assert same(fl.load(tmp_path / "run", best=True), run.best)
    fl.resume(tmp_path / "run")
    assert same(fl.load(tmp_path / "run", best=True), run.best)


def test_a_function_of_ones_own(tmp_path):
    run = fl.train(gentle, lr=0.2, settings={"strength": 4.0}, out=tmp_path / "run", **own())
    assert same(run.model, fl.train("fedavg", lr=0.05, **QUICK).model)
    assert run.config["settings"] == {"lr": 0.2, "strength": 4.0}
    with pytest.raises(ValueError, match="would import and call"):
        fl.resume(tmp_path / "run")
    assert same(fl.resume(tmp_path / "run", method=gentle).model, run.model)


def own():
    return {key: QUICK[key] for key in ("rounds", "clients", "say")}


def test_a_spec_and_a_model_are_models_too(tmp_path):
    spec = build("lenet300", (1, 8, 8), 10)
    by_name = fl.train("fedavg", **QUICK)
    assert same(fl.train("fedavg", model=spec, **QUICK).model, by_name.model)
    given = fl.Model(spec, init_params(spec, 0))
    run = fl.train("fedavg", model=given, out=tmp_path / "run", **QUICK)
    assert same(run.model, by_name.model) and run.config["model"] == "Model"
    again = fl.resume(tmp_path / "run", rounds=5)  # of its folder's spec: nothing to name
    assert same(again.model, fl.train("fedavg", **{**QUICK, "rounds": 5}).model)
    assert again.config["extensions"] == [{"from": 3, "to": 5}]
    on = fl.train("fedavg", model=run.model, **QUICK)  # goes on from there
    assert on.log[0]["accuracy"] > by_name.log[0]["accuracy"]


def test_data_of_ones_own_is_given_again(data, tmp_path):
    run = fl.train("fedavg", data=data, out=tmp_path / "run", **QUICK)
    with pytest.raises(ValueError, match="no such folder"):
        fl.resume(tmp_path / "run")
    on = fl.resume(tmp_path / "run", data=data, rounds=4)
    assert on.rounds == 4 and min(on.accuracy, run.accuracy) > 0.9
    other = replace(data, y_train=data.y_train[::-1].copy())
    with pytest.raises(ValueError, match="the data changed"):
        fl.resume(tmp_path / "run", data=other, rounds=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeed": 1}, "no option 'seeed'; nearest: seed"),
        ({"momentum": 0.5}, "it is a setting of the method: settings={'momentum': ...}"),
        ({"lr": 0.1, "settings": {"lr": 0.2}}, "one setting: give it once"),
        ({"settings": {"lrr": 0.2}}, "no hyper-parameter 'lrr'"),
        ({"settings": {"lr": "fast"}}, "lr must be a number, got 'fast'"),
        ({"seed": "1"}, "seed is '1'"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"model": 7}, "the model must be a ModelSpec, .* got int"),
        ({"data": "nowhere"}, "no such folder"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_left(options, message, tmp_path):
    given = {**QUICK, "out": tmp_path / "run", **options}
    with pytest.raises(ValueError, match=message):
        fl.train("fedavg", **given)
    assert not (tmp_path / "run").exists()


def test_lines_worth_knowing_reach_the_caller(data):
    said = []
    fl.train("fedavg", data=data, partition="natural", clients=2, rounds=1, say=said.append)
    assert any("4 client ids of the data are merged into 2" in line for line in said)


def test_reports_and_comparisons(data, tmp_path):
    pytest.importorskip("matplotlib")
    one = fl.train("fedavg", data=data, **QUICK)
    other = fl.train("prunefl", data=data, out=tmp_path / "pruned", lr=1e-9, **QUICK)
    assert "<!doctype html" in one.report(tmp_path / "page.html").read_text().lower()
    both = fl.compare(one, tmp_path / "pruned", target_accuracy=[0.6])
    rows = both.rows
    assert [row["name"] for row in rows] == ["fedavg", "pruned"]
    assert rows[0]["accuracy"] == one.accuracy and rows[1]["density"] == other.model.density
    assert rows[0]["to_target"][0.6]["round"] >= 1 and rows[1]["to_target"][0.6] is None
    assert "fedavg" in str(both) and both.report(tmp_path / "both.html").is_file()
    with pytest.raises(ValueError, match="at least one run"):
        fl.compare()


def test_a_plan(data):
    plan = fl.plan("lenet300", fl.Device(memory_bytes=10**7), data=data, methods=["fedavg"])
    (device,) = plan.devices
    assert device.memory_bytes == 10**7 and plan.recommended == "fedavg"
    assert "fedavg" in str(plan) and plan.document["classes"] == 3


def test_paths_are_found_from_another_folder(tmp_path, monkeypatch):
    """Row 17 of what failed once: extended, and found, from anywhere."""
    (tmp_path / "there").mkdir()
    x = np.random.default_rng(0).integers(0, 255, (40, 8, 8, 1)).astype(np.uint8)
    np.savez(tmp_path / "there" / "d.npz", x=x, y=np.arange(40) % 2, split=np.arange(40) % 4 // 3)
    monkeypatch.chdir(tmp_path)
    words = ["--clients", "2", "--local-steps", "1", "--batch", "4"]
    cli.main(["run", "fedavg", "--dataset", "there", "--rounds", "1", *words, "--out", "run"])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    cli.main(["resume", "../run", "--rounds", "3"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["rounds"] == 3
    assert len((tmp_path / "run" / "rounds.jsonl").read_text().splitlines()) == 3
    with pytest.raises(SystemExit):
        cli.main(["resume", "../run", "--rounds", "2"])
    assert Path(json.loads((tmp_path / "run" / "config.json").read_text())["dataset"]).is_absolute()


def test_data_without_test_examples():
    x, y = np.random.default_rng(0).normal(size=(40, 1, 4, 4)), np.arange(40) % 2
    data = fl.Dataset.from_arrays(x, y)
    with pytest.raises(ValueError, match="no test examples"):
        fl.train("fedavg", data=data, **QUICK)


@pytest.mark.parametrize("shape", [(6,), (2, 12), (5, 4, 4)])
def test_tables_signals_and_any_number_of_channels(shape, tmp_path):
    x = np.random.default_rng(0).normal(7, 2, size=(60, *shape))
    y = np.where(x.reshape(60, -1).mean(1) > 7, "high", "low")
    data = fl.Dataset.from_arrays(x, y, test=0.2)
    run = fl.train("fedavg", data=data, **QUICK)
    assert set(run.model.predict(x)) <= {"high", "low"}
    run.model.save(tmp_path / "m.safetensors")
    assert np.array_equal(fl.load(tmp_path / "m.safetensors").outputs(x), run.model.outputs(x))
    assert run.model.evaluate(data).accuracy == pytest.approx(run.accuracy)
