"""The mask of another run: what is read, what is refused, and where its weights start."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from conformance import Case
from federation import ENGINE, SPEC, client_data, devices, params, run, same, server
from safetensors.numpy import load_file, save_file

from fedlean.core import SubModel
from fedlean.engine.protocol import SGD
from fedlean.methods.fedavg import fedavg
from fedlean.methods.fixed_mask import client_update, fixed_mask
from fedlean.models.initialise import init_params
from fedlean.models.lenet300 import lenet300
from fedlean.pruning.density import full_masks
from fedlean.runtime.config import RunConfig
from fedlean.runtime.how import How
from fedlean.runtime.run import start
from fedlean.spec import ModelSpec
from fedlean.train.sgd import local_sgd
from fedlean.tree import apply_mask

SGD_SETTINGS = {"lr": 0.05, "local_steps": 2, "batch_size": 8}
SEED = 5  # of the run that pruned; the tests' server has another


def masks() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {name: rng.random(mask.shape) < 0.4 for name, mask in full_masks(SPEC).items()}


def trained() -> dict[str, np.ndarray]:
    return apply_mask({name: value + 0.5 for name, value in params().items()}, masks())


def write_run(folder: Path, *, spec=SPEC, tensors=None, kept=None) -> str:
    """A run folder as far as this method reads it; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"seed": SEED, "method": "prunefl", "spec": json.loads(spec.to_json())}
    (folder / "config.json").write_text(json.dumps(config))
    kept = masks() if kept is None else kept
    stored = {f"{name}.mask": mask.astype(np.uint8) for name, mask in kept.items()}
    save_file({**(tensors or trained()), **stored}, folder / "model.safetensors")
    return str(folder)


FOLDER = Path(tempfile.mkdtemp())  # a case is made before any fixture exists
atexit.register(shutil.rmtree, FOLDER)
CASE = Case(
    method=fixed_mask,
    settings={**SGD_SETTINGS, "masks_from": write_run(FOLDER / "run"), "momentum": 0.5},
    knob={"initial": "random"},
    neutral={**SGD_SETTINGS, "masks_from": ""},
    fedavg=SGD_SETTINGS,
)


def test_each_start_by_hand():
    """Masked: what seed 5 draws, what this run's seed does not draw, the run's final weights."""
    states = {
        initial: fixed_mask(server(), masks_from=CASE.settings["masks_from"], initial=initial).init(
            params()
        )
        for initial in ("original", "random", "trained")
    }
    assert same(states["original"].params, apply_mask(init_params(SPEC, SEED), masks()))
    assert same(states["trained"].params, trained())
    fresh = states["random"].params
    for other in (params(), init_params(SPEC, SEED)):
        for name in SPEC.prunable:
            assert not (fresh[name] == other[name])[masks()[name]].any()
    bound = 1 / 8  # of fc1: 1/sqrt(64)
    assert 0.9 * bound < np.abs(fresh["fc1.weight"]).max() <= bound
    for state in states.values():
        assert same(dict(state.masks), masks())


def test_a_full_mask_is_fedavg(tmp_path):
    """From the weights of this run's seed, which the other run had too."""
    folder = write_run(tmp_path / "full", tensors=dict(params()), kept=full_masks(SPEC))
    masked = run(fixed_mask(server(), masks_from=folder, initial="trained", **SGD_SETTINGS))
    plain = run(fedavg(server(), **SGD_SETTINGS))
    assert same(dict(masked.params), dict(plain.params))


def test_clients_train_the_kept_weights_and_the_mask_stays():
    algorithm = fixed_mask(server(), **CASE.settings)
    state = algorithm.init(params())
    (task, *_) = algorithm.configure(state, devices())
    update, held = client_update(task, client_data()[task.client], ENGINE, {})
    session = ENGINE.open(
        SPEC, state.params, SubModel(masks=masks()), batch_size=8, optimizer=SGD(0.05, 0.5)
    )
    local_sgd(session, client_data()[task.client], steps=2, batch_size=8, seed=task.seed)
    assert held == {} and same(update.params, session.params(packed=True))
    (work,) = update.work
    assert dict(work.kept) == {name: int(mask.sum()) for name, mask in masks().items()}
    assert (work.steps, work.batch_size, work.optimizer_floats) == (2, 8, 1)
    final = run(algorithm)
    assert same(dict(final.masks), masks())


def test_reads_what_a_run_leaves(tmp_path):
    """A real run of a pruning method, then its ticket on the same data."""
    config = RunConfig(
        "prunefl",
        rounds=2,
        clients=3,
        seed=7,
        settings={"initial_max_passes": 40, "initial_stable": 1, "prunable_fraction": 0.5},
    )
    start(config, tmp_path / "pruned", How())
    stored = load_file(tmp_path / "pruned" / "model.safetensors")
    kept = stored["fc1.weight.mask"].astype(bool)
    assert not kept.all()
    settings = {"masks_from": str(tmp_path / "pruned"), "lr": 1e-9}
    config = RunConfig("fixed_mask", rounds=1, clients=3, settings=settings)
    start(config, tmp_path / "ticket", How())
    again = load_file(tmp_path / "ticket" / "model.safetensors")
    assert np.array_equal(again["fc1.weight.mask"], stored["fc1.weight.mask"])
    spec = config_spec(tmp_path / "ticket")
    original = np.where(kept, init_params(spec, 7)["fc1.weight"], 0)
    np.testing.assert_allclose(again["fc1.weight"], original, atol=1e-6)


def config_spec(folder: Path) -> ModelSpec:
    return ModelSpec.from_json(json.dumps(json.loads((folder / "config.json").read_text())["spec"]))


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
        (lambda f: write_run(f, kept={}), "no masks, prunefl left a dense model"),
        (
            lambda f: write_run(f, tensors={"fc1.weight": np.zeros((2, 2), np.float32)}),
            "safetensors is damaged: tensor",
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
        fixed_mask(server(), masks_from=str(folder))


def test_a_run_of_another_model_is_refused(tmp_path):
    other = lenet300((1, 8, 8), 3)
    folder = write_run(tmp_path / "run", spec=other)
    with pytest.raises(ValueError, match=r"another model.*--model"):
        fixed_mask(server(), masks_from=folder)


@pytest.mark.parametrize(
    "setting",
    [{"initial": "rewound"}, {"initial": "random"}, {"masks_from": "nowhere"}, {"lr": 0.0}],
)
def test_bad_hyperparameters_are_named(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=name):
        fixed_mask(server(), **setting)
