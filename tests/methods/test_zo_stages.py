"""Forward passes on a stage: the order of parts, a round by hand, what is frozen, who is asked."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from conformance import Case
from federation import (
    ENGINE,
    ROUNDS,
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

from fedlean.algorithm import Device
from fedlean.core import Model, SubModel, derive_seed
from fedlean.cost.profile import load_profile
from fedlean.cost.way import peak_memory_bytes
from fedlean.freezing.forward import forward_work
from fedlean.methods.smartfreeze import smartfreeze
from fedlean.methods.zo_stages import client_update, unused, zo_stages
from fedlean.models.initialise import init_params
from fedlean.models.resnet import resnet8
from fedlean.planning.rehearse import Stage as Rehearsed
from fedlean.runtime.method import complete
from fedlean.submodels.parts import parts
from fedlean.train.forward_updates import Space, estimate, round_seed
from fedlean.train.zeroth_order import Probe, directional_derivatives

# a large σ and momentum instead of Adam, so that rounding in the engines stays rounding
TRAIN = {"directions": 6, "sigma": 0.02, "optimizer": "momentum", "lr": 0.01, "batch_size": 8}
CASE = Case(
    method=zo_stages,
    settings={**TRAIN, "cohort": 3, "micro_batch": 3},
    knob={"sigma": 0.05},
    neutral="every step is along slopes in random directions: no setting takes FedAvg's gradient",
    why_no_masks="parts are dense",
)
PARTS = parts(SPEC)
MODULE = {"surrogate_fc.weight", "surrogate_fc.bias"}
RUN_SEED = derive_seed(SEED, 0, 0, "zeroth order")


def made(**settings):
    return zo_stages(server(), **{**TRAIN, **settings})


def step(algorithm, state, present=None):
    """The state after a round, and its updates as the runtime hands them on."""
    updates = [
        replace(client_update(task, client_data()[task.client], ENGINE, {})[0], task=task)
        for task in algorithm.configure(state, present or devices())
    ]
    return algorithm.server_update(state, updates), updates


def steps(algorithm, count, present=None):
    states = [algorithm.init(first_model())]
    for _ in range(count):
        states.append(step(algorithm, states[-1], present)[0])
    return states


def test_parts_train_one_after_the_other_and_share_the_rounds():
    algorithm = made()
    states = steps(algorithm, ROUNDS)
    assert [state.stage for state in states] == [0, 0, 0, 0, 1, 1, 1]
    assert [state.over for state in states] == [at == 3 for at in range(7)]
    assert [set(state.extra) for state in states] == [MODULE] * 4 + [set()] * 3
    assert [state.steps for state in states] == [0, 1, 2, 3, 1, 2, 3]
    tasks = [algorithm.configure(state, devices())[0] for state in states[:-1]]
    assert [task.hparams["stage"] for task in tasks] == ["conv"] * 3 + ["head"] * 3
    assert {task.sub_model.frozen for task in tasks[:3]} == {frozenset()}
    assert {task.sub_model.frozen for task in tasks[3:]} == {PARTS[0].tensors}
    assert tasks[3].spec == SPEC and algorithm.done(states[-1]) and not algorithm.done(states[-2])
    early, late = (algorithm.model(states[at]) for at in (3, 4))
    assert early.spec == tasks[0].spec and late.spec == SPEC


def test_what_is_frozen_stays_and_what_trains_moves():
    for number, states in ((0, steps(made(), ROUNDS)[:4]), (1, steps(made(), ROUNDS)[3:])):
        for before, after in pairwise(states):
            for name in SPEC.tensor_shapes:
                moved = name in PARTS[number].tensors
                assert same(before.params[name], after.params[name]) != moved, name
            assert same(before.extra, after.extra) == (number == 1 and not before.over)


@pytest.mark.parametrize("number", [0, 1])
def test_a_round_by_hand(number):
    """Slopes of the whole stage along directions of what trains, their mean, momentum's first step.

    The first round of either stage; the micro-batches are of three examples.
    """
    algorithm = made(micro_batch=3)
    state = steps(algorithm, 3 * number)[-1]
    after, updates = step(algorithm, state)
    task, round = updates[0].task, 3 * number + 1
    trained = {
        name: shape
        for name, shape in task.spec.param_shapes.items()
        if name in PARTS[number].tensors or (number == 0 and name in MODULE)
    }
    total, weights = np.zeros(6), 0
    for update, data in zip(updates, client_data(), strict=True):
        seed = derive_seed(SEED, round, update.client, "train")
        ((x, y),) = data.draw(steps=1, batch_size=8, seed=seed)
        frozen = frozenset(task.spec.tensor_shapes.keys() - trained.keys())
        session = ENGINE.open_forward(task.spec, task.params, SubModel(frozen=frozen), batch_size=3)
        slopes = directional_derivatives(
            session, x, y, Probe(6, 0.02), seed=round_seed(RUN_SEED, round), at_once=3
        )
        assert np.array_equal(update.statistics["c"].tensors["c"], slopes.astype("f4"))
        total += data.num_examples * slopes.astype(np.float32)
        weights += data.num_examples
    space = Space(trained, {}, "gaussian")
    gradient = estimate(round_seed(RUN_SEED, round), (total / weights).astype("f4"), space)
    held = {**after.params, **after.extra}
    for name, value in task.params.items():
        expected = value - np.float32(0.01) * gradient[name] if name in trained else value
        np.testing.assert_allclose(held[name], expected, rtol=0, atol=1e-7)


def needs(number: int, **settings) -> int:
    algorithm = made(**settings)
    task = algorithm.configure(steps(algorithm, 3 * number)[-1], [Device(0)])[0]
    return peak_memory_bytes(task.spec, forward_work(task), frozen=task.sub_model.frozen)


@pytest.mark.parametrize("number", [0, 1])
def test_who_has_the_memory_for_the_stage_takes_part(number):
    enough = needs(number)
    algorithm = made(cohort=2)
    state = steps(algorithm, 3 * number)[-1]
    memory = [enough - 1, enough, None, enough + 1]
    present = [Device(client, memory_bytes=each) for client, each in enumerate(memory)]
    chosen = {
        task.client
        for round in range(20)
        for task in algorithm.configure(replace(state, round=round), present)
    }
    assert chosen == {1, 2, 3}


def test_every_stage_takes_less_than_with_backpropagation():
    """The neediest of SmartFreeze's three stages is its first, by its activations."""
    spec = resnet8((1, 8, 8), 3)
    server_of = replace(server(3), spec=spec)
    peaks = []
    for algorithm in (
        zo_stages(server_of, batch_size=32),
        smartfreeze(server_of, pace=False, select=False, batch_size=32),
    ):
        state = algorithm.init(Model(spec, init_params(spec, SEED)))
        for _ in range(3):
            task = algorithm.configure(state, devices())[0]
            works, frozen = algorithm.work(task), task.sub_model.frozen
            peaks.append(peak_memory_bytes(task.spec, works, frozen=frozen))
            state = algorithm.server_update(state, ())
    forward, backward = peaks[:3], peaks[3:]
    assert all(one < 0.8 * other for one, other in zip(forward, backward, strict=True)), peaks
    assert max(forward) < 0.5 * max(backward)


