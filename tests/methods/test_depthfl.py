"""DepthFL: depths by memory, the loss over exits by hand, the merge of each part."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log

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

from fedlean.algorithm import Device
from fedlean.core import Model, SubModel, Work
from fedlean.cost.price import cost
from fedlean.cost.way import peak_memory_bytes
from fedlean.engine.open import open_engine
from fedlean.engine.protocol import SGD
from fedlean.layers import Linear
from fedlean.methods.depthfl import client_update, depthfl
from fedlean.models.catalog import available, build
from fedlean.models.initialise import init_params
from fedlean.runtime.local import LocalDispatch
from fedlean.runtime.remote.limit import LimitedEngine
from fedlean.runtime.remote.room import TooLarge
from fedlean.spec import sequential
from fedlean.submodels.exits import ending_at, with_exits
from fedlean.train.losses import mutual_distillation

SGD_SETTINGS = {"lr": 0.05, "local_steps": 2, "batch_size": 8}
CASE = Case(
    method=depthfl,
    settings={**SGD_SETTINGS, "cohort": 3, "momentum": 0.5, "assign": "fixed"},
    knob={"distillation": 0.0},
    neutral="every device trains at least two exits or a part of the model; FedAvg has one exit",
    why_no_masks="beginnings are dense",
)
EXITS = with_exits(SPEC)
CUTS = [ending_at(EXITS, depth) for depth in (1, 2)]


def needs(depth: int, momentum: float = 0.0) -> int:
    """Of two steps on 8 examples whose loss reads `depth` exits."""
    taps = EXITS.names[:depth]
    work = Work(2, 8, taps=taps, optimizer_floats=bool(momentum))
    return peak_memory_bytes(CUTS[depth - 1].spec, [work])


def having(*memory_bytes: int | None) -> list[Device]:
    return [Device(client, memory_bytes=each) for client, each in enumerate(memory_bytes)]


def fixed(**settings):
    return depthfl(server(), assign="fixed", **{**SGD_SETTINGS, **settings})


def answered(algorithm, state, present=None):
    """Updates as the runtime hands them on."""
    return [
        replace(client_update(task, client_data()[task.client], ENGINE, {})[0], task=task)
        for task in algorithm.configure(state, present or devices())
    ]


def softmax(z):
    e = np.exp(z.astype(np.float64))
    return e / e.sum(1, keepdims=True)


def test_the_loss_of_two_exits_by_hand():
    """p_a = (1/2, 1/2) and p_b = (3/4, 1/4), of the first class."""
    taps = {"a": np.zeros((1, 2), np.float32), "b": np.array([[log(3), 0]], np.float32)}
    y = np.array([0])
    ce = log(2) + log(4 / 3)
    kl = (3 / 4 * log(3 / 2) + 1 / 4 * log(1 / 2)) + (1 / 2 * log(2 / 3) + 1 / 2 * log(2))
    value, gradients = mutual_distillation(taps, y, exits=("a", "b"))
    assert value == pytest.approx(ce + kl, rel=1e-6)
    # p - onehot, and p_own - p_other
    np.testing.assert_allclose(gradients["a"], [[-1 / 2 - 1 / 4, 1 / 2 + 1 / 4]], rtol=1e-6)
    np.testing.assert_allclose(gradients["b"], [[-1 / 4 + 1 / 4, 1 / 4 - 1 / 4]], atol=1e-7)


@pytest.mark.parametrize("weight", [1.0, 0.25, 0.0])
def test_a_step_of_a_deep_device_by_hand(weight: float):
    """Σ CE + weight Σ KL of the exits on its batch, and SGD with that gradient."""
    algorithm = fixed(distillation=weight, local_steps=1)
    task = algorithm.configure(algorithm.init(first_model()), devices())[0]
    assert task.hparams["exits"] == "exit_conv.fc2"
    update, _ = client_update(task, client_data()[0], ENGINE, {})
    session = ENGINE.open(
        task.spec, task.params, SubModel(), batch_size=8, optimizer=SGD(0.05), loss="ce"
    )
    ((x, y),) = client_data()[0].draw(steps=1, batch_size=8, seed=task.seed)
    values = session.forward(x, taps=EXITS.names, training=True)
    p, q = (softmax(values[name]) for name in EXITS.names)
    picked = np.arange(8), y
    loss = -np.log(p[picked]).mean() - np.log(q[picked]).mean()
    loss += weight * ((q * np.log(q / p)).sum(1).mean() + (p * np.log(p / q)).sum(1).mean())
    assert update.metrics["train_loss"] == pytest.approx(loss, rel=1e-6)
    onehot = np.eye(3)[y]
    gradients = {
        name: ((own - onehot + weight * (own - other)) / 8).astype(np.float32)
        for name, own, other in (("exit_conv", p, q), ("fc2", q, p))
    }
    moved = session.backward(gradients)
    for name, value in update.params.items():
        expected = task.params[name] - np.float32(0.05) * moved[name]
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


def test_a_shallow_device_has_cross_entropy_alone():
    """FedAvg's step on the beginning with its exit."""
    algorithm = fixed()
    task = algorithm.configure(algorithm.init(first_model()), devices())[1]
    assert (task.hparams["depth"], task.hparams["exits"]) == ("1", "exit_conv")
    assert task.params.keys() == {
        *("conv.weight", "conv.bias", "exit_conv.weight", "exit_conv.bias"),
    }
    update, _ = client_update(task, client_data()[1], ENGINE, {})
    session = ENGINE.open(
        task.spec, task.params, SubModel(), batch_size=8, optimizer=SGD(0.05), loss="ce"
    )
    for x, y in client_data()[1].draw(steps=2, batch_size=8, seed=task.seed):
        session.step(x, y)
    for name, value in session.params().items():
        np.testing.assert_allclose(update.params[name], value, rtol=1e-5, atol=1e-7)


