"""HeteroFL: which slice a device gets, and the merge of slices against a loop over elements."""

from __future__ import annotations

from collections import Counter
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
    dataset,
    devices,
    first_model,
    params,
    run,
    same,
    server,
)
from submodels.test_static_norm import naive

from fedlean.algorithm import Device
from fedlean.core import Model, Work
from fedlean.cost.way import peak_memory_bytes
from fedlean.layers import BatchNorm, Conv2d, Flatten, Linear, ReLU, Scaler
from fedlean.methods.fedavg import fedavg
from fedlean.methods.heterofl import client_update, heterofl
from fedlean.models.catalog import available, build
from fedlean.models.initialise import init_params
from fedlean.printable import megabytes
from fedlean.runtime.local import LocalDispatch
from fedlean.spec import sequential
from fedlean.submodels.width import width

SGD_SETTINGS = {"lr": 0.05, "local_steps": 2, "batch_size": 8}
CASE = Case(
    method=heterofl,
    settings={**SGD_SETTINGS, "cohort": 3, "momentum": 0.5, "assign": "fixed"},
    knob={"scaler": False},
    neutral={**SGD_SETTINGS, "widths": "1"},
    fedavg=SGD_SETTINGS,
    why_no_masks="slices are dense",
)
RATES = (1.0, 0.5, 0.25)
CUTS = {rate: width(SPEC, rate, scaler=True) for rate in RATES}
NEEDS = [peak_memory_bytes(CUTS[rate].spec, [Work(2, 8)]) for rate in RATES]
NORM = sequential(
    (1, 8, 8),
    [
        ("conv1", Conv2d(4, 3, stride=2)),
        ("bn1", BatchNorm()),
        ("relu1", ReLU()),
        ("conv2", Conv2d(8, 3)),
        ("bn2", BatchNorm()),
        ("relu2", ReLU()),
        ("flat", Flatten()),
        ("fc", Linear(3)),
    ],
)
INPUTS = [(dataset(7).x_test[at : at + 20] / np.float32(255), np.zeros(20)) for at in (0, 20, 40)]


def having(*memory_bytes: int | None) -> list[Device]:
    return [Device(client, memory_bytes=each) for client, each in enumerate(memory_bytes)]


def answered(algorithm, state, present=None):
    """Updates as the runtime hands them on."""
    return [
        replace(client_update(task, client_data()[task.client], ENGINE, {})[0], task=task)
        for task in algorithm.configure(state, present or devices())
    ]


def merged_by_hand(base, updates, rates):
    """Every element apart: Σ n·w / Σ n over the clients whose width reaches it."""
    out, nobody = {}, {}
    for name, value in base.items():
        out[name], nobody[name] = value.copy(), np.ones(value.shape, bool)
        for at in np.ndindex(value.shape):
            total = weight = 0.0
            for update, rate in zip(updates, rates, strict=True):
                if all(i < side for i, side in zip(at, side_of(name, rate), strict=True)):
                    total += update.num_examples * float(update.params[name][at])
                    weight += update.num_examples
            if weight:
                out[name][at], nobody[name][at] = np.float32(total / weight), False
    return out, nobody


def side_of(name: str, rate: float) -> tuple[int, ...]:
    """Of a slice of SPEC, by hand: 4 maps, each of 16 pixels when flattened, and 12 units."""
    maps, units = {1.0: (4, 12), 0.5: (2, 6), 0.25: (1, 3)}[rate]
    return {
        "conv.weight": (maps, 1, 3, 3),
        "conv.bias": (maps,),
        "fc1.weight": (units, 16 * maps),
        "fc1.bias": (units,),
        "fc2.weight": (3, units),
        "fc2.bias": (3,),
    }[name]


@pytest.mark.parametrize(
    ("widths", "rates"), [("1 0.5 0.25", (1, 0.5, 0.25, 1)), ("0.5 0.25", (0.5, 0.25, 0.5, 0.25))]
)
def test_the_merge_is_that_of_a_loop_over_elements(widths, rates):
    algorithm = heterofl(server(), widths=widths, assign="fixed", **SGD_SETTINGS)
    state = algorithm.init(first_model())
    updates = answered(algorithm, state)
    for update, rate in zip(updates, rates, strict=True):
        assert {n: v.shape for n, v in update.params.items()} == {
            name: side_of(name, rate) for name in params()
        }
    expected, nobody = merged_by_hand(params(), updates, rates)
    merged = algorithm.server_update(state, updates)
    assert merged.round == 1 and same(dict(merged.params), expected)
    alone = {name: mask for name, mask in nobody.items() if mask.any()}
    assert bool(alone) == (widths == "0.5 0.25")
    for name, mask in alone.items():  # an element that no client had stays as it was
        assert merged.params[name][mask].tobytes() == params()[name][mask].tobytes()
        assert not np.array_equal(merged.params[name][~mask], params()[name][~mask])


