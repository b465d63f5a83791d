"""`fedlean plan` from the command line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from fedlean import cli
from fedlean.data import digits

FEW = ["--method", "fedavg", "snip", "heterofl"]


def said(capsys, *arguments: str) -> str:
    capsys.readouterr()
    cli.main(["plan", *arguments])
    return capsys.readouterr().out


def fails(capsys, *arguments: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plan", *arguments])
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and not out
    assert err.startswith("fedlean: ") and err.count("\n") == 1, err
    return err


def test_what_is_known_of_digits_without_loading_them():
    data = digits.load_digits()
    assert data.input_shape == digits.SHAPE and data.classes == digits.CLASSES
    assert len(data.y_train) == digits.TRAINING_EXAMPLES


def test_a_table_for_each_model_and_device_within_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = said(capsys, "--model", "lenet300", "--model", "conv2", "--memory", "1GB", "2MB", *FEW)
    assert out.count("method, phase") == 4 and out.count("-> ") == 4
    assert "conv2 (598,922 parameters) on raspberry_pi_4 with 2.00 MB, " in out
    assert max(map(len, out.splitlines())) <= 80


def test_all_methods_by_default(capsys):
    out = said(capsys)
    for name in ("fedavg", "prunefl", "depthfl", "ntk_zo", "fixed_mask is left out"):
        assert name in out


def test_json_and_page(capsys, tmp_path):
    page = tmp_path / "a" / "plan.html"
    document = json.loads(said(capsys, "--json", "--out", str(page), "--batch", "7", *FEW))
    assert page.read_text().startswith("<!doctype html>")
    assert document["devices"][0]["model"] == "lenet300"
    small = document["devices"][0]["methods"][0]["phases"][0]["memory"]["activations_bytes"]
    large = json.loads(said(capsys, "--json", "--batch", "70", *FEW))
    again = large["devices"][0]["methods"][0]["phases"][0]["memory"]["activations_bytes"]
    assert again > 2 * small


def test_the_stages_of_resnet18(capsys, monkeypatch):
    """Each of them by its name, in its order."""
    monkeypatch.setenv("COLUMNS", "80")
    chosen = ["--model", "resnet18", "--input-shape", "3x32x32", "--classes", "10"]
    out = said(capsys, *chosen, "--method", "smartfreeze", "profl", "neulite")
    words = [" ".join(line.split()[:3]) for line in out.splitlines()]
    first = words.index("smartfreeze")
    stages = [f"stage{number}" for number in (1, 2, 3, 4)]
    shrinking = [(way, stage) for stage in stages[:0:-1] for way in ("shrink", "map")]
    listed = [
        *("smartfreeze", *stages),
        *("profl", *(f"{way} {stage}" for way, stage in shrinking)),
        *(f"grow {stage}" for stage in stages),
        *("neulite", *stages),
    ]
    found = words[first : first + len(listed)]
    assert all(word.startswith(name) for word, name in zip(found, listed, strict=True)), found


def test_shapes_and_settings(capsys):
    document = json.loads(
        said(capsys, "--json", "--input-shape", "3x16x16", "--classes", "7",
             "--set", "density=0.5", "--local-steps", "3", *FEW)
    )  # fmt: skip
    assert document["input_shape"] == [3, 16, 16] and document["classes"] == 7
    snip = document["devices"][0]["methods"][1]
    assert snip["knob"]["value"] == 0.5


def test_a_fleet(capsys, tmp_path):
    path = tmp_path / "fleet.toml"
    path.write_text("devices = 4\n[memory_bytes]\nuniform = [1e5, 5e5]\n")
    out = said(capsys, "--fleet", str(path), *FEW)
    assert "the fleet's median device" in out and " can " in out and "devices get width" in out


def test_errors(capsys, tmp_path):
    assert "nearest: fedavg" in fails(capsys, "--method", "fedavgg")
    assert "size like 128MB" in fails(capsys, "--memory", "lots")
    assert "size like 128MB" in fails(capsys, "--memory", "0MB")
    assert "size like 128MB" in fails(capsys, "--memory", "9" * 400 + "MB")
    assert "no device profile named 'raspberry_pi_3'" in fails(capsys, "--device", "raspberry_pi_3")
    assert "sides like 3x32x32" in fails(capsys, "--input-shape", "1x2x3x4")
    assert "sides like 3x32x32" in fails(capsys, "--input-shape", "ax2")
    assert "leave out one" in fails(capsys, "--dataset", "digits", "--input-shape", "1x8x8")
    assert "goes with --input-shape" in fails(capsys, "--classes", "3")
    assert "at least 2" in fails(capsys, "--input-shape", "1x8x8", "--classes", "1")
    assert "key=value" in fails(capsys, "--set", "density")
    assert "has a setting 'densty'" in fails(capsys, "--set", "densty=1")
    assert "must be a number" in fails(capsys, "--method", "snip", "--set", "density=much")
    assert "whole number" in fails(capsys, "--batch", "2.5")
    assert "batch_size must be at least 1, got 0" in fails(capsys, "--batch", "0")
    assert "local_steps must be at least 1, got -1" in fails(capsys, "--local-steps", "-1")
    assert "lr must be a finite number, got nan" in fails(capsys, "--set", "lr=nan")
    assert "no method could be planned; fedavg: lr must" in fails(
        capsys, "--method", "fedavg", "--set", "lr=-1"
    )
    assert "is a folder" in fails(capsys, "--out", str(tmp_path))
    assert "fleet" in fails(capsys, "--fleet", str(tmp_path / "none.toml"))


def test_it_loads_neither_torch_nor_the_data_set():
    code = (
        "import sys; from fedlean import cli\n"
        "cli.main(['plan', '--method', 'fedavg'])\n"
        "assert not {'torch', 'sklearn', 'matplotlib'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