def test_parts_are_merged_over_those_who_have_them():
    """Depths 2, 1, 2, 1: conv is everybody's, fc1 that of clients 0 and 2; weights are examples."""
    algorithm = fixed()
    state = algorithm.init(first_model())
    updates = answered(algorithm, state)
    merged = algorithm.server_update(state, updates).params
    assert merged.keys() == EXITS.spec.tensor_shapes.keys()
    for name, value in merged.items():
        having_it = [u for u in updates if name in u.params]
        assert [u.client for u in having_it] == (
            [0, 1, 2, 3] if name.startswith(("conv", "exit_conv")) else [0, 2]
        )
        total = sum(u.num_examples * u.params[name].astype(np.float64) for u in having_it)
        weight = sum(u.num_examples for u in having_it)
        np.testing.assert_array_equal(value, (total / weight).astype(np.float32))
    shallow = algorithm.server_update(state, [updates[1], updates[3]]).params
    for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
        assert shallow[name].tobytes() == params()[name].tobytes()


def test_the_model_begins_as_given_and_exits_are_drawn():
    state = fixed().init(first_model())
    assert same({n: state.params[n] for n in params()}, dict(params()))
    drawn = init_params(EXITS.spec, SEED)
    assert same(state.params["exit_conv.weight"], drawn["exit_conv.weight"])


def test_memory_decides_to_the_byte():
    algorithm = depthfl(server(), **SGD_SETTINGS)
    state = algorithm.init(first_model())
    two, one = needs(2), needs(1)
    assert one < two
    tasks = algorithm.configure(state, having(two, two - 1, one - 1, None))
    assert [task.hparams["depth"] for task in tasks] == ["2", "1", "1", "2"]
    for task in tasks:
        assert task.spec == CUTS[int(str(task.hparams["depth"])) - 1].spec
        price = cost(task, algorithm.work(task), server().profile)
        assert price.peak_memory_bytes == needs(int(str(task.hparams["depth"])))


def test_fixed_depths_follow_the_clients_number():
    state = fixed().init(first_model())
    tasks = fixed().configure(state, having(0, None, 0, None))
    assert [task.hparams["depth"] for task in tasks] == ["2", "1", "2", "1"]


@pytest.mark.usefixtures("has_native")
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("client", [0, 1])
def test_what_a_task_is_said_to_take_is_what_its_device_must_hold(client: int, momentum: float):
    """Taps and all: with a byte less the device's engine refuses."""
    native = open_engine("native", 1)
    algorithm = fixed(momentum=momentum)
    task = algorithm.configure(algorithm.init(first_model()), devices())[client]
    depth = int(str(task.hparams["depth"]))
    said = cost(task, algorithm.work(task), server().profile).peak_memory_bytes
    assert said == needs(depth, momentum)
    data = client_data()[client]
    update, _ = client_update(task, data, LimitedEngine(native, said, emulated=True), {})
    assert update.work == algorithm.work(task)
    with pytest.raises(TooLarge):
        client_update(task, data, LimitedEngine(native, said - 1, emulated=True), {})


