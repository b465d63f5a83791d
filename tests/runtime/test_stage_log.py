"""What the log says of a method with stages: the part, what was measured, and who could train."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fedlean import cli

METHOD = """
from dataclasses import replace

from fedlean.methods.fedavg import client_update, fedavg


def staged(server, *, said: bool = True):
    plain = fedavg(server, local_steps=1, batch_size=5)

    def configure(state, devices):
        name = ["front", "rear"][state.round % 2]
        return [
            replace(task, hparams={**task.hparams, "stage": name})
            for task in plain.configure(state, devices)
        ]

    def report(state):
        return {"movement": state.round / 4, "slope": float("nan")}

    return plain._replace(configure=configure, report=report if said else None)


def unpriced(server):
    return fedavg(server, local_steps=1, batch_size=5)._replace(work=None)
"""


def logged(tmp_path: Path, monkeypatch, method: str, *more: str) -> list[dict]:
    (tmp_path / "staged_of_a_test.py").write_text(METHOD)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "staged_of_a_test", raising=False)
    cli.main(
        [
            *("run", f"staged_of_a_test:{method}", "--model", "mlp_13_7", "--clients", "3"),
            *("--rounds", "2", "--out", str(tmp_path / "out"), *more),
        ]
    )
    text = (tmp_path / "out" / "rounds.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_the_stage_and_what_the_method_reports(tmp_path, monkeypatch):
    """After each round, of the state that it left; a number that is none is null."""
    entries = logged(tmp_path, monkeypatch, "staged")
    assert [entry["stage"] for entry in entries] == ["front", "rear"]
    assert [entry["method"] for entry in entries] == [
        {"movement": 0.25, "slope": None},
        {"movement": 0.5, "slope": None},
    ]
    assert [(entry["devices"], entry["able_devices"]) for entry in entries] == [(3, 3)] * 2


def test_a_method_that_reports_nothing(tmp_path, monkeypatch):
    entries = logged(tmp_path, monkeypatch, "staged", "--set", "said=false")
    assert [entry["method"] for entry in entries] == [{}, {}]


def test_a_method_without_stages_or_prices(tmp_path, monkeypatch):
    """Nobody can say who could hold what a task takes."""
    entries = logged(tmp_path, monkeypatch, "unpriced")
    assert [entry["stage"] for entry in entries] == [None, None]
    assert [(entry["devices"], entry["able_devices"]) for entry in entries] == [(3, None)] * 2
