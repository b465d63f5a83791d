"""Forward passes on slices: who gets which, the estimate and its merge by hand, what stays."""

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
    dataset,
    devices,
    first_model,
    params,
    run,
    same,
    server,
)

from fedlean.algorithm import Device
from fedlean.core import Model, Work, derive_seed
from fedlean.cost.way import peak_memory_bytes
from fedlean.engine.directions import direction
from fedlean.layers import Flatten, Linear
from fedlean.methods.heterofl import heterofl
from fedlean.methods.ntk_zo import ntk_zo
from fedlean.methods.zo_slices import client_update, unused, zo_slices
from fedlean.models.initialise import init_params
from fedlean.models.resnet import resnet8
from fedlean.runtime.checks import Expected, refusal
from fedlean.runtime.local import LocalDispatch
from fedlean.runtime.method import complete
from fedlean.spec import sequential
from fedlean.submodels.static_norm import calibrate
from fedlean.submodels.width import width
from fedlean.train.forward_round import forms
from fedlean.train.forward_updates import round_seed

# a large σ and momentum instead of Adam, so that rounding in the engines stays rounding
TRAIN = {"directions": 6, "sigma": 0.02, "optimizer": "momentum", "lr": 0.01, "batch_size": 8}
CASE = Case(
    method=zo_slices,
    settings={**TRAIN, "cohort": 3, "assign": "fixed", "widths": "1 0.75"},
    knob={"widths": "1 0.5"},
    neutral="every step is along slopes in random directions: no setting takes FedAvg's gradient",
    why_no_masks="slices are dense",
)
RATES = (1.0, 0.5, 0.25)
CUTS = {rate: width(SPEC, rate) for rate in RATES}
NEEDS = [peak_memory_bytes(CUTS[rate].spec, [Work(0, 8, forward_examples=8 * 7)]) for rate in RATES]
RUN_SEED = derive_seed(SEED, 0, 0, "zeroth order")
# two layers without anything between them: gradients of the loss follow by hand
LINEAR = sequential((1, 8, 8), [("flat", Flatten()), ("fc1", Linear(4)), ("fc2", Linear(3))])


def answered(algorithm, state, present=None):
    """Updates as the runtime hands them on."""
    return [
        replace(client_update(task, client_data()[task.client], ENGINE, {})[0], task=task)
        for task in algorithm.configure(state, present or devices())
    ]


def gradient(values, x, y):
    """Of the mean cross-entropy of LINEAR, or of a slice of it, by the chain rule in float64."""
    w1, b1, w2, b2 = (
        values[name].astype(np.float64)
        for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    )
    flat = x.reshape(len(x), -1).astype(np.float64)
    hidden = flat @ w1.T + b1
    logits = hidden @ w2.T + b2
    p = np.exp(logits - logits.max(1, keepdims=True))
    error = (p / p.sum(1, keepdims=True) - np.eye(3)[y]) / len(y)
    back = error @ w2
    return {
        "fc1.weight": back.T @ flat,
        "fc1.bias": back.sum(0),
        "fc2.weight": error.T @ hidden,
        "fc2.bias": error.sum(0),
    }


def test_a_round_of_a_linear_model_by_hand():
    """ĝ is Σ_k (g_w·z_k) z_k / K of each width, of a coordinate the mean over those who have it.

    Clients 0 and 3 have all four hidden units, 1 has two of them and 2 has one.
    """
    settings = {**TRAIN, "sigma": 1e-3, "differences": "central", "lr": 1.0, "assign": "fixed"}
    algorithm = zo_slices(replace(server(), spec=LINEAR), **settings)
    first = init_params(LINEAR, SEED)
    state = algorithm.init(Model(LINEAR, first))
    updates = answered(algorithm, state)
    after = algorithm.server_update(state, updates)

    units = {0: 4, 1: 2, 2: 1, 3: 4}
    total = {name: np.zeros(value.shape) for name, value in first.items()}
    weight = {name: np.zeros(value.shape) for name, value in first.items()}
    for client, held in units.items():
        ((x, y),) = client_data()[client].draw(
            steps=1, batch_size=8, seed=derive_seed(SEED, 1, client, "train")
        )
        rows = {
            "fc1.weight": np.s_[:held],
            "fc1.bias": np.s_[:held],
            "fc2.weight": np.s_[:, :held],
            "fc2.bias": np.s_[:],
        }
        values = {name: first[name][rows[name]] for name in first}
        exact = gradient(values, x, y)
        seed = round_seed(RUN_SEED, 1, {4: 0, 2: 1, 1: 2}[held])
        slopes = []
        for k in range(6):
            z = {n: direction(seed, k, n, values[n].shape, None, "gaussian") for n in values}
            slopes.append(sum(exact[name].ravel() @ z[name] for name in z))
            for name in z:
                part = slopes[-1] * z[name].reshape(values[name].shape) / 6
                total[name][rows[name]] += client_data()[client].num_examples * part
        for name in first:
            weight[name][rows[name]] += client_data()[client].num_examples
        sent = updates[client].statistics["c"].tensors["c"]
        np.testing.assert_allclose(sent, slopes, rtol=2e-3, atol=2e-3)
    for name, value in first.items():
        estimate = total[name] / weight[name]
        np.testing.assert_allclose(value - after.params[name], estimate, rtol=0.01, atol=5e-3)