def test_a_deeper_model_has_a_stage_for_each_part():
    spec = resnet8((1, 8, 8), 3)
    algorithm = zo_stages(replace(server(), spec=spec), **TRAIN)
    state = algorithm.init(Model(spec, init_params(spec, SEED)))
    stages = []
    while not algorithm.done(state):
        state, updates = step(algorithm, state)
        stages.append(updates[0].task.hparams["stage"])
        assert not updates[0].params
    assert stages == ["stage1"] * 2 + ["stage2"] * 2 + ["stage3"] * 2


def test_a_plan_walks_through_every_stage():
    profile = load_profile("raspberry_pi_4")
    walked = Rehearsed(SPEC).walked("zo_stages", {}, Device(0, memory_bytes=10**9), profile)
    assert [kind.task.hparams["stage"] for kind in walked.walk.kinds] == ["conv", "head"]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"ends": "nowhere"}, "no block or layer 'nowhere'"),
        ({"lr": 0.0}, "lr"),
        ({"sigma": 0.0}, "sigma"),
        ({"cohort": 0}, "cohort"),
        ({"directions": 0}, "directions"),
    ],
)
def test_bad_settings_are_named(setting, said):
    with pytest.raises(ValueError, match=said):
        made(**setting)


def test_fewer_rounds_than_stages_are_refused():
    with pytest.raises(ValueError, match=r"2 stages need 2 rounds or more, got 1.* with ends"):
        zo_stages(server(1))


def test_a_model_with_masks_is_refused():
    masks = {"fc1.weight": np.ones((12, 64), bool)}
    with pytest.raises(ValueError, match="has masks"):
        made().init(Model(SPEC, params(), masks))


def test_settings_without_effect_are_named():
    assert set(unused(complete("zo_stages", {}))) == {"momentum"}
    assert run(made(module_norm=True)).round == ROUNDS
