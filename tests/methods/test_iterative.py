"""Iterative pruning: when, how much, which weights, and what travels afterwards."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from conformance import Case
from federation import ENGINE, SPEC, client_data, devices, first_model, params, run, same, server

from fedlean.core import ClientUpdate, SubModel
from fedlean.methods.fedavg import fedavg
from fedlean.methods.iterative import iterative
from fedlean.pruning.density import density, layer_density

SGD = {"lr": 0.05, "local_steps": 2, "batch_size": 8}
CASE = Case(
    method=iterative,
    settings={**SGD, "density": 0.25, "prune_every": 1},
    knob={"density": 0.5},
    neutral={**SGD, "density": 1.0},
    fedavg=SGD,
)
SIZES = {"conv.weight": 36, "fc1.weight": 768, "fc2.weight": 36}


def densities(rounds, **settings):
    """Density after each round; nobody answers, since the steps need no client."""
    algorithm = iterative(server(rounds), **settings)
    state, out = algorithm.init(first_model()), []
    while not algorithm.done(state):
        state = algorithm.server_update(state, [])
        out.append(density(state.masks))
    return out


def test_equal_steps_over_the_first_half():
    """To 0.25 in 3 steps of 2 rounds out of 12: 0.75, 0.5, 0.25 after rounds 2, 4, 6."""
    expected = [1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25]
    assert densities(12, density=0.25, prune_every=2) == expected


def test_geometric_steps_drop_a_share_of_those_left():
    """Two steps to 1/4: halves, 1/2 and 1/4."""
    expected = [1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 0.25]
    assert densities(8, density=0.25, prune_every=2, spacing="geometric") == expected


def test_twenty_steps_unless_said_otherwise():
    """90 rounds: a step every 45 // 20 = 2 rounds, the 20th and last after round 40."""
    found = densities(90, density=0.1)
    changes = [i + 1 for i in range(90) if found[i] != ([1.0, *found])[i]]
    assert changes == list(range(2, 41, 2))
    assert found[-1] == pytest.approx(0.1, abs=0.01)


def test_few_rounds_prune_after_each_of_the_first_half():
    """6 rounds, to 1/4: 1 - 0.75·s/3 after rounds 1, 2, 3."""
    assert densities(6, density=0.25) == [0.75, 0.5, 0.25, 0.25, 0.25, 0.25]


def test_the_smallest_merged_weights_of_every_layer_go():
    """The server prunes w = Σ p_n w_n: 1/4 · (-3) + 3/4 · 5 = 3 and 1/4 · 9 + 3/4 · (-3) = 0."""
    algorithm = iterative(server(2), density=0.5, prune_every=1)
    state = algorithm.init(first_model())
    halves = {name: np.arange(n).reshape(SPEC.param_shapes[name]) % 2 for name, n in SIZES.items()}

    def answer(client, examples, odd, even):
        sent = {name: np.full_like(value, 0.001) for name, value in params().items()}
        for name, half in halves.items():
            sent[name] = np.where(half, odd, even).astype(np.float32)
        return ClientUpdate(client, examples, sent, SubModel())

    after = algorithm.server_update(state, [answer(0, 25, -3.0, 9.0), answer(1, 75, 5.0, -3.0)])
    for name, half in halves.items():
        assert np.array_equal(after.masks[name], half == 1)
        assert np.array_equal(after.params[name], 3.0 * half)
    assert (after.params["fc1.bias"] == np.float32(0.001)).all(), "biases are never pruned"
    assert set(after.masks) == set(SPEC.prunable)


def test_every_layer_has_the_same_density_and_pruned_weights_stay_pruned():
    seen = []

    def watch(progress, record):
        seen.append(progress.state.masks)

    run(iterative(server(), **CASE.settings), watch=watch)
    for expected, masks in zip([0.75, 0.5, 0.25, 0.25, 0.25, 0.25], seen, strict=True):
        assert layer_density(masks) == dict.fromkeys(SPEC.prunable, expected)
    for earlier, later in pairwise(seen):
        assert not any((later[name] & ~earlier[name]).any() for name in later)


def test_a_pruned_weight_does_not_return_for_one_that_became_zero():
    algorithm = iterative(server(4), density=0.25, prune_every=1)
    state = algorithm.init(first_model())
    sent = dict(params())
    for name, n in SIZES.items():  # rising, so that the first ones go
        sent[name] = np.arange(1, n + 1, dtype=np.float32).reshape(SPEC.param_shapes[name])
    state = algorithm.server_update(state, [ClientUpdate(0, 1, sent, SubModel())])
    zero = {name: np.zeros_like(value) for name, value in sent.items()}
    after = algorithm.server_update(state, [ClientUpdate(0, 1, zero, SubModel(state.masks))])
    for name, mask in after.masks.items():
        assert mask.sum() == SIZES[name] / 4 and not (mask & ~state.masks[name]).any()


def test_dense_until_the_first_step():
    """Before it a round is FedAvg's, mask and all."""
    algorithm = iterative(server(8), **SGD, density=0.5, prune_every=3)
    dense = fedavg(server(8), **SGD)
    states = {}

    def watch(which):
        return lambda progress, record: states.setdefault((which, progress.state.round), progress)

    run(algorithm, rounds=8, watch=watch("iterative"))
    run(dense, rounds=8, watch=watch("fedavg"))
    for round in (1, 2):
        ours, plain = (states[which, round].state for which in ("iterative", "fedavg"))
        assert ours.masks == {} and same(dict(ours.params), dict(plain.params))
    assert not same(dict(states["iterative", 3].state.params), states["fedavg", 3].state.params)


def test_what_a_client_trains_is_what_it_is_charged_for():
    algorithm = iterative(server(), **CASE.settings)
    kept = []

    def watch(progress, record):
        kept.append({n: int(m.sum()) for n, m in record.tasks[0].sub_model.masks.items()})

    state = run(algorithm, watch=watch)
    assert kept[0] == {} and kept[3] == {"conv.weight": 9, "fc1.weight": 192, "fc2.weight": 9}
    task = algorithm.configure(replace(state, round=5), devices())[0]
    update, held = algorithm.client_update(task, client_data()[0], ENGINE, {})
    assert held == {} and [dict(work.kept) for work in update.work] == [kept[3]]


@pytest.mark.parametrize(
    "setting",
    [
        {"density": 0.0},
        {"density": 1.1},
        {"prune_every": 0},
        {"prune_every": 4},  # 6 rounds have 3 in their first half
        {"spacing": "cubic"},
        {"lr": 0.0},
        {"cohort": 0},
    ],
)
def test_bad_hyperparameters_are_named(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=name):
        iterative(server(), **setting)


def test_one_round_has_no_first_half():
    with pytest.raises(ValueError, match="rounds must be at least 2"):
        iterative(server(1), density=0.5)