@pytest.mark.parametrize("optimizer", ["adam", "momentum", "normalised"])
def test_width_one_alone_is_zeroth_order_training_of_the_whole_model(optimizer):
    """Bit for bit: the same directions, slopes and steps; with slices that nobody gets, too."""
    settings = {**TRAIN, "optimizer": optimizer, "cohort": 3}
    plain = run(ntk_zo(server(), **settings, density=1.0))
    for widths in ("1", "1 0.5 0.25"):
        sliced = run(zo_slices(server(), **settings, widths=widths))
        assert same(dict(sliced.params), dict(plain.params))
        assert same(dict(sliced.moments), dict(plain.moments)) and sliced.steps == plain.steps


@pytest.mark.parametrize("optimizer", ["adam", "momentum"])
def test_what_nobody_holds_stays_with_its_moments(optimizer):
    """Wide slices answer in the first round only; after that their coordinates rest."""
    settings = {**TRAIN, "optimizer": optimizer, "widths": "0.5 0.25"}
    algorithm = zo_slices(server(), **settings)
    states = [algorithm.init(first_model())]
    for memory in (NEEDS[1], NEEDS[2], NEEDS[2]):
        present = [Device(client, memory_bytes=memory) for client in range(CLIENTS)]
        states.append(algorithm.server_update(states[-1], answered(algorithm, states[-1], present)))
    group = {"adam": "second", "momentum": "velocity"}[optimizer]
    for rate, before, after in zip((0.5, 0.25, 0.25), states, states[1:], strict=False):
        for name, index in CUTS[rate].index.items():
            held = np.zeros(SPEC.tensor_shapes[name], bool)
            held[np.ix_(*(np.arange(axis.start, axis.stop) for axis in index))] = True
            zeros = np.zeros(held.shape, np.float32)
            for old, new in (
                (before.params[name], after.params[name]),
                (before.moments.get(group, {}).get(name, zeros), after.moments[group][name]),
            ):
                assert old[~held].tobytes() == new[~held].tobytes()
                assert (old[held] != new[held]).all()
    assert [state.steps for state in states] == [0, 1, 2, 3]


def test_clients_of_a_width_share_directions_and_widths_have_their_own():
    algorithm = zo_slices(server(), **TRAIN, assign="fixed")
    tasks = algorithm.configure(algorithm.init(first_model()), devices())
    seeds = [task.hparams["direction_seed"] for task in tasks]
    assert seeds[0] == seeds[3] == round_seed(RUN_SEED, 1) and len(set(seeds)) == 3
    later = algorithm.configure(replace(algorithm.init(first_model()), round=1), devices())
    assert not {task.hparams["direction_seed"] for task in later} & set(seeds)


def test_memory_of_forward_passes_decides_to_the_byte():
    algorithm = zo_slices(server(), **TRAIN)
    limits = [NEEDS[0], NEEDS[0] - 1, NEEDS[1] - 1, None]
    present = [Device(client, memory_bytes=limit) for client, limit in enumerate(limits)]
    tasks = algorithm.configure(algorithm.init(first_model()), present)
    assert [task.hparams["width"] for task in tasks] == ["1.0", "0.5", "0.25", "1.0"]
    for task in tasks:
        assert task.spec == CUTS[float(task.hparams["width"])].spec
        assert peak_memory_bytes(task.spec, algorithm.work(task)) in NEEDS