def test_what_is_sent_is_the_beginning_of_every_layer():
    algorithm = heterofl(server(), assign="fixed", **SGD_SETTINGS)
    tasks = algorithm.configure(algorithm.init(first_model()), devices())
    for task, rate in zip(tasks, (1.0, 0.5, 0.25, 1.0), strict=True):
        for name, value in task.params.items():
            inside = tuple(slice(0, side) for side in side_of(name, rate))
            assert np.array_equal(value, params()[name][inside])
    assert tasks[0].spec == SPEC and tasks[0].params["fc1.weight"] is tasks[3].params["fc1.weight"]


def test_the_scaler_is_in_the_slice_alone():
    def scalers(setting: bool) -> list[dict[str, float]]:
        algorithm = heterofl(server(), assign="fixed", scaler=setting)
        tasks = algorithm.configure(algorithm.init(first_model()), devices())
        return [
            {n.name: n.layer.factor for n in task.spec.nodes if isinstance(n.layer, Scaler)}
            for task in tasks[:3]
        ]

    assert scalers(True) == [
        {},
        {"conv_scaler": 2.0, "fc1_scaler": 2.0},
        {"conv_scaler": 4.0, "fc1_scaler": 4.0},
    ]
    assert scalers(False) == [{}, {}, {}]


def test_all_devices_that_hold_the_whole_are_fedavg():
    """With slices in the settings, which nobody gets."""
    plain = run(fedavg(server(), **SGD_SETTINGS))
    unlimited = run(heterofl(server(), **SGD_SETTINGS))
    assert same(dict(unlimited.params), dict(plain.params))
    algorithm = heterofl(server(), **SGD_SETTINGS)
    dispatch = LocalDispatch(
        algorithm.client_update, ENGINE, client_data(), lambda step: having(*[NEEDS[0]] * CLIENTS)
    )
    assert same(dict(run(algorithm, dispatch=dispatch).params), dict(plain.params))


def levels_of(tasks) -> list[str]:
    for task in tasks:
        assert task.spec == CUTS[float(task.hparams["width"])].spec
    return [task.hparams["width"] for task in tasks]


def test_memory_decides_to_the_byte():
    algorithm = heterofl(server(), **SGD_SETTINGS)
    state = algorithm.init(first_model())
    tasks = algorithm.configure(state, having(NEEDS[0], NEEDS[0] - 1, NEEDS[1] - 1, None))
    assert levels_of(tasks) == ["1.0", "0.5", "0.25", "1.0"]
    for task in tasks[1:3]:
        (work,) = algorithm.work(task)
        assert peak_memory_bytes(task.spec, [work]) in NEEDS


def test_fixed_levels_follow_the_clients_number():
    algorithm = heterofl(server(), assign="fixed", **SGD_SETTINGS)
    state = algorithm.init(first_model())
    for round in (0, 1):
        tasks = algorithm.configure(replace(state, round=round), having(0, None, 0, None))
        assert levels_of(tasks) == ["1.0", "0.5", "0.25", "1.0"]


def test_drawn_levels_are_new_in_each_round_and_the_same_again():
    algorithm = heterofl(server(300), assign="drawn", **SGD_SETTINGS)
    state = algorithm.init(first_model())
    seen = [
        tuple(levels_of(algorithm.configure(replace(state, round=round), devices())))
        for round in range(100)
    ]
    again = algorithm.configure(replace(state, round=17), devices()[2:])
    assert tuple(levels_of(again)) == seen[17][2:], "whoever else is there"
    counts = Counter(level for levels in seen for level in levels)
    assert set(counts) == {"1.0", "0.5", "0.25"} and min(counts.values()) > 100
    assert len(set(seen)) > 50


def test_who_can_hold_nothing_is_left_out_by_name():
    algorithm = heterofl(server(), **SGD_SETTINGS)
    memory = having(NEEDS[0], NEEDS[1], NEEDS[2] - 1, NEEDS[2])
    dispatch = LocalDispatch(algorithm.client_update, ENGINE, client_data(), lambda step: memory)
    records = []
    run(algorithm, dispatch=dispatch, watch=lambda progress, record: records.append(record))
    for record in records:
        assert record.answered == [0, 1, 3] and not record.refused
        said = f"needs {megabytes(NEEDS[2])}, has {megabytes(NEEDS[2] - 1)}"
        assert record.left_out == {2: said}
        assert levels_of(record.tasks) == ["1.0", "0.5", "0.25"]


