"""Checkpoints whose digest is right and whose content is another run's, or made up."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import server

from fedlean import cli
from fedlean.core import Model
from fedlean.methods.profl import profl
from fedlean.models.catalog import build as build_model
from fedlean.models.initialise import init_params
from fedlean.runtime.checkpoint import load_checkpoint, save_checkpoint
from fedlean.runtime.restored import restored

QUICK = ["--clients", "2", "--local-steps", "1", "--batch", "4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("restored") / "run"
    cli.main(["run", "snip", *QUICK, "--rounds", "1", "--set", "density=0.5", "--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def tree(run) -> dict[str, Any]:
    return load_checkpoint(run / "checkpoint")[0]


def put(*keys: str, value: Any) -> Any:
    def change(tree: dict[str, Any]) -> None:
        for key in keys[:-1]:
            tree = tree[key]
        tree[keys[-1]] = value

    return change


def drop(*keys: str) -> Any:
    def change(tree: dict[str, Any]) -> None:
        for key in keys[:-1]:
            tree = tree[key]
        del tree[keys[-1]]

    return change


WEIGHT, F32 = "fc1.weight", np.float32
CHANGES = [
    (drop("state"), "KeyError: 'state'"),
    (put("state", value=3), "AttributeError"),
    (put("state", value={"round": "3"}), "round of its state is a str"),
    (drop("state", "params"), "missing 1 required positional argument: 'params'"),
    (put("state", "odd", value=1), "unexpected keyword argument 'odd'"),
    (put("state", "round", value=-1), "round is -1"),
    (put("state", "phase", value=1), "phase of its state is a int"),
    (put("state", "params", WEIGHT, value=np.zeros((2, 2), F32)), "must be float32 of shape"),
    (put("state", "params", WEIGHT, value="text"), "is no array"),
    (put("state", "params", value={}), "is in the spec but not in params"),
    (put("state", "masks", WEIGHT, value=np.ones((2, 2), bool)), "mask 'fc1.weight'"),
    (put("state", "masks", "odd", value=np.ones(2, bool)), "fits no trainable tensor"),
    (put("store", value={"0": (1, 2, 3)}), "not hashes and a round"),
    (put("store", value={"zero": ("a", "b", 1)}), "invalid literal"),
    (put("store", value=(1,)), "AttributeError"),
    (put("step", value=None), "step is None"),
    (put("step", value=True), "step is True"),
    (put("empty_steps", value=-1), "empty_steps is -1"),
    (put("moves", "alike", value={"model of a": ((0, -1.0),)}), "a move of 'model of a' is -1"),
    (put("moves", "alike", value={"model of a": ((-1, 1.0),)}), "a client of the moves of"),
    (put("moves", "alike", value=3), "AttributeError"),
    (put("log_bytes", value=10**30), "log_bytes is 1000"),
    (put("totals", "downlink_bytes", value=float("nan")), "downlink_bytes is nan"),
    (put("totals", "downlink_bytes", value=-1), "downlink_bytes is -1"),
    (put("totals", "targets", value=1), "targets is a int"),
    (put("totals", "odd", value=1), "unexpected keyword argument 'odd'"),
    (put("clients", value={"a": {}}), "invalid literal"),
    (put("clients", value={"0": {"x": 3}}), "is no array"),
]


@pytest.mark.parametrize(("change", "said"), CHANGES, ids=range(len(CHANGES)))
def test_what_does_not_fit_is_named_in_one_line(run, tree, capsys, change, said):
    changed = copy.deepcopy(tree)
    change(changed)
    log = (run / "rounds.jsonl").read_bytes()
    save_checkpoint(run / "checkpoint", 1000, changed)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.main(["resume", str(run)])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1
    assert "does not fit its run" in err and said in err and "to begin it anew: rm -r" in err
    assert (run / "rounds.jsonl").read_bytes() == log


def test_the_checkpoint_as_it_was_fits(run, tree):
    save_checkpoint(run / "checkpoint", 1000, tree)
    cli.main(["resume", str(run)])


@pytest.mark.parametrize("method", ["smartfreeze", "profl", "neulite", "slt", "smartfreeze:masked"])
def test_a_run_goes_on_from_its_first_stage(tmp_path, monkeypatch, capsys, method):
    """What is evaluated then is another model than the whole one, which the state has."""

    method, _, masked = method.partition(":")
    first = 2 if masked else 1  # after the step in which the server prunes

    def save(folder, step, tree):
        if step == first:
            save_checkpoint(folder, step, tree)

    own = {"profl": "shrink=false", "slt": "shares=equal"}
    folder, settings = tmp_path / "run", [own.get(method, "lr=0.05")]
    settings += ["density=0.5", "prune_steps=2"] if masked else []
    with monkeypatch.context() as patch:
        patch.setattr("fedlean.runtime.going.CHECKPOINT_SECONDS", (0.0, 0.0))
        patch.setattr("fedlean.runtime.keeper.save_checkpoint", save)
        quick = [*QUICK, "--rounds", "4", "--set", *settings]
        cli.main(["run", method, *quick, "--out", str(folder)])
    whole = (folder / "model.safetensors").read_bytes()
    tree = load_checkpoint(folder / "checkpoint")[0]
    cli.main(["resume", str(folder)])
    assert f"continuing after step {first}, round 1 of 4" in capsys.readouterr().err
    assert (folder / "model.safetensors").read_bytes() == whole

    del tree["state"]["params"]["fc2.bias"]  # of the last part
    save_checkpoint(folder / "checkpoint", 1000, tree)
    with pytest.raises(SystemExit):
        cli.main(["resume", str(folder)])
    said = capsys.readouterr().err
    assert "does not fit its run" in said and "fc2.bias" in said


def test_tensors_of_a_restored_state_are_read_only(tmp_path):
    """Those beside the model's, too: a stage's frozen ones are hashed once, not for each task."""
    folder = tmp_path / "run"
    cli.main(["run", "profl", *QUICK, "--rounds", "6", "--out", str(folder)])
    tree = load_checkpoint(folder / "checkpoint")[0]
    assert any(value.flags.writeable for value in tree["state"]["extra"].values())
    spec = build_model("lenet300", (1, 8, 8), 10)
    its_server = replace(server(6), spec=spec)
    algorithm = profl(its_server)
    initial = algorithm.init(Model(spec, init_params(spec, 0)))
    state = restored(folder, tree, initial, algorithm, its_server).progress.state
    for group in (state.params, state.extra):
        assert group and not any(value.flags.writeable for value in group.values())


OF_STAGES = [
    (put("state", "over", value=True), "IndexError"),
    (put("state", "stage", value=10**9), "IndexError"),
    (put("state", "pace", value={}), "KeyError: 'moves'"),
    (put("state", "pace", "last", value="x"), "UFuncTypeError"),
    (put("state", "extra", value={"a": 1}), "'a' of extra is no array"),
    (put("state", "extra", value={"a": np.array([np.nan], F32)}), "extra.a of its state is not"),
]


def test_what_only_the_method_reads_is_tried_out(tmp_path, capsys):
    """A state that its method cannot go on from is found before a step, and not by a traceback."""
    folder, pace = tmp_path / "run", ["window=2", "values=2", "patience=1"]
    cli.main(["run", "smartfreeze", *QUICK, "--rounds=4", "--set", *pace, "--out", str(folder)])
    whole = load_checkpoint(folder / "checkpoint")[0]
    whole["state"]["round"] = 3
    for change, said in OF_STAGES:
        changed = copy.deepcopy(whole)
        change(changed)
        save_checkpoint(folder / "checkpoint", 1000, changed)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main(["resume", str(folder)])
        err = capsys.readouterr().err
        assert stopped.value.code == 2 and err.count("\n") == 1
        assert "does not fit its run" in err and said in err
