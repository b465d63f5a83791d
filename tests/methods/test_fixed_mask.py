"""Training under the mask that a run starts with."""

from __future__ import annotations

import numpy as np
import pytest
from conformance import Case
from federation import ENGINE, SPEC, client_data, devices, params, run, same, server

from fedlean.core import Model, SubModel
from fedlean.engine.protocol import SGD
from fedlean.methods.fedavg import fedavg
from fedlean.methods.fixed_mask import client_update, fixed_mask
from fedlean.pruning.density import full_masks
from fedlean.train.sgd import local_sgd
from fedlean.tree import apply_mask, read_only

SGD_SETTINGS = {"lr": 0.05, "local_steps": 2, "batch_size": 8}


def masks() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    shapes = {name: mask.shape for name, mask in full_masks(SPEC).items()}
    return read_only({name: rng.random(shape) < 0.4 for name, shape in shapes.items()})


def pruned() -> Model:
    return Model(SPEC, apply_mask(params(), masks()), masks())


CASE = Case(
    method=fixed_mask,
    settings={**SGD_SETTINGS, "momentum": 0.5},
    knob={"momentum": 0.0},
    neutral=SGD_SETTINGS,  # without a mask
    fedavg=SGD_SETTINGS,
    start=pruned(),
)


def test_a_full_mask_is_fedavg():
    full = Model(SPEC, params(), full_masks(SPEC))
    masked = run(fixed_mask(server(), **SGD_SETTINGS), first=full)
    plain = run(fedavg(server(), **SGD_SETTINGS))
    assert same(dict(masked.params), dict(plain.params))


def test_clients_train_the_kept_weights_and_the_mask_stays():
    algorithm = fixed_mask(server(), **CASE.settings)
    state = algorithm.init(pruned())
    assert same(dict(state.params), dict(pruned().params))
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
    final = run(algorithm, first=pruned())
    assert same(dict(final.masks), masks())


def test_bad_hyperparameters_are_named():
    with pytest.raises(ValueError, match="lr"):
        fixed_mask(server(), lr=0.0)
