"""Whom a model serves: by hand, and in a run's summary."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fedlean.runtime.config import RunConfig
from fedlean.runtime.how import How
from fedlean.runtime.personal import check_personalize
from fedlean.runtime.run import start
from fedlean.runtime.served import LISTED, expected, recalls, served, spread

CONFUSION = np.array([[8, 2, 0], [1, 3, 0], [0, 0, 0]])  # recall 0.8 and 0.75; the third unknown


def test_recall_by_hand():
    assert recalls(CONFUSION)[:2].tolist() == [0.8, 0.75] and np.isnan(recalls(CONFUSION)[2])


def test_expected_accuracy_by_hand():
    """Three of the first class and one of the second; the third has no test examples."""
    assert expected(CONFUSION, np.array([3, 1, 0])) == pytest.approx(3.15 / 4, rel=1e-12)
    assert expected(CONFUSION, np.array([3, 1, 99])) == pytest.approx(3.15 / 4, rel=1e-12)
    assert expected(CONFUSION, np.array([0, 0, 5])) is None


def test_of_all_clients():
    held = {0: np.array([1, 0, 0]), 4: np.array([0, 1, 0]), 5: np.array([0, 0, 1])}
    found = served(CONFUSION, held, ["a", "b", "c"])
    assert found["recall"] == [0.8, 0.75, None] and found["confusion"] == CONFUSION.tolist()
    clients = found["clients"]
    assert clients["count"] == 2 and clients["by_client"] == {"0": 0.8, "4": 0.75}
    assert (clients["worst"], clients["worst_client"]) == (0.75, 4)
    assert clients["median"] == pytest.approx(0.775) and clients["percentile_10"] > 0.75
    assert "clients" not in served(CONFUSION, {}, ["a", "b", "c"])
    assert len(spread(dict.fromkeys(range(LISTED + 5), 0.5))["clients"]["by_client"]) == LISTED


def test_many_classes_have_no_matrix():
    many = np.eye(101, dtype=np.int64)
    found = served(many, {}, [str(at) for at in range(101)])
    assert "confusion" not in found and found["recall"] == [1.0] * 101


def test_in_a_run_the_figures_agree_with_its_accuracy(tmp_path):
    config = RunConfig("fedavg", rounds=20, partition="dirichlet:0.3", personalize=10)
    summary = start(config, tmp_path / "run", How())
    counts = np.array(summary["served"]["confusion"])
    assert np.trace(counts) / counts.sum() == summary["final_accuracy"]
    personal = summary["personal"]
    for client, gain in personal["gain"]["by_client"].items():
        before, after = (
            each["by_client"][client]
            for each in (summary["served"]["clients"], personal["clients"])
        )
        assert after - before == pytest.approx(gain, abs=1e-12)
    assert personal["gain"]["median"] > 0  # skewed clients gain by their own examples
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary


def test_personal_steps_change_nothing_of_the_run(tmp_path):
    for steps in (None, 3):
        start(RunConfig("prunefl", rounds=2, personalize=steps), tmp_path / str(steps), How())
    one, other = ((tmp_path / each / "model.safetensors").read_bytes() for each in ("None", "3"))
    assert one == other


def test_a_method_without_a_batch_is_refused():
    with pytest.raises(ValueError, match="has no batch_size, with which a client could train"):
        check_personalize("mine", {"lr": 0.1}, 5)
    check_personalize("mine", {"lr": 0.1}, 0)
