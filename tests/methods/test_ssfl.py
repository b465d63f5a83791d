"""SSFL: the saliency by torch, its weighted sum by hand, and one mask for all before training."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conformance import Case
from federation import (
    CLIENTS,
    ENGINE,
    ROUNDS,
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
from fedlean.core import ClientUpdate, Model, Statistic, SubModel
from fedlean.cost.way import peak_memory_bytes
from fedlean.methods.ssfl import client_update, ssfl, work
from fedlean.runtime.local import LocalDispatch
from fedlean.tree import num_kept

SMALL = {"lr": 0.05, "local_steps": 2, "batch_size": 8}
CASE = Case(
    method=ssfl,
    settings={**SMALL, "density": 0.3, "score_batches": 2},
    knob={"score_batches": 1},
    neutral={**SMALL, "density": 1.0},
    fedavg=SMALL,
)
MORE_CASES = {
    "pieces": replace(
        CASE,
        settings={**SMALL, "importance_budget_bytes": 600},
        knob={"density": 0.3},
        neutral="it is CASE's: nothing is scored",
    )
}
FEW = 4.5 / 840  # keeps 4 of the 840 prunable weights


def filled(value):
    return {name: np.full(shape, value, np.float32) for name, shape in SPEC.param_shapes.items()}


def sent(client, examples, saliency):
    """An answer to a scoring task."""
    tensors = {name: saliency[name] for name in SPEC.prunable}
    return ClientUpdate(client, examples, {}, SubModel(), {"saliency": Statistic(tensors, "mean")})


def kept_places(masks):
    return {(name, *map(int, at)) for name, mask in masks.items() for at in np.argwhere(mask)}


def test_the_weighted_sum_and_the_largest_of_the_model_by_hand():
    """Σ p_n s_n with p = (1/4, 3/4), whatever the layer.

    fc1 [0,0]: (1·4 + 3·4)/4 = 4      fc1 [0,1]: (1·8 + 3·0)/4 = 2
    fc2 [1,2]: (1·3 + 3·5)/4 = 4.5    conv [0,0,0,0]: (1·0 + 3·4)/4 = 3
    fc2 [0,0]: (1·7 + 3·0)/4 = 1.75   all others: 0.5; unweighted, fc2 [0,0] would beat conv's
    """
    first, second = filled(0.5), filled(0.5)
    for name, at, s1, s2 in [
        ("fc1.weight", (0, 0), 4, 4),
        ("fc1.weight", (0, 1), 8, 0),
        ("fc2.weight", (1, 2), 3, 5),
        ("conv.weight", (0, 0, 0, 0), 0, 4),
        ("fc2.weight", (0, 0), 7, 0),
    ]:
        first[name][at], second[name][at] = s1, s2
    algorithm, weights = ssfl(server(), density=FEW), filled(2.0)
    state = algorithm.init(Model(SPEC, weights))
    after = algorithm.server_update(state, [sent(0, 25, first), sent(1, 75, second)])
    expected = {("fc1.weight", 0, 0), ("fc1.weight", 0, 1), ("fc2.weight", 1, 2)}
    assert kept_places(after.masks) == expected | {("conv.weight", 0, 0, 0, 0)}
    assert (after.phase, after.round) == ("train", 0)
    assert after.params["fc1.weight"].sum() == 4.0 and after.params["fc1.weight"][0, 1] == 2.0
    assert after.params["fc1.bias"].tolist() == [2.0] * 12, "biases are never pruned"


def torch_saliency(x, y):
    """|∂L/∂w ⊙ w| of one batch by torch's autograd, on SPEC written out."""
    w = {name: torch.tensor(value, requires_grad=True) for name, value in params().items()}
    hidden = F.conv2d(torch.tensor(x), w["conv.weight"], w["conv.bias"], padding=1)
    hidden = F.max_pool2d(F.relu(hidden), 2).flatten(1)
    hidden = F.relu(F.linear(hidden, w["fc1.weight"], w["fc1.bias"]))
    logits = F.linear(hidden, w["fc2.weight"], w["fc2.bias"])
    prunable = [w[name] for name in SPEC.prunable]
    gradients = torch.autograd.grad(F.cross_entropy(logits, torch.tensor(y)), prunable)
    products = [(g * p).abs().detach().numpy() for g, p in zip(gradients, prunable, strict=True)]
    return dict(zip(SPEC.prunable, products, strict=True))


@pytest.mark.parametrize("budget_bytes", [0, 10**6, 600])
@pytest.mark.parametrize("score_batches", [1, 3])
def test_a_client_sends_the_mean_of_the_absolute_saliency_of_its_batches(
    score_batches, budget_bytes
):
    """At once, or in pieces of 150 floats: fc1 has rows of 64."""
    settings = {"score_batches": score_batches, "importance_budget_bytes": budget_bytes}
    algorithm = ssfl(server(), batch_size=8, **settings)
    task = algorithm.configure(algorithm.init(first_model()), devices())[2]
    update, held = client_update(task, client_data()[2], ENGINE, {})
    drawn = client_data()[2].draw(steps=score_batches, batch_size=8, seed=task.seed)
    each = [torch_saliency(x, y) for x, y in drawn]
    for name, values in update.statistics["saliency"].tensors.items():
        expected = np.mean([one[name] for one in each], axis=0)
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-7)
        assert values.dtype == np.float32 and values.min() >= 0
    assert held == {} and update.params == {} and update.num_examples == 50


