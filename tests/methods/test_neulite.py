"""NeuLite: what trains in a stage, how tails circulate, the mentor's loss by torch."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

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
    run,
    same,
    server,
)

from fedlean.algorithm import Device
from fedlean.core import Model, SubModel
from fedlean.cost.price import cost
from fedlean.engine.open import open_engine
from fedlean.engine.protocol import SGD
from fedlean.layers import Conv2d, GlobalAvgPool, GroupNorm, Linear, ReLU
from fedlean.methods.fedavg import client_update as plain_update
from fedlean.methods.fedavg import fedavg
from fedlean.methods.neulite import MOST_STAGES, client_update, neulite, unused
from fedlean.models.catalog import available, build
from fedlean.models.initialise import init_params
from fedlean.models.resnet import resnet8, resnet18
from fedlean.planning.rehearse import Stage as Rehearsed
from fedlean.runtime.local import LocalDispatch
from fedlean.runtime.method import complete
from fedlean.runtime.remote.limit import LimitedEngine
from fedlean.runtime.remote.room import TooLarge
from fedlean.runtime.rounds import RunFailed
from fedlean.spec import sequential
from fedlean.train.hsic import nhsic

SGD_SETTINGS = {"lr": 0.05, "local_steps": 2, "batch_size": 8}
PLAIN = dict.fromkeys(("lambda1_first", "lambda1_last", "lambda2_first", "lambda2_last"), 0.0)
NEUTRAL = "the first part always trains behind an output module, which FedAvg has not"
DENSE = "parts are dense"
CASE = Case(
    method=neulite,
    settings={**SGD_SETTINGS, "cohort": 3, "momentum": 0.5, "mu": 0.1},
    knob={"lambda1_first": 5.0},
    neutral=NEUTRAL,
    why_no_masks=DENSE,
)
MORE_CASES = {
    "pieces": Case(
        method=neulite,
        settings={**SGD_SETTINGS, "ends": "pool relu2", "beginning": "pieces", "micro_batch": 3},
        knob={"hsic": "biased"},
        neutral=NEUTRAL,
        why_no_masks=DENSE,
    ),
    "masked": Case(
        method=neulite,
        settings={**SGD_SETTINGS, "cohort": 3, "density": 0.5, "prune_steps": 5},
        knob={"criterion": "random"},
        neutral=NEUTRAL,
    ),
}
THREE = sequential(
    (1, 8, 8),
    [
        ("c1", Conv2d(3, 3, padding=1), "one"),
        ("r1", ReLU(), "one"),
        ("c2", Conv2d(4, 3, padding=1), "two"),
        ("r2", ReLU(), "two"),
        ("c3", Conv2d(5, 3, padding=1), "three"),
        ("r3", ReLU(), "three"),
        ("pool", GlobalAvgPool(), "three"),
        ("fc", Linear(3), "three"),
    ],
)


def of(spec, **settings):
    return neulite(replace(server(), spec=spec), **{**SGD_SETTINGS, **settings})


def begun(spec, algorithm):
    return algorithm.init(Model(spec, init_params(spec, SEED)))


def task_of(algorithm, state, number: int, present=None):
    """The first device's task of stage `number`, from 0."""
    return algorithm.configure(replace(state, round=number), present or devices())[0]


def trained(task) -> set[str]:
    return set(task.spec.tensor_shapes.keys() - task.sub_model.frozen)


def tensors(*layers: str, suffixes=("weight", "bias")) -> set[str]:
    return {f"{layer}.{suffix}" for layer in layers for suffix in suffixes}


def answered(algorithm, state, engine=ENGINE):
    """Updates as the runtime hands them on."""
    return [
        replace(client_update(task, client_data()[task.client], engine, {})[0], task=task)
        for task in algorithm.configure(state, devices())
    ]


def one_round(algorithm, state):
    return algorithm.server_update(state, answered(algorithm, state))


# The training harmonizer


def test_stages_come_in_turns():
    algorithm = of(THREE, ends="one two")
    state, stages = begun(THREE, algorithm), []
    for _ in range(7):
        stages.append(algorithm.configure(state, devices())[0].hparams["stage"])
        state = algorithm.server_update(state, ())
    assert stages == ["one", "two", "three", "one", "two", "three", "one"]


