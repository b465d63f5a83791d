"""SNIP: eq. (4)-(6) by hand and numerically, the federated score, and what it costs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conformance import Case
from federation import (
    ENGINE,
    ROUNDS,
    SPEC,
    client_data,
    dataset,
    devices,
    first_model,
    fresh_dispatch,
    params,
    run,
    same,
    server,
)

from fedlean.core import ClientUpdate, Model, Statistic, SubModel
from fedlean.data.batches import ClientData
from fedlean.engine.protocol import SGD
from fedlean.methods.snip import client_update, snip
from fedlean.pruning.units import dead_units
from fedlean.runtime.record import StepRecord
from fedlean.runtime.rounds import LoopState
from fedlean.train.loss_gradient import loss_and_gradient
from fedlean.tree import num_kept

SMALL = {"lr": 0.05, "local_steps": 2, "batch_size": 8, "snip_batches": 3}
CASE = Case(
    method=snip,
    settings=SMALL,
    knob={"density": 0.4},
    neutral={"lr": 0.05, "local_steps": 2, "batch_size": 8, "density": 1.0},
    fedavg={"lr": 0.05, "local_steps": 2, "batch_size": 8},
)
FEW = 4.5 / 840  # keeps 4 of the 840 prunable weights


def filled(value):
    return {name: np.full(shape, value, np.float32) for name, shape in SPEC.param_shapes.items()}


def scoring(algorithm, weights):
    """A state after the dense round."""
    return replace(algorithm.init(Model(SPEC, weights)), phase="score", round=1)


def sent(client, examples, gradient):
    """An answer to a scoring task."""
    tensors = {name: gradient[name] for name in SPEC.prunable}
    return ClientUpdate(client, examples, {}, SubModel(), {"gradient": Statistic(tensors, "mean")})


def kept_places(masks):
    return {(name, *map(int, at)) for name, mask in masks.items() for at in np.argwhere(mask)}


def test_equations_5_and_6_by_hand():
    """|Σ p_n g_n · w| with p = (1/4, 3/4): signs cancel among clients before the absolute value.

    fc1 [0,0]: |(1·4 + 3·4)/4 · 1| = 4      fc1 [0,1]: |(-1·8 + 3·0)/4 · 3| = 6
    fc2 [1,2]: |(3 - 3·5)/4 · -2| = 6       conv [0,0,0,0]: |(6·9 - 3·18)/4 · 50| = 0
    fc2 [0,0]: |(1·1 + 3·1)/4 · 2.5| = 2.5  all others: 0.5 · 1 = 0.5
    """
    weights, first, second = filled(1.0), filled(0.5), filled(0.5)
    for name, at, w, g1, g2 in [
        ("fc1.weight", (0, 0), 1, 4, 4),
        ("fc1.weight", (0, 1), 3, -8, 0),
        ("fc2.weight", (1, 2), -2, 3, -5),
        ("conv.weight", (0, 0, 0, 0), 50, 54, -18),
        ("fc2.weight", (0, 0), 2.5, 1, 1),
    ]:
        weights[name][at], first[name][at], second[name][at] = w, g1, g2
    algorithm = snip(server(), density=FEW)
    answers = [sent(0, 25, first), sent(1, 75, second)]
    after = algorithm.server_update(scoring(algorithm, weights), answers)
    expected = {("fc1.weight", 0, 0), ("fc1.weight", 0, 1), ("fc2.weight", 1, 2)}
    assert kept_places(after.masks) == expected | {("fc2.weight", 0, 0)}
    assert (after.phase, after.round) == ("train", 1)
    assert after.params["fc2.weight"][1, 2] == -2 and after.params["fc2.weight"].sum() == 0.5
    assert after.params["fc1.bias"].tolist() == [1.0] * 12, "biases are never pruned"


def test_equation_4_is_the_derivative_by_the_gate():
    """(L((1 + ε)·w_j) - L((1 - ε)·w_j)) / 2ε = g_j·w_j for the weights that matter most."""
    algorithm = snip(server(), batch_size=160, snip_batches=1)
    task = algorithm.configure(scoring(algorithm, params()), devices())[0]
    everything = ClientData(dataset(), np.arange(160))
    update, _ = client_update(task, everything, ENGINE, {})
    gradient = update.statistics["gradient"].tensors
    ((x, y),) = everything.draw(steps=1, batch_size=160, seed=task.seed)

    def loss_at(name, at, factor):
        weights = {key: value.copy() for key, value in params().items()}
        weights[name][at] *= factor
        session = ENGINE.open(SPEC, weights, SubModel(), batch_size=160, optimizer=SGD(0.0))
        logits = session.forward(x)["fc2"]
        return loss_and_gradient(logits, y, "ce")[0]

    for name in SPEC.prunable:
        scores = gradient[name] * params()[name]
        at = np.unravel_index(np.abs(scores).argmax(), scores.shape)
        numeric = (loss_at(name, at, 1.01) - loss_at(name, at, 0.99)) / 0.02
        assert numeric == pytest.approx(scores[at], rel=0.02), name


def torch_scores(x, y):
    """|g ⊙ w| of one batch by torch's autograd, on SPEC written out."""
    w = {name: torch.tensor(value, requires_grad=True) for name, value in params().items()}
    hidden = F.conv2d(torch.tensor(x), w["conv.weight"], w["conv.bias"], padding=1)
    hidden = F.max_pool2d(F.relu(hidden), 2).flatten(1)
    hidden = F.relu(F.linear(hidden, w["fc1.weight"], w["fc1.bias"]))
    logits = F.linear(hidden, w["fc2.weight"], w["fc2.bias"])
    prunable = [w[name] for name in SPEC.prunable]
    gradients = torch.autograd.grad(F.cross_entropy(logits, torch.tensor(y)), prunable)
    products = [(g * p).abs().detach().numpy() for g, p in zip(gradients, prunable, strict=True)]
    return dict(zip(SPEC.prunable, products, strict=True))