def test_a_device_holds_a_wider_slice_than_backpropagation_lets_it():
    """At the memory of the widest forward pass HeteroFL's rule gives a narrower one."""
    there = [Device(0, memory_bytes=NEEDS[0])]
    forward, backward = (
        made.configure(made.init(first_model()), there)[0].hparams["width"]
        for made in (
            zo_slices(server(), **TRAIN),
            heterofl(server(), batch_size=8, local_steps=1),
        )
    )
    assert (forward, backward) == ("1.0", "0.5")


def test_a_native_session_holds_what_the_plan_says():
    pytest.importorskip("fedlean._native")
    algorithm = zo_slices(server(), **TRAIN, assign="fixed")
    for task, need in zip(
        algorithm.configure(algorithm.init(first_model()), devices()), NEEDS, strict=False
    ):
        held = []

        class Watched:
            def __getattr__(self, name):
                return getattr(ENGINE, name)

            def open_forward(self, *given, held=held, **named):
                held.append(ENGINE.open_forward(*given, **named))
                return held[-1]

        client_update(task, client_data()[task.client], Watched(), {})
        assert [session.held_bytes for session in held] == [need]


def test_k_scalars_go_up_and_no_parameters():
    algorithm = zo_slices(server(), **TRAIN, assign="fixed", scalars="int8")
    for update in answered(algorithm, algorithm.init(first_model())):
        assert not update.params and update.statistics["c"].tensors["c"].shape == (6,)
        assert refusal(update, update.task, Expected(forms(update.task))) is None


def test_who_can_hold_nothing_is_left_out_by_name():
    algorithm = zo_slices(server(), **TRAIN)
    memory = [Device(c, memory_bytes=NEEDS[2] - (c == 1)) for c in range(CLIENTS)]
    dispatch = LocalDispatch(algorithm.client_update, ENGINE, client_data(), lambda step: memory)
    records = []
    run(algorithm, dispatch=dispatch, watch=lambda progress, record: records.append(record))
    for record in records:
        assert record.answered == [0, 2, 3] and list(record.left_out) == [1]


def test_a_round_without_answers_changes_nothing():
    algorithm = zo_slices(server(), **TRAIN)
    state = algorithm.init(first_model())
    assert same(algorithm.server_update(state, ()), replace(state, round=1))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"assign": "best"}, "assign must be one of memory, fixed, drawn"),
        ({"widths": "0.5 1"}, r"widths must be numbers in \(0, 1\]"),
        ({"lr": 0.0}, "lr"),
        ({"sigma": 0.0}, "sigma"),
        ({"cohort": 0}, "cohort"),
        ({"optimizer": "normalised", "directions": 1}, "directions=2"),
    ],
)
def test_bad_settings_are_named(setting, said):
    with pytest.raises(ValueError, match=said):
        zo_slices(server(), **setting)


def test_the_server_finds_the_statistics_of_norms():
    spec = resnet8((1, 8, 8), 3, norm="batch")
    inputs = [(dataset(7).x_test[:20] / np.float32(255), np.zeros(20))]
    there = replace(server(), spec=spec, inputs=lambda: iter(inputs))
    with pytest.raises(ValueError, match="is a BatchNorm, whose running statistics differ"):
        zo_slices(there, **TRAIN)
    algorithm = zo_slices(there, **TRAIN, assign="fixed", static_norm=True)
    state = algorithm.init(Model(spec, init_params(spec, SEED)))
    after = algorithm.server_update(state, answered(algorithm, state))
    for name, value in calibrate(spec, after.params, inputs, ENGINE).items():
        np.testing.assert_allclose(after.params[name], value, rtol=1e-4, atol=1e-6)
    assert not same(after.params["stem_norm.running_mean"], state.params["stem_norm.running_mean"])


def test_a_model_with_masks_is_refused():
    masks = {"fc1.weight": np.ones((12, 64), bool)}
    with pytest.raises(ValueError, match="has masks"):
        zo_slices(server()).init(Model(SPEC, params(), masks))


def test_settings_without_effect_are_named():
    assert set(unused(complete("zo_slices", {}))) == {"momentum"}
    alone = complete("zo_slices", {"widths": "1", "optimizer": "momentum"})
    assert set(unused(alone)) == {"assign"}