def test_what_trains_in_the_stages_of_resnet8_is_exactly_this():
    """The part, the tail of the part before, the output module and the projector."""
    spec = resnet8((1, 8, 8), 3)
    algorithm = of(spec, projector="16 8")
    state = begun(spec, algorithm)
    norms = tensors("stem_norm", "stage1_1_norm1", "stage1_1_norm2")
    convs = {"stem.weight", "stage1_1_conv1.weight", "stage1_1_conv2.weight"}
    bare = {"surrogate1_stage2.weight", "surrogate1_stage3.weight"}
    own = tensors("surrogate1_fc", "projector1_fc1", "projector1_fc2")
    assert trained(task_of(algorithm, state, 0)) == norms | convs | bare | own

    tail = {"stage1_1_conv2.weight"} | tensors("stage1_1_norm2")
    norms = tensors("stage2_1_norm1", "stage2_1_norm2", "stage2_1_down_norm")
    convs = {f"stage2_1_{layer}.weight" for layer in ("conv1", "conv2", "down")}
    own = tensors("surrogate2_fc", "projector2_fc1", "projector2_fc2")
    found = trained(task_of(algorithm, state, 1))
    assert found == tail | norms | convs | {"surrogate2_stage3.weight"} | own

    tail = {"stage2_1_conv2.weight"} | tensors("stage2_1_norm2")
    norms = tensors("stage3_1_norm1", "stage3_1_norm2", "stage3_1_down_norm")
    convs = {f"stage3_1_{layer}.weight" for layer in ("conv1", "conv2", "down")}
    own = tensors("fc", "projector3_fc1", "projector3_fc2")
    assert trained(task_of(algorithm, state, 2)) == tail | norms | convs | own


def test_a_batch_norm_trains_with_its_tail_and_others_keep_their_statistics():
    spec = resnet8((1, 8, 8), 3, norm="batch")
    algorithm = of(spec)
    state = begun(spec, algorithm)
    task = task_of(algorithm, state, 1)
    update, _ = client_update(task, client_data()[0], ENGINE, {})
    buffers = ("running_mean", "running_var")
    moved = tensors("stage1_1_norm2", suffixes=buffers)
    assert moved < update.params.keys() and not moved & task.sub_model.frozen
    held = tensors("stem_norm", "stage1_1_norm1", suffixes=buffers)
    assert held < task.sub_model.frozen and not held & update.params.keys()
    for name in moved:
        assert not same(update.params[name], state.params[name])


def test_what_a_stage_makes_of_a_tail_arrives_in_the_next():
    """Stage 3 changes c2, the tail of part 2, which the next stages hold as it left it."""
    algorithm = of(THREE, ends="one two")
    state = begun(THREE, algorithm)
    before = [state]
    for _ in range(3):
        before.append(one_round(algorithm, before[-1]))
    two, three = before[2], before[3]
    for name in tensors("c2"):
        assert not same(two.params[name], three.params[name])
    for name in tensors("c1"):
        assert same(two.params[name], three.params[name]), "frozen in stage 3"
        assert not same(before[1].params[name], two.params[name]), "the tail in stage 2"
    again = task_of(algorithm, three, 1)
    assert same(
        {n: again.params[n] for n in tensors("c2")}, {n: three.params[n] for n in tensors("c2")}
    )
    first = task_of(algorithm, three, 0)
    assert same(
        {n: first.params[n] for n in tensors("c1")}, {n: three.params[n] for n in tensors("c1")}
    )


def test_output_modules_and_projectors_are_a_stages_own():
    algorithm = of(THREE, ends="one two")
    state = begun(THREE, algorithm)
    assert set(state.extra) == tensors(
        "surrogate1_fc",
        "surrogate2_fc",
        *(f"projector{stage}_fc{layer}" for stage in (1, 2, 3) for layer in (1, 2)),
    ) | {"surrogate1_two.weight", "surrogate1_three.weight", "surrogate2_three.weight"}
    after = one_round(algorithm, replace(state, round=1))
    for name, value in after.extra.items():
        assert same(value, state.extra[name]) == ("2_" not in name)
    assert state.params.keys() == THREE.tensor_shapes.keys() == after.params.keys()
    assert algorithm.model is None, "the whole model is what is evaluated"


# The curriculum mentor


def test_weights_lie_on_a_line_over_the_stages():
    algorithm = of(
        THREE, ends="one two", lambda1_first=0.5, lambda1_last=0.1, lambda2_first=0, lambda2_last=2
    )
    state = begun(THREE, algorithm)
    said = [task_of(algorithm, state, number).hparams for number in range(3)]
    assert [h["lambda1"] for h in said] == pytest.approx([0.5, 0.3, 0.1])
    assert [h["lambda2"] for h in said] == pytest.approx([0, 1, 2])
    assert [h["z"] for h in said] == ["r1", "r2", "r3"]
    assert [h["projection"] for h in said] == ["", "projector2_fc2", "projector3_fc2"]


