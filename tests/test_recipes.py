"""Every recipe runs: its configurations are valid and one round of its first run works."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedlean import recipe
from fedlean.cost.profile import load_profile, to_document
from fedlean.runtime.method import find_method, hyperparameters
from fedlean.runtime.run import RunConfig, differences

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
RECIPES = sorted(EXPERIMENTS.glob("*/recipe.py"))


def groups_of(path: Path) -> dict[str, dict[str, RunConfig]]:
    spec = importlib.util.spec_from_file_location(f"recipe_{path.parent.name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, "GROUPS", None) or {"all": module.RUNS}


# models whose recipes read 28 x 28 pixels; the others 3 x 32 x 32
GREY = {"conv2", "lenet300", "lenet5", "mlp"}


def small_set(tmp_path: Path, model: str) -> Path:
    rng = np.random.default_rng(0)
    n = 400
    folder = tmp_path / "set"
    folder.mkdir()
    shape = (n, 28, 28) if model in GREY else (n, 32, 32, 3)
    np.savez(
        folder / "small.npz",
        x=rng.integers(0, 256, shape, np.uint8),
        y=(np.arange(n) % 10).astype(np.uint8),
        client=(np.arange(n) // 10).astype(np.int32),
        split=(np.arange(n) >= 300).astype(np.uint8),
    )
    return folder


def test_there_are_recipes_and_each_has_a_card():
    assert RECIPES
    assert all((path.parent / "README.md").stat().st_size > 300 for path in RECIPES)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parent.name)
def test_settings_exist(path):
    for runs in groups_of(path).values():
        for config in runs.values():
            assert set(config.settings) <= set(hyperparameters(find_method(config.method)))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parent.name)
def test_a_round_of_each_run_and_the_comparison(path, tmp_path):
    (runs, *_) = groups_of(path).values()
    first, second, *_ = runs  # the baseline and what the experiment is about
    data = small_set(tmp_path, runs[first].model)
    folders = []
    for name in (first, second):
        settings = {**runs[name].settings, "cohort": 2}
        if "local_steps" in settings:
            settings["local_steps"] = 1
        if name == "prunefl":
            settings |= {"initial_max_passes": 1, "initial_passes": 1}
        config = replace(
            runs[name],
            dataset=str(data),
            clients=3,
            rounds=1,
            eval_examples=20,
            settings=settings,
        )
        folders.append(tmp_path / name)
        recipe.run_once(config, folders[-1])
        recipe.run_once(config, folders[-1])  # done: nothing happens
    recipe.compare(folders, tmp_path)
    recipe.compare_seeds([tmp_path] * 2, [first, second], tmp_path)
    assert (tmp_path / "compare.html").stat().st_size > 10_000
    assert f"| {second} |" in (tmp_path / "seeds.md").read_text()
    assert set(recipe.reported(folders[1])) > {"median_round_seconds", "density"}


def test_masks_from_names_a_run_beside():
    config = RunConfig("fixed_mask", settings={"masks_from": "prunefl", "lr": 0.1})
    there = recipe.beside(Path("out/iid/seed3"), config)
    absolute = str(Path("out/iid/seed3/prunefl").resolve())
    assert there.settings == {"masks_from": absolute, "lr": 0.1}
    assert recipe.beside(Path("out"), RunConfig("fedavg")) == RunConfig("fedavg")


def test_card_table_by_hand():
    """Twice as soon on one clock, half as soon on the other; 0.9 was never reached."""

    def run(simulated: float, measured: float, device: str = "pi") -> dict:
        first = {"round": 3, "simulated_seconds": simulated, "measured_seconds": measured}
        return {
            "time_to_accuracy": {"0.8": first, "0.9": None},
            "seconds_before_round_1": 5.0,
            "median_round_seconds": 2.0,
            "median_round_measured_seconds": 0.0125,
            "device": device,
            "density": 0.25,
            "final_accuracy": 0.875,
            "downlink_bytes": int(simulated * 1e8),
            "uplink_bytes": 0,
            "flops_per_client": 2e12,
            "flops_dense_gradient_per_client": 4e12,
            "median_round_memory_bytes": 2e6,
            "peak_memory_bytes": 3e6,
        }

    results = {"a": run(100, 1), "b": run(50, 2), "c": run(1, 0.5, "here")}
    heads, _, base, other, here = recipe.card_table(results).splitlines()
    assert base == (
        "| a | 100 s (round 3) | 1.0 s | not reached | – | 5 s | 2.0 s | 12 ms | 25.0% | 87.50% "
        "| 10.0 GB (1.00) | 2.00 T (1.00) | 4.00 T (1.00) | 2 / 3 MB |"
    )
    assert other.startswith("| b | 50 s (round 3), **2.00×** | 2.0 s, **0.50×** | not reached | – ")
    assert here.startswith("| c | (round 3) | 0.5 s, **2.00×** | not reached | – | – | – | 12 ms ")
    assert heads.count("|") == base.count("|") == other.count("|") == here.count("|")


def test_seeds_table_by_hand():
    def run(end: float, round: int | None) -> dict:
        return {
            "density": 0.2,
            "time_to_accuracy": {"0.9": {"round": round} if round else None},
            "final_accuracy": end,
            "uplink_bytes": 12_300,
            "downlink_bytes": 4_560_000,
            "flops_per_client": 7.89e9,
            "median_round_memory_bytes": 1e6,
        }

    _, _, line = recipe.seeds_table([{"a": run(0.95, 7)}, {"a": run(0.85, None)}]).splitlines()
    assert line == (
        "| a | 20.0% | 7 / – | 95.0 / 85.0% | 90.0% | 12.3 kB | 4.56 MB | 7.89 GFLOP | 1.00 MB |"
    )


def test_layer_table_by_hand(tmp_path):
    densities = [{"a": 1.0, "b": 1.0}, {"a": 0.5, "b": 0.25}, {"a": 0.5, "b": 0.25}]
    rows = [
        {"round": round, "layer_density": each, "density": each["b"]}
        for round, each in enumerate(densities)
    ]
    (tmp_path / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert recipe.layer_table(tmp_path).splitlines()[1:] == [
        "| --- | --- | --- | --- |",
        "| after round 0 | 100.0% | 100.0% | 100.0% |",
        "| after round 1 | 50.0% | 25.0% | 25.0% |",
    ]


def test_here_adds_a_run_of_prunefl_without_a_link(tmp_path, monkeypatch):
    ran = {}
    monkeypatch.setattr(recipe, "run_once", lambda config, folder: ran.update({folder: config}))
    monkeypatch.setattr(recipe, "compare", lambda folders, out: None)
    monkeypatch.setattr(recipe, "compare_seeds", lambda folders, names, out: None)
    monkeypatch.chdir(tmp_path)
    here = tmp_path / "board.json"
    here.write_text(json.dumps(to_document(load_profile("generic"))))
    command = ["recipe", "--data", "set", "--here", str(here), "--only", "prunefl"]
    monkeypatch.setattr("sys.argv", command)
    config = RunConfig("prunefl", device="raspberry_pi_4")
    recipe.main({"iid": {"fedavg": RunConfig("fedavg"), "prunefl": config}}, default_out="out")
    first, second = ran.values()
    assert [folder.name for folder in ran] == ["prunefl", "prunefl_here"]
    assert first.device == "raspberry_pi_4"
    assert replace(second, device=first.device) == first
    profile = load_profile(second.device)
    assert replace(profile, uplink_bytes_per_s=1.0).downlink_bytes_per_s >= 1e15
    assert profile.dense_flops_per_s == load_profile("generic").dense_flops_per_s


def test_in_turns_the_same_results_a_step_of_each_at_a_time(tmp_path):
    common = {"lr": 0.1, "cohort": 2}
    pruned = {**common, "reconfigure_every": 1, "initial_max_passes": 2}
    configs = {
        "fedavg": RunConfig("fedavg", rounds=3, settings=common),
        "prunefl": RunConfig("prunefl", rounds=3, settings=pruned),
    }
    recipe.run_all(configs, tmp_path / "one", in_turns=False)
    recipe.run_all(configs, tmp_path / "turns", in_turns=True)
    recipe.run_all(configs, tmp_path / "turns", in_turns=True)  # done: nothing happens
    for name in configs:
        one, turns = (tmp_path / how / name / "model.safetensors" for how in ("one", "turns"))
        assert one.read_bytes() == turns.read_bytes()


def test_in_turns_refuses_a_run_that_needs_another(tmp_path):
    configs = {"ticket": RunConfig("fixed_mask", settings={"masks_from": "prunefl"})}
    with pytest.raises(ValueError, match="ticket takes its mask"):
        recipe.run_all(configs, tmp_path, in_turns=True)


def test_only_skips_groups_without_such_a_run(monkeypatch):
    ran, compared, tables = [], [], []
    monkeypatch.setattr(recipe, "run_once", lambda config, folder: ran.append(str(folder)))
    monkeypatch.setattr(recipe, "compare", lambda folders, out: compared.append(str(out)))
    monkeypatch.setattr(recipe, "compare_seeds", lambda folders, names, out: tables.append(names))
    command = ["recipe", "--data", "set", "--only", "snip", "--seeds", "1", "2"]
    monkeypatch.setattr("sys.argv", command)
    groups = {"iid": {"fedavg": RunConfig("fedavg")}, "own": {"snip": RunConfig("snip")}}
    recipe.main(groups, default_out="out")
    assert ran == ["out/own/seed1/snip", "out/own/seed2/snip"]
    assert compared == ["out/own/seed1", "out/own/seed2"]
    assert tables == [["snip"]]


def test_a_recipe_that_names_no_engine_takes_the_run_of_any():
    config = RunConfig("fedavg")
    native = replace(config, engine="native")
    assert differences(config, native) == []
    assert differences(replace(config, engine="torch"), native) == ["engine"]
    assert differences(config, replace(native, seed=1)) == ["seed"]


def test_a_setting_that_is_left_out_is_the_default():
    lr = hyperparameters(find_method("fedavg"))["lr"].default
    assert differences(RunConfig("fedavg"), RunConfig("fedavg", settings={"lr": lr})) == []
    other = RunConfig("fedavg", settings={"lr": 2 * lr})
    assert differences(RunConfig("fedavg"), other) == ["settings"]
