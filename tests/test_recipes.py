"""Every recipe runs: its configurations are valid and one round of its first run works."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from fedlean import recipe
from fedlean.algorithm import Server
from fedlean.cost.profile import load_profile, to_document
from fedlean.data.load import load_dataset as load
from fedlean.engine.open import engine_for
from fedlean.models.catalog import build as build_model
from fedlean.report.card import reported
from fedlean.runtime.config import RunConfig, differences
from fedlean.runtime.method import build as build_method
from fedlean.runtime.method import find_method, hyperparameters

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
RECIPES = sorted(EXPERIMENTS.glob("*/recipe.py"))


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"recipe_{path.parent.name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def groups_of(path: Path) -> dict[str, dict[str, RunConfig]]:
    module = loaded(path)
    return getattr(module, "GROUPS", None) or {"all": module.RUNS}


def smoke_of(path: Path) -> dict[str, int]:
    return getattr(loaded(path), "SMOKE", {})


INPUT_SHAPE, CLASSES = (3, 32, 32), 10  # models are built for whatever the data is


def small_set(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    n = 400
    folder = tmp_path / "set"
    folder.mkdir()
    np.savez(
        folder / "small.npz",
        x=rng.integers(0, 256, (n, 32, 32, 3), np.uint8),
        y=(np.arange(n) % CLASSES).astype(np.uint8),
        client=(np.arange(n) // 10).astype(np.int32),
        split=(np.arange(n) >= 300).astype(np.uint8),
    )
    return folder


def test_there_are_recipes_and_each_has_a_card():
    assert RECIPES
    assert all((path.parent / "README.md").stat().st_size > 300 for path in RECIPES)


def server_of(config: RunConfig) -> Server:
    spec = build_model(config.model, INPUT_SHAPE, CLASSES)
    engine, _ = engine_for(spec, config.engine, 1)
    return Server(spec, engine, 0, config.rounds, load_profile(config.device), config.init)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parent.name)
def test_every_run_of_every_group_is_valid(path):
    """Each method takes its settings; `start` is a run before it in its group."""
    for runs in groups_of(path).values():
        names = list(runs)
        for name, config in runs.items():
            before = names[: names.index(name)]
            assert not config.start or config.start in before
            build_method(config.method, server_of(config), config.settings)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parent.name)
def test_every_smoke_run_is_valid(path):
    """What a method refuses in so few rounds would end the whole smoke run."""
    for runs in groups_of(path).values():
        for each in runs.values():
            config = recipe.short(each, smoke_of(path))
            build_method(config.method, server_of(config), config.settings)


def test_a_recipe_caps_the_settings_of_its_own_method():
    """Beside those that all recipes have; what is below its cap stays, and what has none."""
    config = RunConfig("snip", settings={"local_steps": 9, "batch_size": 20, "lr": 0.5})
    short = recipe.short(config, {"batch_size": 3, "momentum": 1, "unknown": 1}).settings
    assert (short["local_steps"], short["batch_size"], short["lr"]) == (2, 3, 0.5)
    assert recipe.short(config, {"local_steps": 1}).settings["local_steps"] == 1
    assert "unknown" not in short


def test_smoke_of_a_recipe_is_taken(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(recipe, "run_once", lambda config, folder: ran.append(config))
    monkeypatch.setattr(recipe, "compare", lambda folders, out: None)
    monkeypatch.setattr(recipe, "compare_seeds", lambda folders, names, out, **_: None)
    monkeypatch.setattr("sys.argv", ["recipe", "--data", "set", "--out", str(tmp_path), "--smoke"])
    runs = {"fedavg": RunConfig("fedavg")}
    recipe.main({"iid": runs}, default_out="out", smoke={"batch_size": 4})
    assert [config.settings["batch_size"] for config in ran] == [4]


def test_smoke_is_short_and_beside_the_full_runs(tmp_path, monkeypatch):
    ran = {}
    monkeypatch.setattr(recipe, "run_once", lambda config, folder: ran.update({folder: config}))
    monkeypatch.setattr(recipe, "compare", lambda folders, out: None)
    monkeypatch.setattr(recipe, "compare_seeds", lambda folders, names, out, **_: None)
    runs = {
        "prunefl": RunConfig("prunefl", settings={"initial_passes": 50, "lr": 0.25}),
        "synflow": RunConfig("synflow"),
        "fedavg": RunConfig("fedavg"),
    }
    monkeypatch.setattr("sys.argv", ["recipe", "--data", "set", "--out", str(tmp_path), "--smoke"])
    recipe.main({"iid": runs}, default_out="out")
    short = {folder.name: config for folder, config in ran.items()}
    assert {folder.parent for folder in ran} == {tmp_path / "smoke" / "iid" / "seed0"}
    pruned = {"initial_passes": 1, "initial_max_passes": 2, "reconfigure_every": 2, "lr": 0.25}
    all_runs = {"cohort": 2, "local_steps": 2}
    assert short["prunefl"].settings == {**pruned, "initial_batches": 2, **all_runs}
    assert short["synflow"].settings == {"synflow_steps": 5, **all_runs}
    assert short["fedavg"].settings == all_runs  # without a warm-up, none is put in
    for config in ran.values():
        assert config.rounds == recipe.SMOKE_ROUNDS
        assert config.eval_examples == config.final_eval_examples == recipe.SMOKE_EXAMPLES


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parent.name)
def test_a_round_of_each_run_and_the_comparison(path, tmp_path):
    (runs, *_) = groups_of(path).values()
    first, second, *_ = runs  # the baseline and what the experiment is about
    data = small_set(tmp_path)
    folders = []
    for name in (first, second):
        settings = {**runs[name].settings, "cohort": 2}
        if "local_steps" in settings:
            settings["local_steps"] = 1
        if "lr" in settings:
            settings["lr"] = 1e-3  # on noise the recipes' own diverge
        if name == "prunefl":
            settings |= {"initial_max_passes": 1, "initial_passes": 1}
        config = replace(
            runs[name],
            dataset=str(data),
            clients=3,
            fleet=None,  # of as many devices as the recipe has clients
            rounds=1,
            eval_examples=20,
            settings=settings,
        )
        folders.append(tmp_path / name)
        recipe.run_once(config, folders[-1])
        recipe.run_once(config, folders[-1])  # done: nothing happens
    recipe.compare(folders, tmp_path)
    recipe.compare_seeds([tmp_path], [first, second], tmp_path, in_turns=True)
    assert (tmp_path / "compare.html").stat().st_size > 10_000
    assert second in (tmp_path / "accuracy.svg").read_text()
    for table in ("seeds.md", "clock.md"):
        assert f"| {second} |" in (tmp_path / table).read_text()
    assert set(reported(folders[1])) > {"median_round_seconds", "density"}


def test_start_names_a_run_beside():
    absolute = str(Path("out/iid/seed3/prunefl").resolve())
    config = RunConfig("fixed_mask", start="prunefl", start_weights="random")
    there = recipe.beside(Path("out/iid/seed3"), config)
    assert there == replace(config, start=absolute)
    assert recipe.beside(Path("out"), RunConfig("fedavg")) == RunConfig("fedavg")


def test_here_is_offered_where_a_run_follows_the_clock(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["recipe", "--data", "set", "--here", "board.json"])
    with pytest.raises(SystemExit):
        recipe.main({"iid": {"fedavg": RunConfig("fedavg")}}, default_out="out")
    assert "unrecognized arguments: --here" in capsys.readouterr().err


def test_here_adds_a_run_without_a_link(tmp_path, monkeypatch):
    ran = {}
    monkeypatch.setattr(recipe, "run_once", lambda config, folder: ran.update({folder: config}))
    monkeypatch.setattr(recipe, "compare", lambda folders, out: None)
    monkeypatch.setattr(recipe, "compare_seeds", lambda folders, names, out, **_: None)
    monkeypatch.chdir(tmp_path)
    here = tmp_path / "board.json"
    here.write_text(json.dumps(to_document(load_profile("generic"))))
    command = ["recipe", "--data", "set", "--here", str(here), "--only", "prunefl"]
    monkeypatch.setattr("sys.argv", command)
    config = RunConfig("prunefl", device="raspberry_pi_4")
    groups = {"iid": {"fedavg": RunConfig("fedavg"), "prunefl": config}}
    recipe.main(groups, default_out="out", here=["prunefl", "fedavg"])  # not run: --only
    first, second = ran.values()
    assert [folder.name for folder in ran] == ["prunefl", "prunefl_here"]
    assert first.device == "raspberry_pi_4"
    assert replace(second, device=first.device) == first
    profile = load_profile(second.device)
    assert replace(profile, uplink_bytes_per_s=1.0).downlink_bytes_per_s >= 1e15
    assert profile.dense_flops_per_s == load_profile("generic").dense_flops_per_s


def test_in_turns_the_same_results_a_step_of_each_at_a_time(tmp_path, monkeypatch):
    common = {"lr": 0.1, "cohort": 2}
    pruned = {**common, "reconfigure_every": 1, "initial_max_passes": 2}
    configs = {
        "fedavg": RunConfig("fedavg", rounds=3, settings=common),
        "prunefl": RunConfig("prunefl", rounds=3, settings=pruned),
    }
    loaded = []
    monkeypatch.setattr(recipe, "load_dataset", lambda name, _: loaded.append(name) or load(name))
    recipe._loaded.cache_clear()
    recipe.run_all(configs, tmp_path / "one", in_turns=False)
    recipe.run_all(configs, tmp_path / "turns", in_turns=True)
    recipe.run_all(configs, tmp_path / "turns", in_turns=True)  # done: nothing happens
    for name in configs:
        one, turns = (tmp_path / how / name / "model.safetensors" for how in ("one", "turns"))
        assert one.read_bytes() == turns.read_bytes()
    assert loaded == ["digits"], "once for the four runs"


def test_in_turns_refuses_a_run_that_needs_another(tmp_path):
    config = RunConfig("fixed_mask", start="prunefl")
    with pytest.raises(ValueError, match="ticket starts from another run"):
        recipe.run_all({"ticket": config}, tmp_path, in_turns=True)


def test_only_skips_groups_without_such_a_run(monkeypatch):
    ran, compared, tables = [], [], []
    monkeypatch.setattr(recipe, "run_once", lambda config, folder: ran.append(str(folder)))
    monkeypatch.setattr(recipe, "compare", lambda folders, out: compared.append(str(out)))
    monkeypatch.setattr(
        recipe, "compare_seeds", lambda folders, names, out, **_: tables.append(names)
    )
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