def test_as_released_the_mentor_looks_behind_the_stand_ins():
    """NeuLite's ResNet1: 512 channels behind layer4, and 512-2056-1024-512."""
    spec = resnet18((3, 32, 32), 10)
    algorithm = of(spec, representation="module", projector="2056 1024 512")
    task = task_of(algorithm, begun(spec, algorithm), 0)
    assert task.hparams["z"] == "surrogate1_stage4"
    shapes = [task.spec.param_shapes[f"projector1_fc{layer}.weight"] for layer in (1, 2, 3)]
    assert shapes == [(2056, 512), (1024, 2056), (512, 1024)]
    assert task.spec.output_shape == (10,), "the projector is a dead end"
    last = task_of(algorithm, begun(spec, algorithm), 3)
    assert last.hparams["z"] == "stage4_2_relu2"


def torch_nhsic(torch, z, other, sigma):
    """With Song's unbiased HSIC, in float64: it takes a σ at which kernels are not nearly 1."""

    def kernel(v):
        v = v.reshape(len(v), -1)
        distances = ((v[:, None] - v[None]) ** 2).sum(-1)
        return torch.exp(-distances / (2 * sigma**2 * v.shape[1])) * (1 - torch.eye(len(v)))

    def hsic(k, other):
        m = len(k)
        means = k.sum() * other.sum() / ((m - 1) * (m - 2))
        return (torch.trace(k @ other) + means - 2 / (m - 2) * (k @ other).sum()) / (m * (m - 3))

    k, over = kernel(z), kernel(other)
    return hsic(k, over) / (hsic(k, k) * hsic(over, over)) ** 0.5


