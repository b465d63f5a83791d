"""Run folders of real runs on digits (docs/run-folder.md)."""

from __future__ import annotations

import json
import re
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from federation import first_model

from fedlean import cli
from fedlean.runtime.config import RunConfig
from fedlean.runtime.evaluate import Score
from fedlean.runtime.going import _pause_seconds
from fedlean.runtime.how import How
from fedlean.runtime.modelfile import read_model
from fedlean.runtime.rounds import StepRecord
from fedlean.runtime.run import resume, start
from fedlean.runtime.runlog import RunLog, Totals, log_entry
from fedlean.spec import ModelSpec

DOCUMENT = Path(__file__).parents[2] / "docs" / "run-folder.md"
ROUNDS = 3
METHODS = ("fedavg", "prunefl")
SUMMED = (
    *("downlink_bytes", "uplink_bytes", "flops_per_client", "flops_dense_gradient_per_client"),
    *("simulated_seconds", "measured_seconds", "wall_seconds"),
)


def arguments(method: str, folder: Path) -> list[str]:
    options = ["--clients", "4", "--cohort", "3", "--batch", "10", "--seed", "5"]
    targets = ["--target-accuracy", "0.15", "0.9999", "--rounds", str(ROUNDS)]
    settings = ["--set", "reconfigure_every=2"] if method == "prunefl" else []
    return ["run", method, *options, *targets, *settings, "--out", str(folder)]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def without_wall_times(folder: Path) -> list[dict[str, Any]]:
    entries = lines(folder)
    for entry in entries:
        for key in ("wall_seconds", "measured_seconds"):
            assert entry.pop(key) >= 0 and entry["total"].pop(key) >= 0
    return entries


def documented(section: str) -> str:
    return DOCUMENT.read_text().split(f"## `{section}`")[1].split("\n## ")[0]


