"""Runs on tables, signals and pictures of many channels, with labels and ids as they come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlean.models.catalog import build
from fedlean.runtime.config import RunConfig
from fedlean.runtime.how import How
from fedlean.runtime.run import resume, start

NAMES = np.array(["run", "sit", "walk"])


def arrays(shape: tuple[int, ...], dtype: type = np.float32, seed: int = 0) -> dict[str, Any]:
    """Three noisy prototypes, 210 examples of 7 clients, a seventh for testing."""
    rng = np.random.default_rng(seed)
    y = np.arange(210) % 3
    x = 100 * rng.standard_normal((3, *shape))[y] + 30 * rng.standard_normal((210, *shape))
    return {
        "x": x.astype(dtype),
        "y": NAMES[y],
        "split": np.where(np.arange(210) % 7, "train", "test"),
        "client": np.array([f"person {i}" for i in range(210)])[np.arange(210) % 5],
    }


def trained(folder: Path, **settings: Any) -> dict[str, Any]:
    own = {"lr": 0.05, "local_steps": 4, "batch_size": 20}
    config = RunConfig("fedavg", str(folder), rounds=5, settings=own, **settings)
    return start(config, folder / "run", How())


@pytest.mark.parametrize("engine", [None, "torch"])
@pytest.mark.parametrize(
    ("shape", "dtype", "layout", "model", "kept"),
    [
        ((40,), np.float32, "", "mlp", [40]),
        ((40,), np.int16, "", "lenet300", [40]),
        ((6, 16), np.float32, "ncl", "mlp", [6, 16]),
        ((16, 6), np.float64, "nlc", "lenet300", [6, 16]),
        ((6, 1, 20), np.float32, "", "mlp", [6, 1, 20]),
        ((8, 8, 4), np.int16, "nhwc", "conv2,width=4", [4, 8, 8]),
    ],
)
def test_a_run_learns_them(tmp_path: Path, engine, shape, dtype, layout, model, kept):
    if engine == "torch":
        pytest.importorskip("torch")
    np.savez(tmp_path / "set.npz", **arrays(shape, dtype))
    summary = trained(tmp_path, layout=layout, model=model, engine=engine, clients=3)
    assert summary["final_accuracy"] > 0.9
    document = json.loads((tmp_path / "run/config.json").read_text())
    assert document["spec"]["input_shape"] == kept and document["layout"] == layout
    assert document["data"]["class_names"] == list(NAMES)


def test_a_run_is_resumed_with_what_was_declared(tmp_path: Path):
    np.savez(tmp_path / "set.npz", **arrays((6, 16)))

    def cut(entry: dict[str, Any]) -> None:
        if entry["round"] == 2:
            raise KeyboardInterrupt

    config = RunConfig("fedavg", str(tmp_path), layout="ncl", model="mlp", clients=3, rounds=4)
    with pytest.raises(KeyboardInterrupt):
        start(config, tmp_path / "cut", How(cut, checkpoint_seconds=0.0))
    assert resume(tmp_path / "cut", How())["rounds"] == 4


def test_an_ambiguous_array_shows_its_readings_and_leaves_no_folder(tmp_path: Path):
    np.savez(tmp_path / "set.npz", **arrays((3, 128)))
    with pytest.raises(ValueError, match=r"ncl .*or as nlc .*or as nhw .*--layout"):
        trained(tmp_path, model="mlp")
    assert not (tmp_path / "run").exists()


def test_a_picture_model_names_those_that_take_signals(tmp_path: Path):
    np.savez(tmp_path / "set.npz", **arrays((6, 16)))
    with pytest.raises(ValueError, match=r"conv2 reads images.*got \(6, 16\); lenet300, mlp"):
        trained(tmp_path, layout="ncl", model="conv2")
    for name in ("lenet300", "mlp", "mlp_40_20", "mlp_27_14", "mlp_13_7"):
        for shape in ((6, 16), (16,), (2, 8, 8)):
            assert build(name, shape, 3).output_shape == (3,)


def test_data_without_test_examples_says_how_to_get_some(tmp_path: Path):
    whole = arrays((40,))
    np.savez(tmp_path / "set.npz", x=whole["x"], y=whole["y"])
    with pytest.raises(ValueError, match=r"has no test examples: .*--test-share 0\.2"):
        trained(tmp_path, model="mlp")
    summary = trained(tmp_path, model="mlp", test_share=0.2)
    assert summary["final_accuracy"] > 0.9
    entries = json.loads((tmp_path / "run/config.json").read_text())["data"]["fingerprint"]
    assert entries["y_test"]["shape"] == [42] and entries["y_train"]["shape"] == [168]


def test_a_server_s_set_does_not_train_here(tmp_path: Path):
    whole = arrays((40,))
    np.savez(tmp_path / "set.npz", x_test=whole["x"], y_test=whole["y"])
    with pytest.raises(ValueError, match="has no training examples: give one that has some"):
        trained(tmp_path, model="mlp")


def test_a_second_test_set_is_refused(tmp_path: Path):
    np.savez(tmp_path / "set.npz", **arrays((40,)))
    with pytest.raises(ValueError, match="has 30 test examples of its own: leave out --test-share"):
        trained(tmp_path, model="mlp", test_share=0.5)


def test_what_says_nothing_about_the_files_is_refused(tmp_path: Path):
    np.savez(tmp_path / "set.npz", **arrays((40,)))
    with pytest.raises(ValueError, match="--label says nothing about the data set"):
        trained(tmp_path, model="mlp", label="y")
    with pytest.raises(ValueError, match="--layout says nothing about the data set 'digits'"):
        start(RunConfig("fedavg", layout="nhw"), tmp_path / "run", How())


def test_left_out_examples_are_said_and_noted(tmp_path: Path):
    whole = arrays((40,))
    whole["split"] = np.where(np.arange(210) % 7 == 1, "val", whole["split"])
    np.savez(tmp_path / "set.npz", **whole)
    said: list[str] = []
    config = RunConfig("fedavg", str(tmp_path), model="mlp", rounds=1, clients=2)
    start(config, tmp_path / "run", How(say=said.append))
    line = "30 examples for validation are left out"
    assert line in said
    assert line in json.loads((tmp_path / "run/config.json").read_text())["notes"]
