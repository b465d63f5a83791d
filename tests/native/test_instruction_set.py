"""FEDLEAN_INSTRUCTION_SET: which kernels a process runs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from fedlean.engine.open import open_engine

VARIABLE = "FEDLEAN_INSTRUCTION_SET"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("fedlean._native") is None,
    reason="the native engine is not built: there is no fedlean._native",
)


def test_reference_is_everywhere(monkeypatch):
    monkeypatch.setenv(VARIABLE, "reference")
    assert open_engine("native", 1).instruction_set == "reference"


@pytest.mark.parametrize("value", [None, ""])
def test_unset_and_empty_give_the_same(monkeypatch, value):
    monkeypatch.delenv(VARIABLE, raising=False)
    fastest = open_engine("native", 1).instruction_set
    if value is not None:
        monkeypatch.setenv(VARIABLE, value)
    assert open_engine("native", 1).instruction_set == fastest
    assert fastest in ("reference", "avx2", "avx512", "neon")


@pytest.mark.parametrize("value", ["sse2", "AVX2", " reference"])
def test_unknown_one_is_refused(monkeypatch, value):
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(ValueError, match=VARIABLE) as refused:
        open_engine("native", 1)
    said = str(refused.value)
    assert f'"{value}"' in said
    assert "reference" in said
    assert "unset it" in said


def test_one_of_another_processor_is_refused(monkeypatch):
    """Not an illegal instruction later on."""
    monkeypatch.delenv(VARIABLE, raising=False)
    on_arm = open_engine("native", 1).instruction_set == "neon"
    monkeypatch.setenv(VARIABLE, "avx2" if on_arm else "neon")
    with pytest.raises(ValueError, match="this processor and build have: reference"):
        open_engine("native", 1)


def test_command_line_says_so_in_one_line(tmp_path):
    command = [sys.executable, "-m", "fedlean.cli", "run", "fedavg", "--engine", "native"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "run")],
        env=os.environ | {VARIABLE: "sse2"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert VARIABLE in done.stderr
    assert "sse2" in done.stderr
    assert not list(tmp_path.iterdir())
