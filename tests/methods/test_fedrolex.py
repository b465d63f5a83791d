"""FedRolex: which channels a window has, that all have their turn, and the merge of windows."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from conformance import Case
from federation import (
    CLIENTS,
    ENGINE,
    SPEC,
    client_data,
    devices,
    first_model,
    params,
    run,
    same,
    server,
)
from methods.test_heterofl import NEEDS, having

from fedlean.core import Model
from fedlean.layers import Linear, ReLU, Scaler
from fedlean.methods.fedavg import fedavg
from fedlean.methods.fedrolex import client_update, fedrolex
from fedlean.methods.heterofl import heterofl
from fedlean.models.initialise import init_params
from fedlean.runtime.local import LocalDispatch
from fedlean.spec import ModelSpec, sequential

SGD_SETTINGS = {"lr": 0.05, "local_steps": 2, "batch_size": 8}
CASE = Case(
    method=fedrolex,
    settings={**SGD_SETTINGS, "cohort": 3, "momentum": 0.5, "assign": "fixed"},
    knob={"shift": "window"},
    neutral={**SGD_SETTINGS, "widths": "1"},
    fedavg=SGD_SETTINGS,
    why_no_masks="slices are dense",
)
MORE_CASES = {"reshuffled": replace(CASE, settings={**CASE.settings, "reshuffle": True})}
MAPS, UNITS, PIXELS = 4, 12, 16  # of SPEC: channels of conv, each of which is 4 x 4 in fc1, of fc1
NUMBERED = {**params(), "conv.bias": np.arange(4, dtype=np.float32)}
NUMBERED["fc1.bias"] = np.arange(12, dtype=np.float32)  # so that a task says which it has


def windows(algorithm, rounds, clients=1):
    """Of each of so many rounds the maps and the units of each client, as its task has them."""
    state = algorithm.init(Model(SPEC, NUMBERED))
    for round in range(rounds):
        tasks = algorithm.configure(replace(state, round=round), devices()[:clients])
        yield [
            [task.params[f"{n}.bias"].astype(int).tolist() for n in ("conv", "fc1")]
            for task in tasks
        ]


def rolled(first: int, kept: int, count: int) -> list[int]:
    """By hand: so many from `first` on, the first after the last."""
    return sorted((first + at) % count for at in range(kept))


def answered(algorithm, state):
    return [
        replace(client_update(task, client_data()[task.client], ENGINE, {})[0], task=task)
        for task in algorithm.configure(state, devices())
    ]


def inside(ids: tuple[list[int], list[int]]) -> dict[str, tuple[np.ndarray, ...]]:
    """Where the tensors of a slice of these maps and units lie."""
    maps, units = ids
    pixels = [16 * channel + pixel for channel in maps for pixel in range(16)]
    return {
        "conv.weight": np.ix_(maps, [0], range(3), range(3)),
        "conv.bias": np.ix_(maps),
        "fc1.weight": np.ix_(units, pixels),
        "fc1.bias": np.ix_(units),
        "fc2.weight": np.ix_(range(3), units),
        "fc2.bias": np.ix_(range(3)),
    }


def test_the_window_of_a_round_by_hand():
    """Halves and quarters of 4 maps and 12 units; all clients of a width have the same."""
    algorithm = fedrolex(server(40), assign="fixed", widths="0.5 0.25", **SGD_SETTINGS)
    for round, found in enumerate(windows(algorithm, 30, 4)):
        half = [rolled(round % 4, 2, 4), rolled(round % 12, 6, 12)]
        quarter = [rolled(round % 4, 1, 4), rolled(round % 12, 3, 12)]
        assert found == [half, quarter, half, quarter]


def test_a_window_of_all_moves_by_its_own_size():
    algorithm = fedrolex(server(40), shift="window", assign="fixed", widths="0.5 0.25")
    for round, found in enumerate(windows(algorithm, 9, 2)):
        assert found == [
            [rolled(2 * round % 4, 2, 4), rolled(6 * round % 12, 6, 12)],
            [rolled(round % 4, 1, 4), rolled(3 * round % 12, 3, 12)],
        ]


@pytest.mark.parametrize("reshuffle", [False, True])
@pytest.mark.parametrize("width", ["0.5", "0.25"])
def test_each_channel_is_covered_equally_often_in_a_cycle(width, reshuffle):
    """By channels: in as many rounds as there are, as often as the window is wide."""
    share = float(width)
    algorithm = fedrolex(server(99), widths=width, reshuffle=reshuffle)
    found = [clients[0] for clients in windows(algorithm, 36)]
    for at, count in ((0, MAPS), (1, UNITS)):
        for first in range(0, 36, count):  # every cycle, not the first alone
            ids = [i for round in found[first : first + count] for i in round[at]]
            assert np.bincount(ids, minlength=count).tolist() == [share * count] * count


@pytest.mark.parametrize("reshuffle", [False, True])
@pytest.mark.parametrize("width", ["0.5", "0.25"])
def test_by_windows_each_channel_is_covered_exactly_once_per_cycle(width, reshuffle):
    cycle = round(1 / float(width))
    algorithm = fedrolex(server(99), widths=width, shift="window", reshuffle=reshuffle)
    found = [clients[0] for clients in windows(algorithm, 6 * cycle)]
    for at, count in ((0, MAPS), (1, UNITS)):
        for first in range(0, 6 * cycle, cycle):
            ids = [i for each in found[first : first + cycle] for i in each[at]]
            assert sorted(ids) == list(range(count))


def test_the_order_is_new_in_each_cycle_and_in_no_round_between():
    """The authors' condition for it was the other way round."""
    algorithm = fedrolex(server(99), widths="0.5", reshuffle=True)
    units = [set(clients[0][1]) for clients in windows(algorithm, 4 * UNITS)]
    moved = [len(one & other) for one, other in pairwise(units)]
    for at, kept in enumerate(moved, start=1):
        assert kept == 5 or at % UNITS == 0  # one goes and one comes, but between cycles
    assert min(moved) < 5
    assert len({frozenset(units[at]) for at in range(0, 4 * UNITS, UNITS)}) == 4


