"""The fleets of experiments/fleets: what they draw, and that the trace is what its script makes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from fedlean.cost.profile import load_profile
from fedlean.fleet.load import load_fleet

FLEETS = Path(__file__).parents[2] / "experiments" / "fleets"
GENERIC = load_profile("generic")


def fleet_of(name: str):
    return load_fleet(FLEETS / name, GENERIC).fleet


def test_the_released_limits():
    """Of 50 clients, uniform and anew in each round; compute as seconds of 16 steps of 64."""
    fleet = fleet_of("yao2024.toml")
    assert fleet.size == 50
    found = [device for step in range(1, 101) for device in fleet.present(0, step, 50)]
    assert len(found) == 5000
    memory = np.array([device.memory_bytes for device in found]) / 2**20
    assert memory.min() == pytest.approx(43, abs=0.2) and memory.max() == pytest.approx(
        223, abs=0.2
    )
    assert memory.mean() == pytest.approx(133, abs=3) and memory.std() == pytest.approx(52, abs=2)
    seconds = np.array([device.budget_seconds for device in found])
    operations = seconds * GENERIC.dense_flops_per_s / (6 * 16 * 64)
    million = operations / 2**20
    assert million.min() == pytest.approx(531, abs=4) and million.max() == pytest.approx(
        3563, abs=4
    )
    assert million.mean() == pytest.approx(2047, abs=50)
    assert abs(np.corrcoef(memory, million)[0, 1]) < 0.07
    profile = found[0].profile
    assert profile is not None and 2 * 1e9 / profile.uplink_bytes_per_s < 0.01


def test_the_trace_is_what_its_script_makes():
    path = FLEETS / "mobile_trace.py"
    spec = importlib.util.spec_from_file_location("mobile_trace", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    assert (FLEETS / "mobile.csv").read_text() == "\n".join(module.lines()) + "\n"


def test_the_phones_of_the_trace():
    fleet = fleet_of("mobile.toml")
    assert fleet.size == 20
    found = [fleet.present(0, step, 20) for step in range(1, 201)]
    assert 16.5 < np.mean([len(devices) for devices in found]) < 19
    every = [device for devices in found for device in devices]
    assert all(device.budget_seconds == 120 for device in every)
    memory = np.array([device.memory_bytes for device in every])
    assert memory.min() >= 0.995 * 43 * 2**20 and memory.max() <= 1.005 * 223 * 2**20
    rates = np.array([device.profile.uplink_bytes_per_s for device in every if device.profile])
    assert rates.min() < 1e5 and rates.max() > 1.5e6 and 2e5 < np.median(rates) < 1e6
    assert fleet.present(0, 1, 20) == fleet.present(7, 5, 20), "a trace is not drawn again"
    assert fleet.present(0, 1, 20) != fleet.present(0, 6, 20)
    assert fleet.present(0, 500, 20) == fleet.present(0, 200, 20)
