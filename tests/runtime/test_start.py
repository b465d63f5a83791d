"""The model that a run starts from: what is read, what is refused, and that the run keeps it."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from federation import SPEC, first_model, params, same
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from fedlean.core import Model
from fedlean.models.catalog import build
from fedlean.models.initialise import init_params
from fedlean.models.lenet300 import lenet300
from fedlean.pruning.density import full_masks
from fedlean.runtime.config import RunConfig, read_config
from fedlean.runtime.how import How
from fedlean.runtime.modelfile import read_stored
from fedlean.runtime.older import in_todays_words
from fedlean.runtime.run import resume, start
from fedlean.runtime.start import first_model as started
from fedlean.spec import ModelSpec
from fedlean.tree import apply_mask

SEED = 5  # of the run that pruned
LENET = build("lenet300", (1, 8, 8), 10)
CONFIG = RunConfig("fixed_mask", seed=11)


def masks() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {name: rng.random(mask.shape) < 0.4 for name, mask in full_masks(SPEC).items()}


def trained() -> dict[str, np.ndarray]:
    return apply_mask({name: value + 0.5 for name, value in params().items()}, masks())


def write_run(folder: Path, *, spec=SPEC, tensors=None, kept=None) -> str:
    """A run folder as far as it is read; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"seed": SEED, "method": "prunefl", "spec": json.loads(spec.to_json())}
    (folder / "config.json").write_text(json.dumps(config))
    kept = masks() if kept is None else kept
    stored = {f"{name}.mask": mask.astype(np.uint8) for name, mask in kept.items()}
    save_file({**(tensors or trained()), **stored}, folder / "model.safetensors")
    return str(folder)


def begun(folder: str, weights: str = "trained") -> Model:
    return started(replace(CONFIG, start=folder, start_weights=weights), SPEC)


def test_each_start_by_hand(tmp_path):
    """Masked: what seed 5 draws, what this run's seed does not draw, the run's final weights."""
    folder = write_run(tmp_path / "run")
    models = {weights: begun(folder, weights) for weights in ("original", "random", "trained")}
    assert same(models["original"].params, apply_mask(init_params(SPEC, SEED), masks()))
    assert same(models["trained"].params, trained())
    fresh = models["random"].params
    for other in (init_params(SPEC, CONFIG.seed), init_params(SPEC, SEED)):
        for name in SPEC.prunable:
            assert not (fresh[name] == other[name])[masks()[name]].any()
    bound = 1 / 8  # of fc1: 1/sqrt(64)
    assert 0.9 * bound < np.abs(fresh["fc1.weight"]).max() <= bound
    for model in models.values():
        assert same(dict(model.masks), masks())
    assert same(started(CONFIG, SPEC), Model(SPEC, init_params(SPEC, 11)))


def test_a_file_is_a_start_too(tmp_path):
    write_run(tmp_path / "run")
    path = str(tmp_path / "run" / "model.safetensors")
    assert same(begun(path), begun(str(tmp_path / "run")))
    with pytest.raises(ValueError, match=r"a file.*give the folder"):
        begun(path, "original")


def test_weights_outside_the_mask_do_not_come_back(tmp_path):
    """Whatever a file holds there, a pruned weight is 0."""
    folder = write_run(tmp_path / "run", tensors=dict(params()))
    assert same(begun(folder).params, apply_mask(params(), masks()))