WIDE: ModelSpec = sequential(
    (5,), [("a", Linear(8)), ("r1", ReLU()), ("b", Linear(8)), ("r2", ReLU()), ("c", Linear(3))]
)


def met(rounds: int, **settings) -> np.ndarray:
    """Which weights of b a lone narrow client has had, in the model WIDE."""
    own = replace(server(rounds), spec=WIDE)
    algorithm = fedrolex(own, **settings)
    numbers = np.arange(64, dtype=np.float32).reshape(8, 8)
    state = algorithm.init(Model(WIDE, {**init_params(WIDE, 0), "b.weight": numbers}))
    seen = np.zeros(64, bool)
    for round in range(rounds):
        (task,) = algorithm.configure(replace(state, round=round), devices()[:1])
        seen[task.params["b.weight"].astype(int).ravel()] = True
    return seen.reshape(8, 8)


def test_weights_between_channels_further_apart_than_the_window_need_a_new_order():
    """Two layers of 8: their windows move together, and a quarter holds neighbours only."""
    apart = np.abs(np.subtract.outer(np.arange(8), np.arange(8)))
    apart = np.minimum(apart, 8 - apart)
    assert np.array_equal(met(64, widths="0.25"), apart < 2)
    assert np.array_equal(met(64, widths="0.5"), apart < 4)
    assert met(64 * 8, widths="0.25", reshuffle=True).all()


@pytest.mark.parametrize("round", [0, 3])
def test_a_round_by_hand(round):
    """What is sent, and the merge as a loop over elements: what nobody had keeps its value."""
    algorithm = fedrolex(server(), widths="0.5 0.25", assign="fixed", **SGD_SETTINGS)
    state = replace(algorithm.init(first_model()), round=round)
    updates = answered(algorithm, state)
    half = inside((rolled(round % 4, 2, 4), rolled(round % 12, 6, 12)))
    quarter = inside((rolled(round % 4, 1, 4), rolled(round % 12, 3, 12)))
    for update, where in zip(updates, (half, quarter, half, quarter), strict=True):
        for name, value in update.task.params.items():
            assert np.array_equal(value, params()[name][where[name]])
    merged = algorithm.server_update(state, updates).params
    for name, base in params().items():
        total, weight = np.zeros(base.shape), np.zeros(base.shape)
        for update, where in zip(updates, (half, quarter, half, quarter), strict=True):
            total[where[name]] += update.num_examples * update.params[name].astype(np.float64)
            weight[where[name]] += update.num_examples
        has = weight > 0
        expected = (total / np.where(has, weight, 1)).astype(np.float32)
        assert np.array_equal(merged[name][has], expected[has])
        assert merged[name][~has].tobytes() == base[~has].tobytes()
        assert has.all() == (name == "fc2.bias") and not np.array_equal(
            merged[name][has], base[has]
        )


def test_an_answer_is_merged_where_its_task_was_cut_whoever_merges_it():
    """The map does not travel: another process finds it by the round that the task is of."""
    one, other = (fedrolex(server(), widths="0.5", **SGD_SETTINGS) for _ in range(2))
    state = replace(one.init(first_model()), round=5)
    updates = answered(one, state)
    assert same(one.server_update(state, updates), other.server_update(state, updates))
    assert set(updates[0].task.hparams) == {
        *("lr", "local_steps", "batch_size", "momentum", "weight_decay", "loss"), "width"
    }  # fmt: skip


def test_in_the_first_round_it_is_heterofl():
    settings = {**SGD_SETTINGS, "assign": "fixed"}
    one, other = (method(server(), **settings) for method in (fedrolex, heterofl))
    merged = []
    for each in (one, other):
        state = each.init(first_model())
        merged.append(dict(each.server_update(state, answered(each, state)).params))
    assert same(*merged)
    assert not same(dict(run(one).params), dict(run(other).params))


def test_all_devices_that_hold_the_whole_are_fedavg():
    plain = run(fedavg(server(), **SGD_SETTINGS))
    algorithm = fedrolex(server(), **SGD_SETTINGS)
    dispatch = LocalDispatch(
        algorithm.client_update, ENGINE, client_data(), lambda step: having(*[NEEDS[0]] * CLIENTS)
    )
    assert same(dict(run(algorithm, dispatch=dispatch).params), dict(plain.params))


def test_memory_decides_to_the_byte_and_the_scaler_is_in_the_slice_alone():
    algorithm = fedrolex(server(), **SGD_SETTINGS)
    state = replace(algorithm.init(first_model()), round=2)
    tasks = algorithm.configure(state, having(NEEDS[0], NEEDS[0] - 1, NEEDS[1] - 1, None))
    assert [task.hparams["width"] for task in tasks] == ["1.0", "0.5", "0.25", "1.0"]
    factors = [
        {n.layer.factor for n in task.spec.nodes if isinstance(n.layer, Scaler)} for task in tasks
    ]
    assert factors == [set(), {2.0}, {4.0}, set()]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"shift": "far"}, "shift must be one of channel, window, got 'far'"),
        ({"assign": "best"}, "assign must be one of memory, fixed, drawn"),
        ({"widths": "0.25 1"}, r"widths must be numbers in \(0, 1\]"),
        ({"static_norm": True}, "static_norm is for models with BatchNorm"),
    ],
)
def test_what_cannot_be_is_refused_by_name(setting, said):
    with pytest.raises(ValueError, match=said):
        fedrolex(server(), **setting)
