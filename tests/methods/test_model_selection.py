"""Dynamic model selection: the search in a run, the merge by hand, distillation, budgets."""

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
from methods.test_heterofl import having, merged_by_hand

from fedlean.core import Work
from fedlean.cost.way import peak_memory_bytes
from fedlean.methods.fedavg import fedavg
from fedlean.methods.model_selection import client_update, model_selection
from fedlean.runtime.local import LocalDispatch
from fedlean.submodels.supernet import supernet

SGD_SETTINGS = {"lr": 0.05, "local_steps": 2, "batch_size": 8}
PLAIN = {**SGD_SETTINGS, "distill_every": 0, "explore": 0.0, "known": 100}
CASE = Case(
    method=model_selection,
    settings={**SGD_SETTINGS, "cohort": 3, "momentum": 0.5, "widths": "1 0.5 0.25"},
    knob={"distill_lr": 0.01},
    neutral={**SGD_SETTINGS, "distill_every": 0},
    fedavg=SGD_SETTINGS,
    why_no_masks="slices are dense",
)
NETS = supernet(SPEC, (1.0, 0.5), scaler=True)
NEEDS = {
    rate: peak_memory_bytes(NETS.cut(net).spec, [Work(2, 8)])
    for rate, net in ((1.0, NETS.largest), (0.5, NETS.smallest))
}


def answered(algorithm, state, present):
    return [
        replace(client_update(task, client_data()[task.client], ENGINE, {})[0], task=task)
        for task in algorithm.configure(state, present)
    ]


def test_devices_without_limits_are_fedavg_to_the_bit():
    """With sub-networks in the data base, which nobody gets."""
    plain = run(fedavg(server(), **SGD_SETTINGS))
    searched = run(model_selection(server(), **{**PLAIN, "explore": 0.5}))
    assert same(dict(searched.params), dict(plain.params)) and len(searched.base) > 2


def test_the_merge_is_that_of_a_loop_over_elements():
    """An element that nobody held keeps its value: the released code sets it to zero."""
    algorithm = model_selection(server(), **{**PLAIN, "known": 0})
    state = algorithm.init(first_model())
    for memory, rates in (((None, NEEDS[0.5]), (1.0, 0.5)), ((NEEDS[0.5],) * 2, (0.5, 0.5))):
        updates = answered(algorithm, state, having(*memory))
        expected, nobody = merged_by_hand(params(), updates, rates)
        merged = algorithm.server_update(state, updates).params
        assert same(dict(merged), expected)
        if 1.0 not in rates:
            left = merged["fc1.weight"][nobody["fc1.weight"]]
            assert np.count_nonzero(left) == left.size > 0


def test_a_device_gets_the_largest_known_that_its_memory_of_the_round_holds():
    """The largest by its values, as the paper sorts, of those whose peak it holds."""
    algorithm = model_selection(server(), **PLAIN)
    state = algorithm.init(first_model())
    assert len(state.base) == NETS.count == 4
    specs = [NETS.cut(NETS.named(name)).spec for name in state.base]
    needs = [peak_memory_bytes(spec, [Work(2, 8)]) for spec in specs]
    for memory in (*needs, *(each - 1 for each in needs if each > min(needs))):
        (task,) = algorithm.configure(state, having(memory))
        held = [s for s, need in zip(specs, needs, strict=True) if need <= memory]
        assert task.spec.num_params == max(spec.num_params for spec in held)
        assert peak_memory_bytes(task.spec, algorithm.work(task)) <= memory


def test_sub_networks_that_are_drawn_stay_known():
    algorithm = model_selection(server(), **{**PLAIN, "explore": 0.9, "known": 0})
    state = algorithm.init(first_model())
    assert len(state.base) == 2
    for _ in range(3):
        state = algorithm.server_update(state, answered(algorithm, state, devices()))
    assert len(state.base) == 4 and algorithm.report(state)["sub_networks"] == 4


def test_budgets_that_change_in_every_round_are_never_exceeded():
    """Peaks as the engine plans them, and it refuses by itself what is beyond its limit."""
    random = np.random.default_rng(0)
    drawn = random.integers(NEEDS[0.5], int(1.1 * NEEDS[1.0]), (30, CLIENTS))
    drawn[5] = NEEDS[0.5] - 1  # a round that nobody can take part in
    algorithm = model_selection(server(12), **{**SGD_SETTINGS, "explore": 0.3})
    dispatch = LocalDispatch(
        algorithm.client_update, ENGINE, client_data(), lambda step: having(*map(int, drawn[step]))
    )
    records = []
    run(algorithm, dispatch=dispatch, watch=lambda progress, record: records.append(record))
    assert sum(len(record.answered) for record in records) > 20
    for record in records:
        assert not record.refused and not record.rejected
    assert {client for record in records for client in record.left_out} == set(range(CLIENTS))


def test_distillation_is_charged_to_the_server_and_moves_the_model():
    algorithm = model_selection(server(), **{**PLAIN, "distill_every": 2})
    state = algorithm.init(first_model())
    without = model_selection(server(), **PLAIN)
    for round in (1, 2):
        updates = answered(algorithm, state, devices())
        merged = without.server_update(state, updates)
        state = algorithm.server_update(state, updates)
        told = algorithm.report(state)
        assert ("server_flops" in told) == (round == 2)
        assert same(dict(state.params), dict(merged.params)) == (round == 1)
    assert told["server_flops"] > 0 and told["divergence"] > 0


def test_a_round_without_answers_is_not_distilled():
    algorithm = model_selection(server(), **SGD_SETTINGS)
    state = algorithm.init(first_model())
    assert same(dict(algorithm.server_update(state, []).params), dict(state.params))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"widths": "1"}, "one sub-network only"),
        ({"explore": 1.0}, "explore"),
        ({"tries": -1}, "tries"),
        ({"distill_lr": 0.0}, "distill_lr"),
        ({"distill_networks": 0}, "distill_networks"),
        ({"distill_batch": 1}, "distill_batch"),
        ({"static_norm": True}, "static_norm is for models with BatchNorm"),
        ({"cohort": 0}, "cohort"),
    ],
)
def test_what_cannot_be_is_refused_by_name(setting, said):
    with pytest.raises(ValueError, match=said):
        model_selection(server(), **setting)


def test_the_seed_decides_what_is_drawn():
    bases = {
        model_selection(replace(server(), seed=seed), widths="1 0.5 0.25", known=2)
        .init(first_model())
        .base
        for seed in range(SEED, SEED + 8)
    }
    assert len(bases) > 1
