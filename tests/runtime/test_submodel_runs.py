"""Runs of the methods that give devices sub-models: with a fleet, killed, resumed, and saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from fedlean.models.lenet300 import lenet300
from fedlean.runtime.config import RunConfig
from fedlean.runtime.how import How
from fedlean.runtime.run import resume, start
from fedlean.submodels.exits import ending_at, with_exits
from fedlean.submodels.width import width

FLEET = """\
devices = 6
memory_bytes = { choice = [70e3, 150e3, 400e3], redrawn = "once" }
"""
SPEC = lenet300((1, 8, 8), 10)
EXITS = with_exits(SPEC)
# what is saved: of lenet300 a step takes 330, 138 and 65 kB by width, 352 and 203 kB by depth,
# 330, 225, 150, 112 and 93 kB by density
SAVED = {
    "allsmall": width(SPEC, 0.25).spec,
    "exclusivefl": SPEC,
    "heterofl": SPEC,
    "depthfl": ending_at(EXITS, 2).spec,
    "fiarse": SPEC,
}


class Killed(Exception):
    pass


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", SAVED)
def test_a_run_with_a_fleet_is_resumed_and_ends_bit_equal(tmp_path: Path, method: str):
    fleet = tmp_path / "boards.toml"
    fleet.write_text(FLEET)
    config = RunConfig(method, fleet=str(fleet), rounds=4, seed=1)
    start(config, tmp_path / "whole", How())

    def kill(entry: dict[str, Any]) -> None:
        if len(lines(tmp_path / "killed")) == 2:
            raise Killed

    with pytest.raises(Killed):
        start(config, tmp_path / "killed", How(kill, checkpoint_seconds=0.0))
    resume(tmp_path / "killed", How())
    whole, killed = (tmp_path / name / "model.safetensors" for name in ("whole", "killed"))
    assert whole.read_bytes() == killed.read_bytes()
    shapes = {name: value.shape for name, value in load_file(whole).items()}
    assert shapes == dict(SAVED[method].tensor_shapes)
    entries = lines(tmp_path / "whole")
    assert len({entry["accuracy"] for entry in entries}) > 1
    asked = {client for entry in entries for client in entry["cohort"]}
    left_out = {client for entry in entries for client in entry["left_out"]}
    assert (len(asked), bool(left_out)) == {
        "allsmall": (6, False),
        "heterofl": (6, False),
        "exclusivefl": (len(asked), False),
        "depthfl": (len(asked), True),
        "fiarse": (len(asked), True),
    }[method]
    assert 0 < len(asked) < 6 or method in ("allsmall", "heterofl")