@pytest.fixture(scope="module", params=METHODS)
def folder(request, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / request.param
    cli.main(arguments(request.param, out))
    return out


def test_files(folder):
    intro = DOCUMENT.read_text().split("\n## ")[0]
    named = re.findall(r"^\| `([a-z.]+)/?` \|", intro, re.MULTILINE)
    assert len(named) == 8
    named.remove("start.safetensors")  # of a run with --start
    assert sorted(path.name for path in folder.iterdir()) == sorted(named)
    page = (folder / "report.html").read_text()
    assert page.lower().startswith("<!doctype html") and folder.name in page
    assert not list(folder.glob("**/*.tmp"))


def test_every_key_of_a_line_is_documented_and_there(folder):
    first_cells = re.findall(r"^\| (`.*?) \|", documented("rounds.jsonl"), re.MULTILINE)
    keys = {key for cell in first_cells for key in re.findall(r"`([a-z_]+)`", cell)}
    for entry in lines(folder):
        assert set(entry) == keys
        assert set(entry["total"]) == set(SUMMED)


def test_every_key_of_the_summary_is_documented_and_there(folder):
    text = documented("summary.json").split("`time_to_accuracy`")[0]
    keys = {*re.findall(r"`([a-z_]+)`", text), "time_to_accuracy"}
    assert set(json.loads((folder / "summary.json").read_text())) == keys


def test_config_repeats_the_run(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    given = {"method": folder.name, "dataset": "digits", "clients": 4, "rounds": 3, "seed": 5}
    assert given.items() <= config.items()
    assert config["settings"].items() >= {"cohort": 3, "batch_size": 10}.items()
    assert config["target_accuracy"] == [0.15, 0.9999]
    assert config["threads"] == 1
    assert config["engine"] == config["environment"]["engine"] == "native"
    where = {"fedlean", "numpy", "python", "machine", "instruction_set"}
    assert where <= config["environment"].keys()
    assert ModelSpec.from_json(json.dumps(config["spec"])).output_shape == (10,)


def test_totals_are_the_sums(folder):
    entries = lines(folder)
    summary = json.loads((folder / "summary.json").read_text())
    for key in SUMMED:
        total = 0
        for entry in entries:
            total += entry[key]
            assert entry["total"][key] == pytest.approx(total, rel=1e-12)
        assert summary[key] == entries[-1]["total"][key]
    memory = [entry["peak_memory_bytes"] for entry in entries]
    assert summary["peak_memory_bytes"] == max(memory)
    assert summary["mean_memory_bytes"] == pytest.approx(sum(memory) / len(memory))
    for entry in entries:
        parts = entry["compute_seconds"] + entry["link_seconds"]
        assert entry["simulated_seconds"] == pytest.approx(parts)


def test_rounds_and_cohorts(folder):
    entries = lines(folder)
    train = [entry for entry in entries if entry["phase"] == "train"]
    assert [entry["round"] for entry in train] == [1, 2, 3]
    for entry in train:
        assert len(set(entry["cohort"])) == 3 and set(entry["cohort"]) <= set(range(4))
        assert (entry["absent"], entry["refused"]) == ([], {})
        assert 0 <= entry["accuracy"] <= 1 and entry["loss"] > 0 and entry["train_loss"] > 0
    before = entries[: -len(train)]
    assert all((entry["round"], entry["phase"]) == (0, "initial") for entry in before)
    assert bool(before) == (folder.name == "prunefl")


def test_summary_and_targets(folder):
    entries = lines(folder)
    summary = json.loads((folder / "summary.json").read_text())
    scored = [entry for entry in entries if entry["accuracy"] is not None]
    assert summary["final_accuracy"] == entries[-1]["accuracy"]
    assert summary["best_accuracy"] == max(entry["accuracy"] for entry in scored)
    assert (summary["rounds"], summary["cohort"], summary["clients"]) == (3, 3, 4)
    assert summary["density"] == entries[-1]["density"]
    assert summary["time_to_accuracy"].keys() == {"0.15", "0.9999"}
    first = next(entry for entry in scored if entry["accuracy"] >= 0.15)
    assert summary["time_to_accuracy"]["0.15"] == {
        "round": first["round"],
        **{
            key: first["total"][key]
            for key in (
                *("simulated_seconds", "measured_seconds"),
                *("flops_per_client", "flops_dense_gradient_per_client"),
            )
        },
        "bytes": first["total"]["downlink_bytes"] + first["total"]["uplink_bytes"],
    }
    assert summary["time_to_accuracy"]["0.9999"] is None


def test_model(folder):
    config = json.loads((folder / "config.json").read_text())
    spec = ModelSpec.from_json(json.dumps(config["spec"]))
    model = read_model(folder / "model.safetensors", spec)
    params, masks = model.params, model.masks
    assert {name: value.shape for name, value in params.items()} == dict(spec.tensor_shapes)
    assert all(value.dtype == np.float32 for value in params.values())
    assert set(masks) == (set(spec.prunable) if folder.name == "prunefl" else set())
    for name, mask in masks.items():
        assert not params[name][~mask].any()
    kept = sum(int(mask.sum()) for mask in masks.values())
    last = lines(folder)[-1]
    if masks:
        assert last["density"] == kept / sum(mask.size for mask in masks.values()) < 1
        assert last["layer_density"] == {name: mask.mean() for name, mask in masks.items()}
    else:
        assert last["density"] == 1


def test_the_same_command_gives_the_same_bytes(folder, tmp_path):
    cli.main(arguments(folder.name, tmp_path / "again"))
    again = tmp_path / "again"
    model = "model.safetensors"
    assert (again / model).read_bytes() == (folder / model).read_bytes()
    assert without_wall_times(again) == without_wall_times(folder)
    assert (again / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_native_gives_the_same_bytes_on_any_number_of_threads(folder, tmp_path):
    cli.main([*arguments(folder.name, tmp_path / "more"), "--threads", "3"])
    more, model = tmp_path / "more", "model.safetensors"
    assert (more / model).read_bytes() == (folder / model).read_bytes()
    assert without_wall_times(more) == without_wall_times(folder)


def test_evaluation_now_and_then(tmp_path):
    config = RunConfig(
        "fedavg",
        clients=2,
        rounds=5,
        eval_every=2,
        eval_examples=50,
        settings={"local_steps": 1, "batch_size": 4},
    )
    seen: list[dict[str, Any]] = []
    summary = start(config, tmp_path / "run", How(seen.append))
    assert [entry["round"] for entry in seen if entry["accuracy"] is not None] == [2, 4, 5]
    assert all((entry["accuracy"] is None) == (entry["loss"] is None) for entry in seen)
    assert seen == lines(tmp_path / "run")
    every = RunConfig("fedavg", clients=2, rounds=5, settings=config.settings)
    whole = start(every, tmp_path / "every", How())
    assert summary["final_accuracy"] == whole["final_accuracy"]  # the last takes all examples
    few = start(replace(config, final_eval_examples=50), tmp_path / "few", How())
    subset = start(replace(config, eval_every=5), tmp_path / "last", How())
    assert few["final_accuracy"] != subset["final_accuracy"] == whole["final_accuracy"]
    assert few["final_accuracy"] in [hits / 50 for hits in range(51)]
    with pytest.raises(ValueError, match="final_eval_examples must be at least 1, got 0"):
        start(replace(config, final_eval_examples=0), tmp_path / "none", How())
    assert not (tmp_path / "none").exists()


def test_resuming_a_finished_run_is_harmless(folder, tmp_path):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    cli.main(["resume", str(folder)])
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == files
    changed = [path.name for path in files if path.read_bytes() != before[path]]
    assert set(changed) <= {"report.html"}


# The log alone


def test_a_diverged_loss_is_null(tmp_path):
    """JSON has no NaN, and a run whose loss overflows goes on."""
    record = StepRecord([], metrics={"train_loss": float("inf"), "other": 1.0})
    line = log_entry(
        round=1,
        phase="train",
        record=record,
        totals=Totals(),
        clients=2,
        score=Score(0.1, float("nan"), np.zeros((2, 2), np.int64)),
        model=first_model(),
        whole=first_model().spec,
        reported={"movement": float("nan")},
    )
    with closing(RunLog(tmp_path / "rounds.jsonl")) as log:
        log.append(line)
    (back,) = lines(tmp_path)
    assert (back["accuracy"], back["loss"], back["train_loss"]) == (0.1, None, None)
    assert back["metrics"] == {"train_loss": None, "other": 1.0}
    assert back["method"] == {"movement": None}


def test_a_log_is_cut_back_to_its_checkpoint(tmp_path):
    path = tmp_path / "rounds.jsonl"
    log = RunLog(path)
    log.append({"round": 1})
    kept = log.sync()
    log.append({"round": 2})
    log.close()
    path.write_bytes(path.read_bytes() + b'{"rou')
    log = RunLog(path, keep_bytes=kept)
    log.append({"round": 2, "again": True})
    log.close()
    assert lines(tmp_path) == [{"round": 1}, {"round": 2, "again": True}]


def test_a_log_shorter_than_its_checkpoint_is_refused(tmp_path):
    path = tmp_path / "rounds.jsonl"
    path.write_bytes(b"{}\n")
    with pytest.raises(ValueError, match="3 bytes"):
        RunLog(path, keep_bytes=4)
    assert path.read_bytes() == b"{}\n"


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        resume(tmp_path, How())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("asked", "took", "pause"),
    [(None, 0.0, 5.0), (None, 0.1, 20.0), (None, 3.0, 60.0), (0.0, 3.0, 0.0), (1.5, 3.0, 1.5)],
)
def test_checkpoints_take_half_a_percent_of_the_time_unless_told_when(asked, took, pause):
    run = SimpleNamespace(checkpoint_seconds=asked)
    assert _pause_seconds(run, took) == pytest.approx(pause)  # type: ignore[arg-type]