def norm_server(**changes):
    given = {"spec": NORM, "inputs": lambda: iter(INPUTS), **changes}
    return replace(server(), **given)


def test_static_norm_gives_the_statistics_of_the_servers_inputs():
    """After a round, against a loop over what each norm of the merged model reads."""
    algorithm = heterofl(norm_server(), assign="fixed", static_norm=True, **SGD_SETTINGS)
    state = algorithm.init(Model(NORM, init_params(NORM, SEED)))
    merged = algorithm.server_update(state, answered(algorithm, state)).params
    for name, wanted in naive(NORM, merged, INPUTS).items():
        np.testing.assert_allclose(merged[name], wanted, rtol=1e-4, atol=1e-5)
    assert naive(NORM, merged, INPUTS).keys() == NORM.buffer_shapes.keys()
    assert not np.array_equal(merged["conv1.weight"], state.params["conv1.weight"])


def test_static_norm_leaves_the_statistics_of_clients_as_they_were_sent():
    """Those of narrow slices are on another scale, by which their clients would seem to be rogues;
    weights train with the statistics of each batch all the same."""
    algorithm = heterofl(norm_server(), assign="fixed", static_norm=True, **SGD_SETTINGS)
    state = algorithm.init(Model(NORM, init_params(NORM, SEED)))
    tasks = algorithm.configure(state, devices())
    for task, update in zip(tasks, answered(algorithm, state), strict=True):
        assert task.spec.buffer_shapes
        sent = {name: update.params[name] for name in task.spec.buffer_shapes}
        assert same(sent, {name: task.params[name] for name in sent})
        assert not np.array_equal(update.params["conv1.weight"], task.params["conv1.weight"])


def test_static_norm_leaves_a_round_without_answers_alone():
    algorithm = heterofl(norm_server(), static_norm=True, **SGD_SETTINGS)
    state = algorithm.init(Model(NORM, init_params(NORM, SEED)))
    assert same(dict(algorithm.server_update(state, []).params), dict(state.params))


@pytest.mark.parametrize(
    ("changes", "setting", "said"),
    [
        ({}, {}, "layer 'bn1' is a BatchNorm.* take a model with GroupNorm, or static_norm=true"),
        ({"inputs": None}, {"static_norm": True}, "static_norm needs inputs of the server's own"),
        ({"spec": SPEC}, {"static_norm": True}, "static_norm is for models with BatchNorm"),
        ({"spec": SPEC}, {"assign": "best"}, "assign must be one of memory, fixed, drawn"),
        ({"spec": SPEC}, {"widths": "0.25 1"}, r"widths must be numbers in \(0, 1\]"),
        ({"spec": SPEC}, {"widths": "2 1"}, r"widths must be numbers in \(0, 1\]"),
        ({"spec": SPEC}, {"lr": -1.0}, "lr"),
        ({"spec": SPEC}, {"cohort": 0}, "cohort"),
    ],
)
def test_what_cannot_be_is_refused_by_name(changes, setting, said):
    with pytest.raises(ValueError, match=said):
        heterofl(norm_server(**changes), **setting)


def test_a_model_with_masks_is_refused():
    masks = {"fc1.weight": np.ones((12, 64), bool)}
    with pytest.raises(ValueError, match="has masks"):
        heterofl(server()).init(Model(SPEC, params(), masks))


@pytest.mark.parametrize("name", available())
def test_the_default_widths_fit_the_catalogue_or_are_refused_by_layer(name: str):
    spec = build(name, (1, 32, 32), 10)
    given = replace(server(), spec=spec, inputs=lambda: iter(()))
    norm = bool(spec.variances)
    if name in ("lenet5", "lenet5_small"):  # 6 and 3 channels in few groups
        with pytest.raises(ValueError, match=r"'norm1' \(GroupNorm\): its \d groups must divide"):
            heterofl(given)
        return
    algorithm = heterofl(given, assign="fixed", static_norm=norm)
    tasks = algorithm.configure(algorithm.init(Model(spec, init_params(spec, 0))), devices())
    sizes = [task.spec.num_params for task in tasks[:3]]
    assert sizes[0] == spec.num_params and sizes[1] < 0.6 * sizes[0] and sizes[2] < 0.6 * sizes[1]
