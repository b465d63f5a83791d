"""FedAvg against hand-computed rounds."""

from __future__ import annotations

import numpy as np
import pytest
from conformance import Case
from federation import (
    ENGINE,
    SEED,
    SPEC,
    client_data,
    devices,
    first_model,
    params,
    run,
    same,
    server,
)

from fedlean.core import ClientUpdate, SubModel, derive_seed
from fedlean.engine.protocol import SGD
from fedlean.methods.fedavg import fedavg

CASE = Case(
    method=fedavg,
    settings={"lr": 0.05, "local_steps": 2, "batch_size": 8, "cohort": 3, "momentum": 0.5},
    knob={"lr": 0.1},
    neutral="it is FedAvg itself; test_rounds_by_a_bare_loop holds it against one",
    why_no_masks="FedAvg is dense",
)


def test_rounds_by_a_bare_loop():
    """Three rounds over all clients with nothing of the method: sessions and NumPy's float64."""
    rounds, sgd = 3, {"lr": 0.05, "local_steps": 2, "batch_size": 8, "momentum": 0.5}
    model = {name: value.copy() for name, value in params().items()}
    for number in range(1, rounds + 1):
        total = {name: np.full(value.shape, -0.0) for name, value in model.items()}
        for client, batches in enumerate(client_data()):
            session = ENGINE.open(
                SPEC, model, SubModel(), batch_size=8, optimizer=SGD(0.05, momentum=0.5)
            )
            seed = derive_seed(SEED, number, client, "train")
            for x, y in batches.draw(steps=2, batch_size=8, seed=seed):
                session.step(x, y)
            for name, value in session.params().items():
                total[name] += batches.num_examples * value.astype(np.float64)
        model = {name: (value / 160).astype(np.float32) for name, value in total.items()}
    assert same(dict(run(fedavg(server(rounds), **sgd), rounds=rounds).params), model)


def test_mean_is_weighted_by_examples():
    """w <- Σ p_n w_n: (25·1 + 75·5) / 100 = 4 in every coordinate."""
    algorithm = fedavg(server())
    state = algorithm.init(first_model())
    updates = [
        ClientUpdate(0, 25, {k: np.full_like(v, 1.0) for k, v in params().items()}, SubModel()),
        ClientUpdate(1, 75, {k: np.full_like(v, 5.0) for k, v in params().items()}, SubModel()),
    ]
    merged = algorithm.server_update(state, updates)
    assert merged.round == 1
    assert all((value == 4.0).all() for value in merged.params.values())


def test_learning_rate_halves():
    """lr 0.1 with a half-life of 2 rounds: 0.1, 0.0707.., 0.05 in rounds 1, 2, 3."""
    algorithm = fedavg(server(), lr=0.1, lr_half_life_rounds=2.0)
    state = algorithm.init(first_model())
    rates = []
    for _ in range(3):
        rates.append(algorithm.configure(state, devices())[0].hparams["lr"])
        state = algorithm.server_update(state, [])
    assert rates == pytest.approx([0.1, 0.1 / 2**0.5, 0.05])


def test_cohort_is_drawn_anew_and_from_those_present():
    algorithm = fedavg(server(), cohort=2)
    state = algorithm.init(first_model())
    drawn = set()
    for _ in range(12):
        cohort = [task.client for task in algorithm.configure(state, devices()[1:])]
        assert len(cohort) == 2 and 0 not in cohort
        drawn.add(tuple(cohort))
        state = algorithm.server_update(state, [])
    assert len(drawn) > 1


def test_warm_up_is_one_client_alone_before_round_one():
    algorithm = fedavg(server(), warmup_steps=3, warmup_client=2)
    state = algorithm.init(first_model())
    tasks = algorithm.configure(state, devices())
    assert [(task.client, task.round, task.phase) for task in tasks] == [(2, 0, "warmup")]
    assert tasks[0].hparams["local_steps"] == 3
    assert algorithm.server_update(state, []) == state, "unanswered, it is asked again"
    answer = ClientUpdate(2, 50, dict(params()), SubModel())
    after = algorithm.server_update(state, [answer])
    assert (after.phase, after.round) == ("train", 0)
    assert not same(run(algorithm).params, run(fedavg(server())).params)


@pytest.mark.parametrize(
    "setting",
    [
        {"lr": 0.0},
        {"lr": float("nan")},
        {"local_steps": 0},
        {"batch_size": -1},
        {"momentum": 1.0},
        {"weight_decay": -0.1},
        {"loss": "mse"},
        {"warmup_steps": -1},
        {"warmup_client": -1},
        {"cohort": 0},
    ],
)
def test_bad_hyperparameters_are_named(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=name):
        fedavg(server(), **setting)


def test_spec_of_the_tests_is_small():
    assert SPEC.num_params == 4 * 9 + 4 + 12 * 64 + 12 + 3 * 12 + 3
