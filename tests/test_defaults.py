"""`fedlean run METHOD` with nothing else said learns the digits."""

from __future__ import annotations

import json
from itertools import groupby

import pytest

from fedlean import cli

pytestmark = pytest.mark.slow


SHRINKING = [("shrink", "head"), ("map", "head")]
PHASES = {
    "smartfreeze": [("train", "fc1"), ("train", "head")],
    "profl": [*SHRINKING, ("grow", "fc1"), ("grow", "head")],
    "neulite": [("train", "fc1"), ("train", "head")] * 50,
    "zo_stages": [("train", "fc1"), ("train", "head")],
}
LEAST = {"zo_stages": 0.87}  # by forward passes in 50 rounds of a stage; the others: nine of ten


@pytest.mark.parametrize("method", ["ssfl", "fiarse"])
def test_a_pruned_model_learns_the_digits(method, tmp_path):
    """FIARSE without a fleet would train the whole model: client i gets density i mod 5."""
    folder, more = tmp_path / "run", ["--set", "assign=fixed"] if method == "fiarse" else []
    cli.main(["run", method, *more, "--out", str(folder)])
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["rounds"] == 100 and summary["final_accuracy"] >= 0.9
    assert summary["density"] == (0.5 if method == "ssfl" else 1.0)


@pytest.mark.parametrize("method", PHASES)
def test_a_model_trained_part_by_part_learns_the_digits(method, tmp_path):
    """Every stage in its place, and most are right at the end of the default rounds."""
    folder = tmp_path / "run"
    cli.main(["run", method, "--out", str(folder)])
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    seen = [key for key, _ in groupby((line["phase"], line["stage"]) for line in lines)]
    assert seen == PHASES[method]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["rounds"] == 100 and summary["density"] == 1.0
    assert summary["final_accuracy"] >= LEAST.get(method, 0.9)


def test_slices_trained_by_forward_passes_learn_the_digits(tmp_path):
    """Of three widths; clients send 50 numbers each round."""
    folder = tmp_path / "run"
    cli.main(["run", "zo_slices", "--set", "assign=fixed", "--out", str(folder)])
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["rounds"] == 100 and summary["final_accuracy"] >= 0.9
    assert summary["uplink_bytes"] < 100 * 10 * 500