def test_the_federated_score_is_that_of_the_pooled_data_by_torch():
    """Clients with 20, 40 and 60 examples, every example as often as the client's others."""
    whole = dataset()
    shares = np.split(np.arange(120), [20, 60])
    algorithm = snip(server(), batch_size=20, snip_batches=6, density=0.3)
    state = scoring(algorithm, params())
    answers = []
    for task, share in zip(algorithm.configure(state, devices()[:3]), shares, strict=True):
        answers.append(client_update(task, ClientData(whole, share), ENGINE, {})[0])
    assert [answer.num_examples for answer in answers] == [20, 40, 60]
    masks = algorithm.server_update(state, answers).masks

    x, y = whole.normalise(whole.x_train[:120]), whole.y_train[:120]
    scores = torch_scores(x, y)
    cut = np.sort(np.concatenate([values.ravel() for values in scores.values()]))[-252]
    assert num_kept(masks) == 252  # floor(0.3 · 840)
    for name, values in scores.items():
        clear = np.abs(values - cut) > 1e-5 * cut  # not within a rounding of the threshold
        assert np.array_equal(masks[name][clear], (values > cut)[clear]), name


def test_update_score_by_hand():
    """|(w_0 - w_1) ⊙ w_0|, w_1 = Σ p_n w_n; the mask is put on w_1.

    fc1 [0,0]: |(2 - (1·0 + 3·4)/4) · 2| = 2   fc1 [0,1]: |(3 - (1·1 + 3·5)/4) · 3| = 3
    fc2 [0,0]: |(-1 - (1·7 + 3·-1)/4) · -1| = 2   conv [0,0,0,0]: |(9 - (1·6 + 3·10)/4) · 9| = 0
    fc2 [2,1]: |(0.5 - (1·12 + 3·4)/4) · 0.5| = 2.75   all others: 0
    """
    weights, first, second = filled(1.0), filled(1.0), filled(1.0)
    for name, at, w, w1, w2 in [
        ("fc1.weight", (0, 0), 2, 0, 4),
        ("fc1.weight", (0, 1), 3, 1, 5),
        ("fc2.weight", (0, 0), -1, 7, -1),
        ("conv.weight", (0, 0, 0, 0), 9, 6, 10),
        ("fc2.weight", (2, 1), 0.5, 12, 4),
    ]:
        weights[name][at], first[name][at], second[name][at] = w, w1, w2
    algorithm = snip(server(), density=FEW, score="update")
    answers = [ClientUpdate(0, 25, first, SubModel()), ClientUpdate(1, 75, second, SubModel())]
    after = algorithm.server_update(algorithm.init(Model(SPEC, weights)), answers)
    assert (after.phase, after.round) == ("train", 1)
    expected = {("fc1.weight", 0, 0), ("fc1.weight", 0, 1)}
    assert kept_places(after.masks) == expected | {("fc2.weight", 0, 0), ("fc2.weight", 2, 1)}
    assert after.params["fc1.weight"][0, :3].tolist() == [3.0, 4.0, 0.0]
    assert after.params["fc2.weight"][2, 1] == 6.0