def test_who_can_hold_nothing_is_left_out_by_name():
    algorithm = depthfl(server(), **SGD_SETTINGS)
    memory = having(needs(2), needs(1), needs(1) - 1, None)
    dispatch = LocalDispatch(algorithm.client_update, ENGINE, client_data(), lambda step: memory)
    records = []
    run(algorithm, dispatch=dispatch, watch=lambda progress, record: records.append(record))
    for record in records:
        assert record.answered == [0, 1, 3] and not record.refused
        assert list(record.left_out) == [2] and "needs" in record.left_out[2]


def test_the_ensemble_is_the_sum_of_the_exits():
    algorithm = fixed()
    state = run(algorithm)
    model = algorithm.model(state)
    assert model.spec.nodes[-1].inputs == EXITS.names and model.params is state.params
    x = client_data()[0].draw(steps=1, batch_size=8, seed=0)
    images, _ = next(iter(x))

    def logits(spec, name, taps=()):
        session = ENGINE.open_forward(spec, state.params, SubModel(), batch_size=8)
        return session.forward(images, taps=taps)[name]

    summed = sum(logits(EXITS.spec, name, EXITS.names) for name in EXITS.names)
    np.testing.assert_allclose(
        logits(model.spec, model.spec.nodes[-1].name), summed, rtol=1e-5, atol=1e-6
    )


def test_without_the_ensemble_the_last_exit_is_the_output():
    algorithm = fixed(ensemble=False)
    state = run(algorithm)
    assert same(state, run(fixed())), "nothing else changes"
    model = algorithm.model(state)
    assert model.spec == EXITS.spec and model.spec.nodes[-1].name == "fc2"
    assert model.params.keys() == model.spec.tensor_shapes.keys()


def test_the_distillation_rises_as_in_the_authors_code():
    """exp(-5 (1 - r/4)²) in round r + 1, and 1 from round 5 on."""
    algorithm = fixed(distillation=0.5, distillation_rounds=4)
    state = algorithm.init(first_model())
    weights = [
        algorithm.configure(replace(state, round=r), devices())[0].hparams["distillation"]
        for r in range(6)
    ]
    expected = [exp(-5), exp(-5 * 9 / 16), exp(-5 / 4), exp(-5 / 16), 1, 1]
    assert weights == pytest.approx([0.5 * each for each in expected])
    at_once = fixed().configure(state, devices())[0].hparams["distillation"]
    assert at_once == 1.0


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"assign": "drawn"}, "assign must be one of memory, fixed, got 'drawn'"),
        ({"loss": "bce"}, "loss must be 'ce', the loss of every exit, got 'bce'"),
        ({"distillation": -1.0}, "distillation"),
        ({"distillation_rounds": -1}, "distillation_rounds"),
        ({"lr": 0.0}, "lr"),
        ({"cohort": 0}, "cohort"),
    ],
)
def test_bad_hyperparameters_are_named(setting, said):
    with pytest.raises(ValueError, match=said):
        depthfl(server(), **setting)


def test_a_model_that_cannot_end_earlier_is_refused():
    alone = replace(server(), spec=sequential((4,), [("fc", Linear(3))]))
    with pytest.raises(ValueError, match="no block after which it could end"):
        depthfl(alone)


def test_a_model_with_masks_is_refused():
    masks = {"fc1.weight": np.ones((12, 64), bool)}
    with pytest.raises(ValueError, match="has masks"):
        depthfl(server()).init(Model(SPEC, params(), masks))


@pytest.mark.parametrize("name", available())
def test_depths_of_the_catalogue_go_from_the_largest_to_the_smallest(name: str):
    spec = build(name, (1, 32, 32), 10)
    exits = with_exits(spec)
    algorithm = depthfl(replace(server(), spec=spec), assign="fixed", momentum=0.9)
    state = algorithm.init(Model(spec, init_params(spec, 0)))
    present = [Device(client) for client in range(len(exits.names))]
    tasks = algorithm.configure(state, present)
    depths = [len(str(task.hparams["exits"]).split(".")) for task in tasks]
    assert depths == list(range(len(exits.names), 0, -1))
    assert tasks[0].params.keys() == exits.spec.tensor_shapes.keys()
