"""Every recipe runs: its configurations are valid and one round of its first run works."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedlean import recipe
from fedlean.runtime.method import find_method, hyperparameters
from fedlean.runtime.run import RunConfig

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
RECIPES = sorted(EXPERIMENTS.glob("*/recipe.py"))


def groups_of(path: Path) -> dict[str, dict[str, RunConfig]]:
    spec = importlib.util.spec_from_file_location(f"recipe_{path.parent.name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, "GROUPS", None) or {"all": module.RUNS}


@pytest.fixture
def small_set(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    n = 400
    folder = tmp_path / "set"
    folder.mkdir()
    np.savez(
        folder / "small.npz",
        x=rng.integers(0, 256, (n, 28, 28), np.uint8),
        y=(np.arange(n) % 10).astype(np.uint8),
        client=(np.arange(n) // 10).astype(np.int32),
        split=(np.arange(n) >= 300).astype(np.uint8),
    )
    return folder


def test_there_are_recipes_and_each_has_a_card():
    assert RECIPES
    assert all((path.parent / "README.md").is_file() for path in RECIPES)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parent.name)
def test_settings_exist(path):
    for runs in groups_of(path).values():
        for config in runs.values():
            assert set(config.settings) <= set(hyperparameters(find_method(config.method)))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parent.name)
def test_a_round_of_each_run_and_the_comparison(path, small_set, tmp_path):
    (runs, *_) = groups_of(path).values()
    folders = []
    for name in ("fedavg", "prunefl"):
        settings = {**runs[name].settings, "local_steps": 1}
        if name == "prunefl":
            settings["initial_max_passes"] = 1
        config = replace(
            runs[name], dataset=str(small_set), rounds=1, eval_examples=20, settings=settings
        )
        folders.append(tmp_path / name)
        recipe.run_once(config, folders[-1])
        recipe.run_once(config, folders[-1])  # done: nothing happens
    recipe.compare(folders, tmp_path)
    assert (tmp_path / "compare.html").stat().st_size > 10_000
    assert set(recipe.reported(folders[1])) > {"median_round_seconds", "density"}


def test_a_recipe_that_names_no_engine_takes_the_run_of_any():
    config = RunConfig("fedavg")
    assert recipe.repeats(config, replace(config, engine="native"))
    assert not recipe.repeats(replace(config, engine="torch"), replace(config, engine="native"))
    assert not recipe.repeats(config, replace(config, engine="native", seed=1))


def test_card_table_by_hand():
    """1,000 s against 400 s is 2.50 times sooner; 1 + 1 GB against 0.4 + 0.1 GB is a quarter."""

    def run(seconds: float | None, gigabytes: float) -> dict:
        reached = None if seconds is None else {"simulated_seconds": seconds, "round": 7}
        return {
            "time_to_accuracy": {"0.95": reached},
            "downlink_bytes": gigabytes * 5e8,
            "uplink_bytes": gigabytes * 5e8,
            "flops_per_client": 2e12,
            "seconds_before_round_1": 0.0,
            "median_round_seconds": 12.34,
            "density": 0.5,
            "final_accuracy": 0.987,
            "median_round_memory_bytes": 1e6,
            "peak_memory_bytes": 2e6,
        }

    table = recipe.card_table({"a": run(1000, 2), "b": run(400, 0.5), "c": run(None, 2)})
    head, _, a, b, c = table.splitlines()
    assert head.startswith("| run | 95% |")
    assert a.startswith("| a | 1000 s (round 7) |")
    assert b.startswith("| b | 400 s (round 7), **2.50×** |") and "0.5 GB (0.25)" in b
    assert c.startswith("| c | not reached |")
