"""FIARSE: who gets which weights, eq. (3) by a loop, and the merge of masks by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

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

from fedlean.algorithm import Device
from fedlean.core import ClientUpdate, Model, SubModel, Work
from fedlean.cost.way import peak_memory_bytes
from fedlean.engine.protocol import SGD
from fedlean.methods.fedavg import fedavg
from fedlean.methods.fiarse import client_update, fiarse, work
from fedlean.models.initialise import init_params
from fedlean.models.lenet300 import lenet300
from fedlean.printable import megabytes
from fedlean.runtime.local import LocalDispatch
from fedlean.train.loss_gradient import loss_and_gradient
from fedlean.tree import apply_mask, num_kept, pack

SGD_SETTINGS = {"lr": 0.05, "local_steps": 2, "batch_size": 8}
THREE = {"assign": "fixed", "densities": "1 0.5 0.25"}
CASE = Case(
    method=fiarse,
    settings={**SGD_SETTINGS, **THREE, "cohort": 3, "momentum": 0.5},
    knob={"densities": "1 0.5 0.125"},
    neutral={**SGD_SETTINGS, "densities": "1"},
    fedavg=SGD_SETTINGS,
    why_no_masks="the server's model is whole, and the masks of the devices are their own",
)
MORE_CASES = {
    "step": replace(
        CASE,
        settings={**SGD_SETTINGS, **THREE, "biased": "step", "selection": "model"},
        knob={"biased": "never"},
        neutral={**SGD_SETTINGS, "densities": "1", "biased": "step", "selection": "model"},
    )
}
SIZES = {name: prod(SPEC.param_shapes[name]) for name in SPEC.prunable}  # 36, 768 and 36


def having(*memory_bytes: int | None) -> list[Device]:
    return [Device(client, memory_bytes=each) for client, each in enumerate(memory_bytes)]


def rising(first: dict[str, float]):
    """|w| rises by 1 from coordinate to coordinate, with alternating signs."""
    weights = {name: value.copy() for name, value in params().items()}
    for name, least in first.items():
        sizes = least + np.arange(SIZES[name], dtype=np.float32)
        sizes[::2] *= -1
        weights[name] = sizes.reshape(SPEC.param_shapes[name])
    return weights


def state_of(algorithm, weights):
    return replace(algorithm.init(first_model()), params=weights)


def tasks_of(algorithm, weights, present=None):
    return algorithm.configure(state_of(algorithm, weights), present or devices())


def answered(algorithm, state, present=None):
    """Updates as the runtime hands them on."""
    return [
        replace(client_update(task, client_data()[task.client], ENGINE, {})[0], task=task)
        for task in algorithm.configure(state, present or devices())
    ]


def test_the_largest_weights_of_each_layer_by_hand():
    """The last 18 and 9 of conv and fc2, the last 384 and 192 of fc1, whatever their signs."""
    weights = rising({"conv.weight": 1, "fc1.weight": 1000, "fc2.weight": 5})
    algorithm = fiarse(server(), **THREE)
    whole, half, quarter, again = tasks_of(algorithm, weights)
    assert [t.hparams["density"] for t in (whole, half, quarter, again)] == [1.0, 0.5, 0.25, 1.0]
    assert whole.sub_model.masks == {} and same(dict(whole.params), weights)
    for task, share in ((half, 2), (quarter, 4)):
        assert task.sub_model.masks.keys() == set(SPEC.prunable)
        for name, mask in task.sub_model.masks.items():
            last = np.arange(SIZES[name]) >= SIZES[name] - SIZES[name] // share
            assert np.array_equal(mask.ravel(), last), name
            assert np.array_equal(task.params[name], np.where(mask, weights[name], 0))
        assert np.array_equal(task.params["fc1.bias"], weights["fc1.bias"]), "held by all"


def test_the_largest_weights_of_the_whole_model_by_hand():
    """420 and 210 of 840: all 72 of fc2 and conv, and the last 348 and 138 of fc1."""
    weights = rising({"fc2.weight": 2000, "fc1.weight": 300, "conv.weight": 1500})
    algorithm = fiarse(server(), **THREE, selection="model")
    _, half, quarter, _ = tasks_of(algorithm, weights)
    for task, count in ((half, 420), (quarter, 210)):
        masks = task.sub_model.masks
        assert num_kept(masks) == count
        assert masks["fc2.weight"].all() and masks["conv.weight"].all()
        last = np.arange(768) >= 768 - (count - 72)
        assert np.array_equal(masks["fc1.weight"].ravel(), last)


@pytest.mark.parametrize("selection", ["layer", "model"])
def test_smaller_sub_models_lie_within_larger_ones(selection):
    algorithm = fiarse(server(), **THREE, selection=selection)
    _, half, quarter, _ = tasks_of(algorithm, params())
    for name, mask in quarter.sub_model.masks.items():
        assert not (mask & ~half.sub_model.masks[name]).any()
        assert 0 < mask.sum() < half.sub_model.masks[name].sum() or selection == "model"


def test_masks_follow_the_magnitudes():
    """The smallest weight of fc2 becomes the largest: it comes in, and the smallest kept goes."""
    weights = rising({"fc2.weight": 1})
    algorithm = fiarse(server(), assign="fixed", densities="0.25", selection="layer")
    before = tasks_of(algorithm, weights)[0].sub_model.masks["fc2.weight"].ravel()
    assert np.flatnonzero(before).tolist() == list(range(27, 36))
    grown = {**weights, "fc2.weight": weights["fc2.weight"].copy()}
    grown["fc2.weight"].flat[0] = -99.0
    after = tasks_of(algorithm, grown)[0].sub_model.masks["fc2.weight"].ravel()
    assert np.flatnonzero(after).tolist() == [0, *range(28, 36)]


def test_the_merge_is_the_mean_over_those_who_hold_a_weight():
    """fc2, of which clients 0 and 2 hold the last 18, client 1 the last 9; 25, 75 and 25 examples.

    The last 9: (25·a + 75·b + 25·c) / 125 = a/5 + 3b/5 + c/5.  The 9 before: (a + c) / 2.
    The first 18 are nobody's.
    """
    weights = rising({"fc2.weight": 1})
    algorithm = fiarse(server(), assign="fixed", densities="0.5 0.25", biased="never")
    state = state_of(algorithm, weights)
    updates = []
    for task, examples, sent in zip(
        algorithm.configure(state, devices()[:3]), (25, 75, 25), (10.0, 20.0, 50.0), strict=True
    ):
        own = {name: np.asarray(value) for name, value in task.params.items()}
        masks = task.sub_model.masks
        own["fc2.weight"] = np.where(masks["fc2.weight"], np.float32(sent), np.float32(0))
        own["fc2.bias"] = np.full(3, sent, np.float32)
        updates.append(
            ClientUpdate(task.client, examples, pack(own, masks), task.sub_model, task=task)
        )
    after = algorithm.server_update(state, updates)
    merged = after.params["fc2.weight"].ravel()
    assert merged[:18].tobytes() == weights["fc2.weight"].ravel()[:18].tobytes()
    assert merged[18:27].tolist() == [30.0] * 9
    assert merged[27:].tolist() == [24.0] * 9
    assert after.params["fc2.bias"].tolist() == [24.0] * 3
    assert (after.round, after.density) == (1, 0.5)


def test_eq_3_for_a_round_by_hand():
    """fc2 at 1/4 of 1..36: θ = 28.  Every kept weight is answered 1 larger than it was sent.

    +28: 1 + 2·28·28/56² = 1.5 further.  +36: 1 + 2·36·28/64² = 1.4921875 further.
    Biases have no threshold.
    """
    weights = rising({"fc2.weight": 1})
    algorithm = fiarse(server(), assign="fixed", densities="0.25", biased="round")
    state = state_of(algorithm, weights)
    (task,) = algorithm.configure(state, devices()[:1])
    moved = {name: value + np.float32(1) for name, value in task.params.items()}
    answer = pack(apply_mask(moved, task.sub_model.masks), task.sub_model.masks)
    update = ClientUpdate(0, 25, answer, task.sub_model, task=task)
    after = algorithm.server_update(state, [update]).params
    merged, before = after["fc2.weight"].ravel(), weights["fc2.weight"].ravel()
    assert merged[27] - before[27] == 1.5 and before[27] == 28
    assert merged[35] - before[35] == 1.4921875 and before[35] == 36
    assert merged[26] == before[26] == -27
    np.testing.assert_allclose(after["fc2.bias"], weights["fc2.bias"] + 1, rtol=1e-6)
    assert np.array_equal(answer["fc2.weight"], pack(moved, task.sub_model.masks)["fc2.weight"])


@pytest.mark.parametrize("selection", ["layer", "model"])
def test_eq_3_at_every_step_against_a_loop(selection):
    """x <- x - η·∇F(x ⊙ M(x)) ⊙ M(x) ⊙ (1 + 2|x|θ/(|x| + θ)²), in float64, new sessions each step.

    At this rate some weights fall below the threshold: they count as 0 and stay where they are.
    """
    algorithm = fiarse(
        server(), lr=0.5, local_steps=4, batch_size=8, assign="fixed", densities="0.4",
        biased="step", selection=selection,
    )  # fmt: skip
    (task,) = algorithm.configure(algorithm.init(first_model()), devices()[:1])
    masks = task.sub_model.masks
    x = {name: value.astype(np.float64) for name, value in task.params.items()}
    theta = {name: abs(task.params[name][mask]).min() for name, mask in masks.items()}
    if selection == "model":
        theta = dict.fromkeys(theta, min(theta.values()))
    for inputs, labels in client_data()[0].draw(steps=4, batch_size=8, seed=task.seed):
        held = {n: masks[n] & (abs(x[n]) >= theta[n]) for n in masks}
        at = {n: (v * held.get(n, True)).astype(np.float32) for n, v in x.items()}
        session = ENGINE.open(SPEC, at, SubModel(), batch_size=8, optimizer=SGD(0.0))
        _, entering = loss_and_gradient(session.forward(inputs, training=True)["fc2"], labels, "ce")
        for name, g in session.backward({"fc2": entering}, dense=True).items():
            if name in masks:
                size = abs(x[name])
                g = g * held[name] * (1 + 2 * size * theta[name] / (size + theta[name]) ** 2)
            x[name] = x[name] - 0.5 * g
    update, _ = client_update(task, client_data()[0], ENGINE, {})
    fallen = 0
    for name, value in pack(x, masks).items():
        np.testing.assert_allclose(update.params[name], value, rtol=1e-4, atol=2e-6)
        if name in masks:
            ended = update.params[name]
            fallen += int((abs(ended) < np.float32(theta[name])).sum())
    assert 3 < fallen < num_kept(masks) // 2


def test_all_devices_that_hold_the_whole_are_fedavg():
    """With other densities in the settings, which nobody gets, and however eq. (3) comes."""
    plain = run(fedavg(server(), **SGD_SETTINGS))
    for biased in ("step", "round", "never"):
        unlimited = run(fiarse(server(), **SGD_SETTINGS, biased=biased))
        assert same(dict(unlimited.params), dict(plain.params))
    algorithm = fiarse(server(), **SGD_SETTINGS)
    needs = peak_memory_bytes(SPEC, [Work(2, 8)])
    dispatch = LocalDispatch(
        algorithm.client_update, ENGINE, client_data(), lambda step: having(*[needs] * CLIENTS)
    )
    assert same(dict(run(algorithm, dispatch=dispatch).params), dict(plain.params))


WIDE = lenet300((1, 8, 8), 10)  # whose memory is that of its weights
ON_WIDE = replace(server(), spec=WIDE)


def of_wide(algorithm, *memory_bytes: int | None):
    state = algorithm.init(Model(WIDE, init_params(WIDE, 0)))
    return algorithm.configure(state, having(*memory_bytes))


@pytest.mark.parametrize("biased", ["round", "step"])
@pytest.mark.parametrize("selection", ["layer", "model"])
def test_memory_decides_to_the_byte(selection, biased):
    """A device gets the level whose round it can hold, and the next one with a byte less."""
    settings = {**SGD_SETTINGS, "selection": selection, "biased": biased, "densities": "1 0.25 0.1"}
    algorithm = fiarse(ON_WIDE, **settings)
    by_level = of_wide(fiarse(ON_WIDE, **settings, assign="fixed"), None, None, None)
    needs = [peak_memory_bytes(WIDE, work(task)) for task in by_level]
    assert needs == sorted(needs, reverse=True)
    memory = (needs[0], needs[0] - 1, needs[1], needs[1] - 1, needs[2], 0, None)
    tasks = of_wide(algorithm, *memory)
    assert [task.hparams["density"] for task in tasks] == [1, 0.25, 0.25, 0.1, 0.1, 0.1, 1]
    assert same(tasks[1].sub_model.masks, by_level[1].sub_model.masks)
    copies = [work(task)[0].held_floats for task in by_level]
    values = [num_kept(task.sub_model.masks) for task in by_level]
    unpruned = sum(prod(WIDE.param_shapes[n]) for n in WIDE.param_shapes if n not in WIDE.prunable)
    expected = [0, *(2 * kept + unpruned for kept in values[1:])] if biased == "step" else [0] * 3
    assert copies == expected


def test_levels_that_need_more_than_the_whole_are_given_to_nobody():
    """Nine of ten weights with their masks take more than all of them without."""
    algorithm = fiarse(ON_WIDE, **SGD_SETTINGS, densities="1 0.9 0.1")
    by_level = of_wide(
        fiarse(ON_WIDE, **SGD_SETTINGS, densities="1 0.9 0.1", assign="fixed"), None, None, None
    )
    whole, most, least = (peak_memory_bytes(WIDE, work(task)) for task in by_level)
    assert most > whole > least
    tasks = of_wide(algorithm, most, whole, whole - 1, least)
    assert [task.hparams["density"] for task in tasks] == [1, 1, 0.1, 0.1]


def densities_of(tasks) -> Sequence[object]:
    return [task.hparams["density"] for task in tasks]


def test_fixed_and_drawn_levels():
    fixed = fiarse(server(), **THREE)
    for round in (0, 1):
        state = replace(fixed.init(first_model()), round=round)
        assert densities_of(fixed.configure(state, having(0, None, 0, None))) == [1, 0.5, 0.25, 1]
    drawn = fiarse(server(300), assign="drawn", densities="1 0.5 0.25")
    seen = []
    for round in range(40):
        state = replace(drawn.init(first_model()), round=round)
        seen.append(densities_of(drawn.configure(state, devices())))
        assert densities_of(drawn.configure(state, devices()[2:])) == seen[-1][2:]
    assert {each for levels in seen for each in levels} == {1, 0.5, 0.25}


@pytest.mark.parametrize("biased", ["round", "step"])
def test_nobody_is_above_its_budget_though_that_is_redrawn(biased):
    """Memory between the smallest level's need and the whole's, anew in each round."""
    settings = {**SGD_SETTINGS, "biased": biased, "densities": "1 0.5 0.25 0.1"}
    algorithm = fiarse(server(), **settings, selection="model")
    everybody = algorithm.configure(algorithm.init(first_model()), having(*[0] * CLIENTS))
    least = max(peak_memory_bytes(SPEC, work(task)) for task in everybody)
    rng = np.random.default_rng(3)
    memory = rng.integers(least, 2 * least, (20, CLIENTS))
    dispatch = LocalDispatch(
        algorithm.client_update,
        ENGINE,
        client_data(),
        lambda step: having(*map(int, memory[step])),
    )
    records = []
    run(algorithm, dispatch=dispatch, watch=lambda progress, record: records.append(record))
    for record in records:
        assert not record.left_out and not record.refused and len(record.answered) == CLIENTS
        assert 0 < record.cost.memory_utilisation <= 1
    assert len({each for record in records for each in densities_of(record.tasks)}) > 1


def test_who_can_hold_nothing_is_left_out_by_name():
    algorithm = fiarse(server(), **SGD_SETTINGS, densities="0.5 0.25")
    small = algorithm.configure(algorithm.init(first_model()), having(0))[0]
    needs = peak_memory_bytes(SPEC, work(small))
    memory = having(None, needs, needs - 1, None)
    dispatch = LocalDispatch(algorithm.client_update, ENGINE, client_data(), lambda step: memory)
    records = []
    run(algorithm, dispatch=dispatch, watch=lambda progress, record: records.append(record))
    for record in records:
        assert record.answered == [0, 1, 3]
        assert record.left_out == {2: f"needs {megabytes(needs)}, has {megabytes(needs - 1)}"}


def test_what_is_evaluated_is_the_largest_sub_model_that_was_trained():
    algorithm = fiarse(server(), **SGD_SETTINGS, **THREE)
    assert algorithm.model is not None
    state = algorithm.init(first_model())
    assert algorithm.model(state).masks == {}, "before anybody has trained, the first density"
    half = algorithm.server_update(state, answered(algorithm, state, devices()[1:3]))
    model = algorithm.model(half)
    assert half.density == 0.5 and num_kept(model.masks) == 18 + 384 + 18
    assert not same(half.params, model.params), "the state has all weights"
    for name, mask in model.masks.items():
        assert np.array_equal(model.params[name], np.where(mask, half.params[name], 0))
    quarter = algorithm.server_update(half, answered(algorithm, half, devices()[2:3]))
    assert quarter.density == 0.5, "the largest of all rounds"
    whole = algorithm.server_update(quarter, answered(algorithm, quarter))
    assert whole.density == 1 and same(algorithm.model(whole).params, whole.params)
    nobody = algorithm.server_update(whole, [])
    assert (nobody.round, nobody.density) == (4, 1) and same(nobody.params, whole.params)


def test_a_model_with_masks_is_refused():
    masks = {"fc1.weight": np.ones((12, 64), bool)}
    with pytest.raises(ValueError, match="has masks"):
        fiarse(server()).init(Model(SPEC, params(), masks))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"assign": "best"}, "assign must be one of memory, fixed, drawn"),
        ({"selection": "stage"}, "selection must be one of layer, model"),
        ({"biased": "always"}, "biased must be one of step, round, never"),
        ({"densities": "0.25 1"}, r"densities must be numbers in \(0, 1\]"),
        ({"densities": ""}, r"densities must be numbers in \(0, 1\]"),
        ({"densities": "1 0.0001"}, "density 0.0001 keeps none of the model's 840 prunable"),
        ({"lr": -1.0}, "lr"),
        ({"cohort": 0}, "cohort"),
    ],
)
def test_what_cannot_be_is_refused_by_name(setting, said):
    with pytest.raises(ValueError, match=said):
        fiarse(server(), **setting)