@pytest.mark.parametrize("mu", [0.0, 0.3])
def test_two_steps_of_the_middle_stage_by_torch(mu: float):
    """CE - λ1 nHSIC(X, r2) - λ2 nHSIC(Y, proj(GAP r2)) + μ/2 |w - w_sent|², by autograd."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    lambdas = {"lambda1_first": 3, "lambda1_last": 1, "lambda2_first": 1, "lambda2_last": 5}
    algorithm = of(THREE, ends="one two", mu=mu, sigma=0.3, **lambdas)
    task = task_of(algorithm, begun(THREE, algorithm), 1)
    assert trained(task) == task.params.keys(), "c1 is the tail"
    w = {n: torch.tensor(v, dtype=torch.float64) for n, v in task.params.items()}
    sent = {n: v.clone() for n, v in w.items()}
    terms = []
    for x, y in client_data()[0].draw(steps=2, batch_size=8, seed=task.seed):
        for value in w.values():
            value.requires_grad_()
        images, labels = torch.tensor(x, dtype=torch.float64), torch.tensor(y)
        r = functional.relu(functional.conv2d(images, w["c1.weight"], w["c1.bias"], padding=1))
        z = functional.relu(functional.conv2d(r, w["c2.weight"], w["c2.bias"], padding=1))
        h = functional.conv2d(z, w["surrogate2_three.weight"], stride=2, padding=1).mean((2, 3))
        ce = functional.cross_entropy(
            h @ w["surrogate2_fc.weight"].T + w["surrogate2_fc.bias"], labels
        )
        p = z.mean((2, 3)) @ w["projector2_fc1.weight"].T + w["projector2_fc1.bias"]
        p = functional.relu(p) @ w["projector2_fc2.weight"].T + w["projector2_fc2.bias"]
        on_input = torch_nhsic(torch, z, images, 0.3)
        on_label = torch_nhsic(torch, p, functional.one_hot(labels, 3).double(), 0.3)
        terms.append([float(term.detach()) for term in (ce, on_input, on_label)])
        loss = ce - 2 * on_input - 3 * on_label
        loss = loss + mu / 2 * sum(((w[n] - sent[n]) ** 2).sum() for n in w)
        slopes = torch.autograd.grad(loss, list(w.values()))
        w = {n: (w[n] - 0.05 * slope).detach() for n, slope in zip(w, slopes, strict=True)}
    update, _ = client_update(task, client_data()[0], ENGINE, {})
    for name, value in w.items():
        moved = np.abs(value.numpy() - task.params[name]).max()
        np.testing.assert_allclose(
            update.params[name], value.numpy(), rtol=0, atol=2e-4 * moved + 1e-6
        )
    means = np.mean(terms, 0)
    said = [update.metrics[n] for n in ("cross_entropy", "nhsic_input", "nhsic_label")]
    np.testing.assert_allclose(said, means, rtol=1e-4, atol=1e-6)
    total = means[0] - 2 * means[1] - 3 * means[2]
    assert update.metrics["train_loss"] == pytest.approx(total, rel=1e-4)


def test_without_its_terms_the_loss_is_cross_entropy():
    algorithm = of(THREE, ends="one two", momentum=0.9, **PLAIN)
    task = task_of(algorithm, begun(THREE, algorithm), 2)
    assert not any("projector" in name for name in task.params)
    update, _ = client_update(task, client_data()[0], ENGINE, {})
    session = ENGINE.open(
        task.spec,
        task.params,
        SubModel(frozen=task.sub_model.frozen),
        batch_size=8,
        optimizer=SGD(0.05, 0.9),
    )
    for x, y in client_data()[0].draw(steps=2, batch_size=8, seed=task.seed):
        session.step(x, y)
    assert same(dict(update.params), {n: session.params()[n] for n in trained(task)})
    assert update.metrics.keys() == {"train_loss"}


def test_a_last_stage_that_freezes_nothing_is_a_round_of_fedavg():
    """The first part is its own tail; without the terms of the mentor every bit is the same."""
    algorithm, plain = of(SPEC, **PLAIN), fedavg(server(), **SGD_SETTINGS)
    state = replace(algorithm.init(first_model()), round=1)
    after = one_round(algorithm, state)
    other = replace(plain.init(first_model()), round=1)
    updates = [
        replace(plain_update(task, client_data()[task.client], ENGINE, {})[0], task=task)
        for task in plain.configure(other, devices())
    ]
    assert same(dict(after.params), dict(plain.server_update(other, updates).params))


# How what is frozen runs


@pytest.mark.usefixtures("has_native")
@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("beginning", ["pieces", "memory", "disk"])
def test_all_ways_give_the_same_bits(beginning: str, norm: str):
    """The input's nHSIC among them: X is the data, also where batches are of activations.

    The shortcut around the tail crosses the end of what is frozen, so the cut lies before it.
    """
    native, data = open_engine("native", 1), client_data()[0]
    spec = resnet8((1, 8, 8), 3, norm=norm)
    present = [Device(0, num_examples=data.num_examples)]
    together, other = of(spec), of(spec, beginning=beginning, micro_batch=3)
    state = begun(spec, together)
    for number in range(3):
        tasks = [task_of(one, state, number, present) for one in (together, other)]
        updates = [client_update(task, data, native, {})[0] for task in tasks]
        assert same(dict(updates[0].params), dict(updates[1].params))
        assert updates[0].metrics == updates[1].metrics
        assert len(updates[1].work) == (2 if number else 1)
        assert updates[1].work == other.work(tasks[1])


def test_the_input_is_that_of_the_batch():
    """One step at a learning rate of 1e-9: the metric is that of the model as sent."""
    algorithm = of(THREE, ends="one two", local_steps=1, lr=1e-9)
    task = task_of(algorithm, begun(THREE, algorithm), 2)
    update, _ = client_update(task, client_data()[0], ENGINE, {})
    ((x, _),) = client_data()[0].draw(steps=1, batch_size=8, seed=task.seed)
    session = ENGINE.open_forward(task.spec, task.params, SubModel(), batch_size=8)
    z = session.forward(x, taps=["r3"])["r3"]
    assert update.metrics["nhsic_input"] == pytest.approx(nhsic(z, x)[0], rel=1e-5)


# Memory


@cache
def needs(number: int) -> int:
    algorithm = of(THREE, ends="one two", momentum=0.9)
    task = task_of(algorithm, begun(THREE, algorithm), number)
    return cost(task, algorithm.work(task), server().profile).peak_memory_bytes


@pytest.mark.parametrize("number", [0, 1, 2])
def test_only_devices_that_can_hold_a_stage_are_drawn_for_it(number: int):
    algorithm = of(THREE, ends="one two", momentum=0.9)
    state = replace(begun(THREE, algorithm), round=number)
    need = needs(number)
    memory = [need, need - 1, None, 10 * need]
    present = [Device(client, memory_bytes=each) for client, each in enumerate(memory)]
    assert [task.client for task in algorithm.configure(state, present)] == [0, 2, 3]
    weak = [Device(client, memory_bytes=1) for client in range(3)]
    asked = algorithm.configure(state, weak)
    assert [task.client for task in asked] == [0, 1, 2], "the runtime says what each lacks"


def test_stages_need_unlike_memory_and_who_holds_none_is_named():
    least = min(needs(number) for number in range(3))
    assert len({needs(number) for number in range(3)}) == 3
    memory = [Device(client, memory_bytes=least - 1) for client in range(4)]
    algorithm = of(THREE, ends="one two", momentum=0.9)
    dispatch = LocalDispatch(algorithm.client_update, ENGINE, client_data(), lambda step: memory)
    records = []
    with pytest.raises(RunFailed, match="nobody was asked: no task fits its device"):
        run(
            algorithm,
            dispatch=dispatch,
            watch=lambda progress, record: records.append(record),
            first=Model(THREE, init_params(THREE, SEED)),
        )
    assert sorted(records[0].left_out) == [0, 1, 2, 3]
    assert all("needs" in reason for reason in records[0].left_out.values())


@pytest.mark.usefixtures("has_native")
@pytest.mark.parametrize("mu", [0.0, 0.1])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_what_a_task_is_said_to_take_is_what_its_engine_must_hold(number: int, mu: float):
    """To the byte; the mentor's own arrays lie outside the engine."""
    native = open_engine("native", 1)
    algorithm = of(THREE, ends="one two", momentum=0.9, mu=mu)
    task = task_of(algorithm, begun(THREE, algorithm), number)
    (claimed,) = algorithm.work(task)
    assert claimed.held_floats > 8 * 64, "at least the representation of 8 images"
    assert claimed.optimizer_floats == (2 if mu else 1)
    said = cost(task, algorithm.work(task), server().profile).peak_memory_bytes
    inside = said - 4 * claimed.held_floats
    update, _ = client_update(
        task, client_data()[0], LimitedEngine(native, inside, emulated=True), {}
    )
    assert update.work == (claimed,)
    with pytest.raises(TooLarge):
        client_update(task, client_data()[0], LimitedEngine(native, inside - 1, emulated=True), {})