def test_a_run_reads_what_another_left_and_keeps_it(tmp_path):
    """A real run of a pruning method, then its ticket; resumed when the first folder has gone."""
    config = RunConfig(
        "prunefl",
        rounds=2,
        clients=3,
        seed=7,
        settings={"initial_max_passes": 40, "initial_stable": 1, "prunable_fraction": 0.5},
    )
    start(config, tmp_path / "pruned", How())
    stored = read_stored(tmp_path / "pruned" / "model.safetensors", LENET).model
    kept = stored.masks["fc1.weight"]
    assert not kept.all()
    ticket = RunConfig(
        "fixed_mask",
        rounds=2,
        clients=3,
        settings={"lr": 1e-9},
        start=str(tmp_path / "pruned"),
        start_weights="original",
    )
    said = []
    start(ticket, tmp_path / "ticket", How(say=said.append))
    assert any("starts from" in line and "original" in line for line in said)
    again = read_stored(tmp_path / "ticket" / "model.safetensors", LENET).model
    assert np.array_equal(again.masks["fc1.weight"], kept)
    document = json.loads((tmp_path / "ticket" / "config.json").read_text())
    spec = ModelSpec.from_json(json.dumps(document["spec"]))
    original = np.where(kept, init_params(spec, 7)["fc1.weight"], 0)
    np.testing.assert_allclose(again.params["fc1.weight"], original, atol=1e-6)
    shutil.rmtree(tmp_path / "pruned")
    for left in ("checkpoint", "rounds.jsonl", "summary.json"):
        gone = tmp_path / "ticket" / left
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    resume(tmp_path / "ticket", How())  # from the beginning: no checkpoint is left
    assert same(read_stored(tmp_path / "ticket" / "model.safetensors", LENET).model, again)


def test_a_model_of_the_callers_is_a_start(tmp_path):
    """Given weights go into round 1, and a model of another spec is refused."""
    spec = build("lenet300", (1, 8, 8), 10)
    given = Model(spec, {name: value + 1 for name, value in init_params(spec, 3).items()})
    config = RunConfig("fedavg", rounds=1, clients=2, settings={"lr": 1e-9})
    start(config, tmp_path / "run", How(), first=given)
    left = load_file(tmp_path / "run" / "model.safetensors")
    np.testing.assert_allclose(left["fc1.weight"], given.params["fc1.weight"], atol=1e-5)
    with pytest.raises(ValueError, match="another one than the run's"):
        start(config, tmp_path / "other", How(), first=first_model())
    assert not (tmp_path / "other").exists()


def test_a_method_that_chooses_its_mask_refuses_one(tmp_path):
    spec = build("lenet300", (1, 8, 8), 10)
    given = Model(spec, init_params(spec, 3), full_masks(spec))
    for method in ("fedavg", "snip", "iterative"):
        config = RunConfig(method, rounds=60, clients=2)
        with pytest.raises(ValueError, match=r"has masks.*fixed_mask"):
            start(config, tmp_path / "run", How(), first=given)
        assert not (tmp_path / "run").exists()


def change_config(folder: Path, **changes: object) -> None:
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**document, **changes}))


def not_finite(value: float) -> dict[str, np.ndarray]:
    tensors = {name: tensor.copy() for name, tensor in trained().items()}
    tensors["fc1.weight"][0, 0] = value
    return tensors


def odd_mask(value: float, dtype: type) -> dict[str, np.ndarray]:
    """A mask of another name, so that the run's own does not take its place."""
    return {**trained(), "odd.mask": np.full((2, 2), value, dtype)}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json.*--out"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors.*fedlean resume"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
        (lambda f: (f / "config.json").write_text("{}"), "config.json is damaged: KeyError"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "safetensors is damaged"),
        (lambda f: (f / "config.json").write_text("[" * 10**6), "config.json is damaged"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json is damaged"),
        (lambda f: change_config(f, seed=float("nan")), "config.json is damaged.*NaN"),
        (lambda f: change_config(f, seed="1"), "config.json is damaged.*seed is '1'"),
        (lambda f: change_config(f, init="os:system"), "damaged.*init is 'os:system'"),
        (lambda f: change_config(f, init=[]), r"damaged.*init is \[\]"),
        (lambda f: write_run(f, tensors=not_finite(np.nan)), "damaged.*NaN or infinite"),
        (lambda f: write_run(f, tensors=not_finite(-np.inf)), "damaged.*NaN or infinite"),
        (lambda f: write_run(f, tensors=odd_mask(np.nan, np.float32)), "must hold 0 and 1"),
        (lambda f: write_run(f, tensors=odd_mask(2, np.uint8)), "must hold 0 and 1"),
        (lambda f: os.truncate(f / "model.safetensors", 1 << 40), f"has {1 << 40} bytes"),
        (
            lambda f: write_run(f, tensors={"fc1.weight": np.zeros((2, 2), np.float32)}),
            "safetensors is damaged.*tensor",
        ),
        (lambda f: write_run(f, kept={"fc1.bias": np.ones(12, bool)}), "'fc1.bias'"),
        (lambda f: write_run(f, kept={"fc1.weight": np.ones((2, 2), bool)}), r"\(2, 2\)"),
    ],
)
def test_a_run_that_cannot_serve_is_named(tmp_path, damage, message):
    folder = tmp_path / "run"
    write_run(folder)
    damage(folder)
    with pytest.raises(ValueError, match=message):
        begun(str(folder))


