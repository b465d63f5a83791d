"""SynFlow: pruned by the server alone before round 1, then values only.

R, its scores and Algorithm 1 are tested in tests/pruning/test_synaptic_flow.py.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conformance import Case
from federation import (
    ENGINE,
    ROUNDS,
    SPEC,
    client_data,
    devices,
    first_model,
    params,
    run,
    same,
    server,
)

from fedlean.core import SubModel
from fedlean.engine.protocol import SGD
from fedlean.methods.synflow import client_update, synflow
from fedlean.pruning.density import density
from fedlean.pruning.synaptic_flow import prune_by_flow
from fedlean.tree import num_kept, pack

SMALL = {"lr": 0.05, "local_steps": 2, "batch_size": 8, "synflow_steps": 10}
CASE = Case(
    method=synflow,
    settings=SMALL,
    knob={"density": 0.4},
    neutral={"lr": 0.05, "local_steps": 2, "batch_size": 8, "density": 1.0},
    fedavg={"lr": 0.05, "local_steps": 2, "batch_size": 8},
)


def test_the_server_prunes_alone_before_the_first_round():
    """No task and no byte for it; the initial weights that stay are those of Algorithm 1."""
    algorithm = synflow(server(), **SMALL, density=0.3)
    state = algorithm.init(first_model())
    assert (state.phase, state.masks) == ("prune", {})
    assert algorithm.configure(state, devices()) == []
    pruned = algorithm.server_update(state, ())
    assert (pruned.phase, pruned.round) == ("train", 0)
    assert same(pruned.masks, prune_by_flow(SPEC, params(), 0.3, 10))
    for name, value in params().items():
        kept = pruned.masks.get(name, np.ones(value.shape, bool))
        assert np.array_equal(pruned.params[name], np.where(kept, value, 0))


def test_density_is_exact_and_the_pattern_travels_once():
    """floor(0.3 · 840) = 252 weights in every round; the pattern goes down with the first."""
    records = []
    algorithm = synflow(server(), **SMALL, density=0.3)
    state = run(algorithm, watch=lambda progress, record: records.append(record))
    assert num_kept(state.masks) == 252 and state.round == ROUNDS
    prune, *rounds = records
    assert len(prune.tasks) == 0 and prune.cost.downlink_bytes + prune.cost.flops == 0
    assert len(rounds) == ROUNDS
    for record in rounds:
        assert all(same(task.sub_model.masks, state.masks) for task in record.tasks)
    down = [record.cost.downlink_bytes for record in rounds]
    assert down[0] > down[1] and len(set(down[1:])) == 1


def test_a_client_moves_kept_weights_only():
    """One step at η = 0.5: w - 0.5·g ⊙ m, g the dense model's gradient at the pruned weights."""
    algorithm = synflow(server(), lr=0.5, local_steps=1, batch_size=4, synflow_steps=5)
    state = algorithm.server_update(algorithm.init(first_model()), ())
    task = algorithm.configure(state, devices())[1]
    update, _ = client_update(task, client_data()[1], ENGINE, {})
    dense = ENGINE.open(SPEC, task.params, SubModel(), batch_size=4, optimizer=SGD(0.5))
    ((x, y),) = client_data()[1].draw(steps=1, batch_size=4, seed=task.seed)
    dense.step(x, y)
    for name, value in pack(dense.params(), state.masks).items():
        assert np.allclose(update.params[name], value, atol=1e-6)
    (work,) = update.work
    assert (work.steps, work.importance_steps) == (1, 0)
    assert sum(work.kept.values()) == num_kept(state.masks)


def test_the_data_decides_nothing():
    """Another seed of the run, and so other batches and cohorts: the same masks."""
    other = synflow(replace(server(), seed=99), **SMALL)
    masks = other.server_update(other.init(first_model()), ()).masks
    assert same(masks, run(synflow(server(), **SMALL)).masks)
    assert density(masks) == pytest.approx(0.2)


@pytest.mark.parametrize(
    "setting",
    [
        {"density": 0.0},
        {"density": 1.5},
        {"density": 1e-4},
        {"synflow_steps": 0},
        {"lr": -1.0},
        {"cohort": 0},
        {"loss": "mse"},
    ],
)
def test_bad_hyperparameters_are_named(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=name):
        synflow(server(), **setting)