@pytest.mark.parametrize("name", [*available(), "resnet34,blocks=unit"])
def test_a_plan_walks_through_every_stage(name: str):
    spec = build(name, (1, 32, 32), 10)
    settings = complete("neulite", {})
    found = Rehearsed(spec).walked("neulite", settings, Device(0), server().profile).walk
    stages = [str(kind.task.hparams["stage"]) for kind in found.kinds]
    assert found.complete and len(stages) == len(set(stages)) >= 2
    assert found.kinds[-1].task.spec.output_shape == (10,)
    whole = {name for kind in found.kinds for name in trained(kind.task)}
    assert whole >= spec.tensor_shapes.keys(), "every tensor of the model trains in some stage"
    assert len(stages) < MOST_STAGES


# Settings


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"lambda1_first": -0.1}, "lambda1_first must lie in"),
        ({"lambda2_last": 2e3}, "lambda2_last must lie in"),
        ({"mu": -1.0}, "mu must lie in"),
        ({"sigma": 0.0}, "sigma must lie in"),
        ({"hsic": "median"}, "hsic must be one of unbiased, biased, got 'median'"),
        ({"representation": "all"}, "representation must be one of part, module, got 'all'"),
        ({"projector": "64 x"}, "projector must be widths of linear layers, as '32 16', got"),
        ({"projector": ""}, "projector must be widths"),
        ({"loss": "bce"}, "loss must be 'ce'"),
        ({"batch_size": 3}, "batch_size must be at least 4, got 3: nHSIC compares"),
        ({"ends": "nowhere"}, "no block or layer 'nowhere'"),
        ({"ends": "conv relu1"}, "no weights to train after 'conv' up to 'relu1'"),
        ({"beginning": "eagerly"}, "beginning must be one of"),
        ({"lr": 0.0}, "lr"),
    ],
)
def test_bad_hyperparameters_are_named(setting, said):
    with pytest.raises(ValueError, match=said):
        of(SPEC, **setting)


def test_a_part_of_a_norm_alone_is_refused():
    layers = [("first", Conv2d(2, 1)), ("norm", GroupNorm()), ("second", Conv2d(2, 1))]
    spec = sequential((1, 2, 2), [*layers, ("pool", GlobalAvgPool()), ("out", Linear(3))])
    with pytest.raises(ValueError, match="part 'norm' has no convolution or linear layer"):
        of(spec, ends="first norm")


def test_fewer_rounds_than_stages_are_refused():
    with pytest.raises(ValueError, match="3 stages need 3 rounds or more, got 2: take more"):
        neulite(replace(server(rounds=2), spec=THREE), ends="one two")


def test_a_small_batch_is_enough_without_the_mentor():
    assert run(of(SPEC, batch_size=2, **PLAIN)).round == ROUNDS


def test_settings_without_effect_are_named():
    settings = complete("neulite", {"density": 0.5})
    assert unused(settings) == {}
    alone = {**settings, "lambda2_first": 0.0, "lambda2_last": 0.0}
    assert unused(alone) == {"projector": "lambda2 is 0"}
    assert unused({**settings, **PLAIN}).keys() == {"sigma", "hsic", "representation", "projector"}
