"""`fedlean evaluate`, `predict` and `export` on a real run, and on what fits none."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

import fedlean as fl
from fedlean import cli


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("results") / "run"
    words = ["--rounds", "6", "--clients", "3", "--set", "reconfigure_every=2", "--out", str(out)]
    cli.main(["run", "prunefl", *words])
    return out


def said(capsys, *words: str) -> str:
    capsys.readouterr()
    cli.main(list(words))
    return capsys.readouterr().out


def refused(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(words))
    line = capsys.readouterr().err
    assert stopped.value.code == 2 and line.count("\n") == 1
    return line


def test_evaluate_gives_the_accuracy_of_the_run(run, capsys):
    summary = json.loads((run / "summary.json").read_text())
    document = json.loads(said(capsys, "evaluate", str(run), "--data", "digits", "--json"))
    assert document["accuracy"] == summary["final_accuracy"]
    confusion = np.array(document["confusion"])
    assert confusion.sum() == document["examples"] == 359
    assert np.trace(confusion) / 359 == pytest.approx(document["accuracy"])
    assert document["recall"] == pytest.approx(list(np.diag(confusion) / confusion.sum(1)))
    text = said(capsys, "evaluate", str(run), "--data", "digits", "--part", "train", "--best")
    assert "on 1438 examples" in text and "recall" in text


def test_predict_writes_names_and_probabilities(run, capsys, tmp_path):
    text = said(capsys, "predict", str(run), "--data", "digits", "--part", "test")
    head, *rows = csv.reader(text.splitlines())
    assert head == ["example", "label", "predicted", *map(str, range(10))] and len(rows) == 359
    shares = np.array([row[3:] for row in rows], float)
    np.testing.assert_allclose(shares.sum(1), 1, atol=1e-4)
    hits = sum(row[1] == row[2] for row in rows)
    summary = json.loads((run / "summary.json").read_text())
    assert hits / 359 == pytest.approx(summary["final_accuracy"])
    out = tmp_path / "all.csv"
    said(capsys, "predict", str(run), "--data", "digits", "--out", str(out))
    assert len(out.read_text().splitlines()) == 1 + 1438 + 359


def test_data_with_names_of_its_own(run, capsys, tmp_path):
    """Of the same classes in part, as floats up to 1 where the run had bytes; and of others."""
    data = fl.Dataset.from_folder("digits")
    few = data.y_test < 3
    x = (data.x_test[few] / np.float32(data.scale)).astype(np.float32)
    split = np.arange(few.sum()) % 2
    (tmp_path / "few").mkdir()
    np.savez(tmp_path / "few" / "d.npz", x=x, y=data.y_test[few], split=split)
    place = str(tmp_path / "few")
    document = json.loads(
        said(capsys, "evaluate", str(run), "--data", place, "--part", "all", "--json")
    )
    whole = json.loads(said(capsys, "evaluate", str(run), "--data", "digits", "--json"))
    assert np.array_equal(document["confusion"][:3], whole["confusion"][:3])
    assert document["recall"][5] is None
    (tmp_path / "other").mkdir()
    np.savez(tmp_path / "other" / "d.npz", x=x, y=np.repeat("cat", few.sum()), split=split)
    line = refused(capsys, "evaluate", str(run), "--data", str(tmp_path / "other"))
    assert "'cat'" in line and "renamed or left out" in line


@pytest.mark.parametrize("format", ["c", "safetensors", "torch", "onnx"])
def test_export(run, format, capsys, tmp_path, monkeypatch):
    if format in ("torch", "onnx"):
        pytest.importorskip(format)
    monkeypatch.chdir(tmp_path)
    text = said(capsys, "export", str(run), "--format", format)
    (path,) = tmp_path.iterdir()
    assert path.name in text and path.stat().st_size > 10_000


def test_the_file_of_a_pruned_model_is_about_its_density_of_the_dense_one(run, tmp_path):
    """Row 8 of what failed once: it was larger than the dense one."""
    words = ["--rounds", "1", "--clients", "2", "--out"]
    cli.main(["run", "snip", *words, str(tmp_path / "snip"), "--set", "density=0.1"])
    cli.main(["run", "fedavg", *words, str(tmp_path / "dense")])
    small, dense = (
        (tmp_path / name / "model.safetensors").stat().st_size for name in ("snip", "dense")
    )
    assert 0.1 < small / dense < 0.15
    assert fl.load(tmp_path / "snip").density == pytest.approx(0.1, abs=1e-3)


def test_what_is_no_model(capsys, tmp_path):
    assert "it has no config.json" in refused(capsys, "evaluate", str(tmp_path), "--data", "digits")
    (tmp_path / "config.json").write_text("{}")
    line = refused(capsys, "export", str(tmp_path), "--format", "c")
    assert "it has no model.safetensors: finish the run with 'fedlean resume" in line
    (tmp_path / "model.safetensors").write_bytes(b"x" * 50)
    assert "cannot be read" in refused(capsys, "predict", str(tmp_path), "--data", "digits")