def test_every_client_scores_once_then_one_mask_for_good():
    """Whatever the cohort: all four send 840 floats; afterwards two a round send 420."""
    records = []
    algorithm = ssfl(server(), **SMALL, cohort=2)
    state = run(algorithm, watch=lambda progress, record: records.append(record))
    score, *rounds = records
    assert score.tasks[0].phase == "score" and score.tasks[0].round == 0
    assert [task.client for task in score.tasks] == list(range(CLIENTS))
    assert same(score.tasks[0].params, params()), "the common initial weights"
    assert not score.tasks[0].sub_model.masks
    assert len(rounds) == state.round == ROUNDS and num_kept(state.masks) == 420
    assert all(same(task.sub_model.masks, state.masks) for r in rounds for task in r.tasks)
    overhead = score.cost.uplink_bytes / CLIENTS - 4 * 840
    assert -4 * 840 < overhead < 500, "a float for each prunable weight (0 is left out)"
    values = 4 * (420 + 19)  # kept weights and biases; headers and metrics are a few bytes
    for record in rounds:
        assert len(record.tasks) == 2 and values < record.cost.uplink_bytes / 2 < values + 300


@pytest.mark.parametrize(("budget_bytes", "parts"), [(0, 1), (600, 7)])
def test_the_scoring_is_charged_as_forward_backward_and_the_whole_gradient(budget_bytes, parts):
    """In pieces once for each: conv and a row of fc1, five times two of its rows, the rest."""
    algorithm = ssfl(server(), **SMALL, score_batches=3, importance_budget_bytes=budget_bytes)
    task = algorithm.configure(algorithm.init(first_model()), devices())[1]
    (one,) = work(task)
    assert (one.steps, one.importance_steps, one.batch_size) == (3 * parts, 3 * parts, 8)
    assert one.kept == {} and one.optimizer_floats == 0
    update, _ = client_update(task, client_data()[1], ENGINE, {})
    assert update.work == (one,)


def test_pieces_take_less_memory_and_find_the_same():
    needs, masks = [], []
    for budget_bytes in (0, 600):
        algorithm = ssfl(server(), **SMALL, importance_budget_bytes=budget_bytes)
        task = algorithm.configure(algorithm.init(first_model()), devices())[0]
        needs.append(peak_memory_bytes(SPEC, work(task)))
        masks.append(run(algorithm).masks)
    assert needs[0] - needs[1] == 4 * 859 - 4 * 128  # all parameters, and two rows of fc1
    assert same(*masks)


def test_who_cannot_hold_the_gradient_trains_all_the_same():
    """Device 3 is too small for the scoring, and large enough for the sub-network."""
    algorithm = ssfl(server(), **SMALL, density=0.2)
    scoring = algorithm.configure(algorithm.init(first_model()), devices())[3]
    needs = peak_memory_bytes(SPEC, work(scoring))
    memory = [Device(client, memory_bytes=needs - (client == 3)) for client in range(CLIENTS)]
    dispatch = LocalDispatch(algorithm.client_update, ENGINE, client_data(), lambda step: memory)
    records = []
    run(algorithm, dispatch=dispatch, watch=lambda progress, record: records.append(record))
    score, *rounds = records
    assert score.answered == [0, 1, 2] and set(score.left_out) == {3}
    assert all(record.answered == [0, 1, 2, 3] and not record.left_out for record in rounds)


def test_without_an_answer_it_is_asked_again():
    algorithm = ssfl(server(), **SMALL)
    state = algorithm.init(first_model())
    assert algorithm.server_update(state, []) is state and not algorithm.done(state)


def test_density_1_scores_nothing():
    state = ssfl(server(), density=1.0).init(first_model())
    assert (state.phase, state.masks) == ("train", {})


def test_the_data_decides_what_stays():
    """Other seeds draw other batches."""
    masks = [run(ssfl(replace(server(), seed=seed), **SMALL)).masks for seed in (1, 1, 2)]
    assert same(masks[0], masks[1]) and not same(masks[0], masks[2])


@pytest.mark.parametrize(
    "setting",
    [
        {"density": 0.0},
        {"density": 1.5},
        {"density": 1e-4},
        {"score_batches": 0},
        {"importance_budget_bytes": -1},
        {"lr": -1.0},
        {"cohort": 0},
        {"loss": "mse"},
    ],
)
def test_bad_hyperparameters_are_named(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=name):
        ssfl(server(), **setting)


def test_a_budget_that_holds_no_row_is_refused():
    with pytest.raises(ValueError, match=r"a budget of 100 bytes .* one row of 'fc1.weight'"):
        ssfl(server(), importance_budget_bytes=100)
