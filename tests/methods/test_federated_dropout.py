"""Federated Dropout: whose channels are which, and the merge of random slices by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conformance import Case
from federation import (
    CLIENTS,
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
from methods.test_fedrolex import NUMBERED, answered, inside
from methods.test_heterofl import INPUTS, NEEDS, NORM, having

from fedlean.core import Model, derive_seed, generator
from fedlean.methods.fedavg import fedavg
from fedlean.methods.federated_dropout import federated_dropout
from fedlean.models.initialise import init_params
from fedlean.runtime.local import LocalDispatch

SGD_SETTINGS = {"lr": 0.05, "local_steps": 2, "batch_size": 8}
CASE = Case(
    method=federated_dropout,
    settings={**SGD_SETTINGS, "cohort": 3, "momentum": 0.5, "assign": "fixed"},
    knob={"scaler": False},
    neutral={**SGD_SETTINGS, "widths": "1"},
    fedavg=SGD_SETTINGS,
    why_no_masks="slices are dense",
)


def drawn_by_hand(round: int, client: int, rate: float) -> tuple[list[int], list[int]]:
    """The first of a permutation of each layer's channels, of this round and client."""
    seed = derive_seed(SEED, round, client, "channels")
    ids = []
    for layer, count in (("conv", 4), ("fc1", 12)):
        order = generator(seed, 0, 0, f"channels/{layer}").permutation(count)
        ids.append(sorted(order[: int(rate * count)].tolist()))
    return ids[0], ids[1]


def had(algorithm, round, clients=CLIENTS):
    """Maps and units of each client, which their numbers tell."""
    state = replace(algorithm.init(Model(SPEC, NUMBERED)), round=round)
    return [
        tuple(task.params[f"{name}.bias"].astype(int).tolist() for name in ("conv", "fc1"))
        for task in algorithm.configure(state, devices()[:clients])
    ]


def test_each_client_and_round_has_channels_of_its_own():
    algorithm = federated_dropout(server(200), widths="0.5", **SGD_SETTINGS)
    for round in (0, 1, 7):
        expected = [drawn_by_hand(round + 1, client, 0.5) for client in range(CLIENTS)]
        assert had(algorithm, round) == expected
        assert had(algorithm, round, 2) == expected[:2], "whoever else is there"
    seen = [tuple(units) for round in range(50) for _, units in had(algorithm, round)]
    assert len(set(seen)) > 100  # of 924 choices of 6 of 12, 200 draws
    counts = np.bincount([unit for units in seen for unit in units])
    assert np.abs(counts - 100).max() < 36  # 5 standard deviations of 200 draws at 1/2


def test_layers_are_drawn_apart():
    """Four maps, and of twelve units those that are numbered like them, are not the same draw."""
    algorithm = federated_dropout(server(200), widths="0.25")
    pairs = {(maps[0], units[0]) for round in range(60) for maps, units in had(algorithm, round)}
    assert len(pairs) > 20


def test_a_round_by_hand():
    """What is sent, and the merge as a loop over elements: what nobody had keeps its value."""
    algorithm = federated_dropout(server(), widths="0.5 0.25", assign="fixed", **SGD_SETTINGS)
    state = replace(algorithm.init(first_model()), round=3)
    updates = answered(algorithm, state)
    where = [
        inside(drawn_by_hand(4, client, rate)) for client, rate in enumerate((0.5, 0.25, 0.5, 0.25))
    ]
    merged = algorithm.server_update(state, updates).params
    nobody = 0
    for name, base in params().items():
        total, weight = np.zeros(base.shape), np.zeros(base.shape)
        for update, own in zip(updates, where, strict=True):
            assert np.array_equal(update.task.params[name], base[own[name]])
            total[own[name]] += update.num_examples * update.params[name].astype(np.float64)
            weight[own[name]] += update.num_examples
        has = weight > 0
        expected = (total / np.where(has, weight, 1)).astype(np.float32)
        assert np.array_equal(merged[name][has], expected[has])
        assert merged[name][~has].tobytes() == base[~has].tobytes()
        nobody += int((~has).sum())
    assert nobody > 100


def test_an_answer_is_merged_where_its_task_was_cut_whoever_merges_it():
    one, other = (federated_dropout(server(), widths="0.5", **SGD_SETTINGS) for _ in range(2))
    state = one.init(first_model())
    updates = answered(one, state)
    assert same(one.server_update(state, updates), other.server_update(state, updates))


def test_all_devices_that_hold_the_whole_are_fedavg():
    plain = run(fedavg(server(), **SGD_SETTINGS))
    algorithm = federated_dropout(server(), **SGD_SETTINGS)
    dispatch = LocalDispatch(
        algorithm.client_update, ENGINE, client_data(), lambda step: having(*[NEEDS[0]] * CLIENTS)
    )
    assert same(dict(run(algorithm, dispatch=dispatch).params), dict(plain.params))


def test_memory_decides_to_the_byte():
    algorithm = federated_dropout(server(), **SGD_SETTINGS)
    state = algorithm.init(first_model())
    tasks = algorithm.configure(state, having(NEEDS[0], NEEDS[0] - 1, NEEDS[1] - 1, None))
    assert [task.hparams["width"] for task in tasks] == ["1.0", "0.5", "0.25", "1.0"]


def test_a_model_with_batch_norm_needs_statistics_of_the_server():
    own = replace(server(), spec=NORM, inputs=lambda: iter(INPUTS))
    with pytest.raises(ValueError, match="layer 'bn1' is a BatchNorm"):
        federated_dropout(own)
    algorithm = federated_dropout(own, static_norm=True, widths="0.5", **SGD_SETTINGS)
    state = algorithm.init(Model(NORM, init_params(NORM, SEED)))
    merged = algorithm.server_update(state, answered(algorithm, state)).params
    assert not np.array_equal(merged["bn1.running_mean"], state.params["bn1.running_mean"])