def test_update_score_of_one_step_is_the_gradient_score_of_its_batches():
    """w_0 - w_1 = η Σ p_n g_n, at the initial weights: PruneFL's form is SNIP's there."""
    settings = {"lr": 0.25, "local_steps": 1, "batch_size": 16, "density": 0.25}
    moved = snip(server(), **settings, score="update")
    state = moved.init(first_model())
    tasks = moved.configure(state, devices())
    answers = [client_update(t, client_data()[t.client], ENGINE, {})[0] for t in tasks]
    by_update = moved.server_update(state, answers).masks

    scored = snip(server(), **settings, snip_batches=1)
    (example,) = scored.configure(scoring(scored, params()), devices()[:1])
    asked = [replace(example, client=task.client, seed=task.seed) for task in tasks]
    answers = [client_update(t, client_data()[t.client], ENGINE, {})[0] for t in asked]
    by_gradient = scored.server_update(scoring(scored, params()), answers).masks
    assert num_kept(by_update) == num_kept(by_gradient) == 210
    differ = sum(int((by_update[name] != by_gradient[name]).sum()) for name in by_update)
    assert differ <= 2, "w_0 - w_1 is rounded in float32: at most one swap at the threshold"


def test_one_dense_round_one_scoring_then_values_only():
    """Phases, cohorts and sizes: the gradient goes up once, whole; 168 weights stay, for good."""
    records: list[tuple[StepRecord, LoopState]] = []
    algorithm = snip(server(), **SMALL, cohort=2)
    state = run(algorithm, watch=lambda progress, record: records.append((record, progress)))
    dense, score, *rest = (record for record, _ in records)
    phases = [record.tasks[0].phase for record, _ in records]
    assert phases == ["train", "score"] + ["train"] * (ROUNDS - 1)
    assert [progress.state.round for _, progress in records] == [1, *range(1, ROUNDS + 1)]
    assert [t.client for t in score.tasks] == [t.client for t in dense.tasks], "the same cohort"
    assert not dense.tasks[0].sub_model.masks and not score.tasks[0].sub_model.masks
    assert same(score.tasks[0].params, records[0][1].state.params), "at the merged model"
    assert num_kept(state.masks) == 168
    assert all(same(task.sub_model.masks, state.masks) for r in rest for task in r.tasks)
    overhead = score.cost.uplink_bytes / 2 - 4 * 840
    assert -4 * 840 < overhead < 500, "prunable coordinates (0 is left out), and a header"
    values = 4 * (168 + 19)  # kept weights and biases; headers and metrics are a few bytes
    for record in rest:
        assert values < record.cost.uplink_bytes / 2 < values + 300
    assert score.cost.flops == dense.cost.flops * 3 / 2, "three batches for two local steps"


def test_what_scoring_is_charged_for():
    algorithm = snip(server(), **SMALL)
    task = algorithm.configure(scoring(algorithm, params()), devices())[2]
    update, held = client_update(task, client_data()[2], ENGINE, {})
    (work,) = update.work
    assert (work.steps, work.importance_steps, work.batch_size, work.kept) == (3, 3, 8, {})
    assert held == {} and update.params == {}
    assert set(update.statistics["gradient"].tensors) == set(SPEC.prunable)


def test_a_round_that_nobody_answered_prunes_nothing():
    """Neither form scores without an answer; the next round is the dense one then."""
    for score in ("gradient", "update"):
        algorithm = snip(server(), **SMALL, score=score)
        empty = algorithm.server_update(algorithm.init(first_model()), [])
        assert (empty.phase, empty.round, empty.masks) == ("dense", 1, {})
    state = scoring(snip(server(), **SMALL), params())
    assert snip(server(), **SMALL).server_update(state, []) is state


def test_a_run_of_one_round_is_pruned_all_the_same():
    for score in ("gradient", "update"):
        algorithm = snip(server(1), **SMALL, score=score)
        state = run(algorithm, dispatch=fresh_dispatch(algorithm), rounds=1)
        assert state.round == 1 and num_kept(state.masks) == 168


def test_units_and_layers_may_die():
    """As published: all 4 weights that stay are of fc2, and nothing is repaired."""
    weights, gradient = filled(1.0), filled(1.0)
    gradient["fc2.weight"][1, :4] = 2.0
    algorithm = snip(server(), density=FEW)
    after = algorithm.server_update(scoring(algorithm, weights), [sent(0, 25, gradient)])
    assert dead_units(after.masks)["fc1.weight"] == (12, 64)
    assert dead_units(after.masks)["fc2.weight"] == (2, 8)
    task = algorithm.configure(after, devices())[0]
    update, _ = client_update(task, client_data()[0], ENGINE, {})
    assert not update.params["fc1.weight"].any()


@pytest.mark.parametrize(
    "setting",
    [
        {"density": 0.0},
        {"density": 1.01},
        {"density": 1e-4},
        {"score": "hessian"},
        {"snip_batches": 0},
        {"lr": 0.0},
        {"cohort": 0},
        {"momentum": 1.0},
    ],
)
def test_bad_hyperparameters_are_named(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=name):
        snip(server(), **setting)