def test_a_run_of_another_model_is_refused(tmp_path):
    folder = write_run(tmp_path / "run", spec=lenet300((1, 8, 8), 3))
    with pytest.raises(ValueError, match=r"another model.*--model"):
        begun(folder)


def test_a_model_that_is_not_the_runs_own_says_so(tmp_path):
    """AllSmall saves its narrow model: the file names its spec, a run of the whole refuses it."""
    config = RunConfig("allsmall", rounds=1, clients=2, settings={"width": 0.5})
    start(config, tmp_path / "narrow", How())
    with safe_open(tmp_path / "narrow" / "model.safetensors", "numpy") as file:
        saved = ModelSpec.from_json(file.metadata()["spec"])
        assert {n: file.get_slice(n).get_shape() for n in file.keys()} == {  # noqa: SIM118
            name: list(shape) for name, shape in saved.tensor_shapes.items()
        }
    message = r"saves another model than the run's own, with \d+ parameters instead of \d+"
    again = RunConfig("fedavg", rounds=1, clients=2, start=str(tmp_path / "narrow"))
    with pytest.raises(ValueError, match=message):
        start(again, tmp_path / "whole", How())
    plain = RunConfig("fedavg", rounds=1, clients=2)
    start(plain, tmp_path / "plain", How())
    with safe_open(tmp_path / "plain" / "model.safetensors", "numpy") as file:
        assert file.metadata() is None


def test_given_weights_are_finite(tmp_path):
    spec = build("lenet300", (1, 8, 8), 10)
    given = Model(spec, {n: np.full_like(v, np.nan) for n, v in init_params(spec, 3).items()})
    with pytest.raises(ValueError, match="NaN or infinite"):
        start(RunConfig("fedavg", rounds=1, clients=2), tmp_path / "run", How(), first=given)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("folder", "weights", "message"),
    [
        ("nowhere", "trained", "nowhere is not the folder"),
        ("", "random", "needs --start"),
        ("", "rewound", "must be one of trained, original, random, got 'rewound'"),
    ],
)
def test_bad_starts_are_named(folder, weights, message):
    with pytest.raises(ValueError, match=message):
        begun(folder, weights)


@pytest.mark.parametrize(
    ("method", "settings", "now"),
    [
        ("fixed_mask", {"masks_from": "/a", "initial": "random"}, ("/a", "random")),
        ("fixed_mask", {"masks_from": "", "initial": "original"}, None),
        ("ntk_zo", {"masks_from": "/a", "masks_weights": "initial"}, ("/a", "original")),
        ("ntk_zo", {"masks_from": "/a", "masks_weights": "trained"}, ("/a", "trained")),
    ],
)
def test_folders_of_earlier_versions_say_where_they_start(method, settings, now):
    new = in_todays_words({"method": method, "seed": 1, "settings": {"lr": 0.1, **settings}})
    grown = {"rescale_given": True} if settings.get("masks_weights") == "initial" else {}
    assert new["settings"] == {"lr": 0.1, **grown}
    assert (new["start"], new["start_weights"]) == now if now else "start" not in new


def test_an_earlier_folder_is_read(tmp_path):
    start(RunConfig("fedavg", rounds=1, clients=2), tmp_path / "run", How())
    document = json.loads((tmp_path / "run" / "config.json").read_text())
    for new in ("start", "start_weights"):
        del document[new]
    document |= {"method": "fixed_mask", "settings": {"masks_from": "/a", "initial": "trained"}}
    (tmp_path / "run" / "config.json").write_text(json.dumps(document))
    config = read_config(tmp_path / "run")
    assert (config.start, config.start_weights, config.settings) == ("/a", "trained", {})
