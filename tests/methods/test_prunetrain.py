"""PruneTrain: λ, the step and the removal of channels by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from conformance import Case
from federation import ENGINE, SPEC, client_data, devices, first_model, params, run, same, server

from fedlean.core import ClientUpdate, Statistic, SubModel
from fedlean.engine.protocol import SGD
from fedlean.methods.prunetrain import client_update, prunetrain
from fedlean.pruning.channels import channels
from fedlean.pruning.density import density
from fedlean.pruning.group_lasso import group_axes, penalty, shrunk

SGD_SETTINGS = {"lr": 0.05, "local_steps": 2, "batch_size": 8}
AXES = group_axes(SPEC, channels(SPEC))
CASE = Case(
    method=prunetrain,
    # so strong and so coarse that channels die within 12 steps
    settings={**SGD_SETTINGS, "penalty_ratio": 0.9, "threshold": 0.08, "reconfigure_every": 2},
    knob={"penalty_ratio": 0.8},
    neutral={**SGD_SETTINGS, "penalty_ratio": 0.0},
    fedavg=SGD_SETTINGS,
)


def test_the_first_batch_sets_the_coefficient():
    """λ = 0.2·L / (0.8·R) with L the loss of the first batch and R the penalty sent."""
    algorithm = prunetrain(
        server(), local_steps=2, batch_size=4, penalty_ratio=0.2, reconfigure_every=2
    )
    task = algorithm.configure(algorithm.init(first_model()), devices())[1]
    update, _ = client_update(task, client_data()[1], ENGINE, {})
    ((x, y), _) = client_data()[1].draw(steps=2, batch_size=4, seed=task.seed)
    session = ENGINE.open(SPEC, params(), SubModel(), batch_size=4, optimizer=SGD(0.1))
    expected = 0.2 * session.step(x, y) / (0.8 * penalty(params(), AXES))
    sent = update.statistics["coefficient"].tensors["coefficient"]
    assert sent == pytest.approx([expected], rel=1e-6)


def test_the_coefficient_is_the_weighted_mean_of_round_1_and_stays():
    """(25·0.1 + 75·0.3) / 100 = 0.25."""
    algorithm = prunetrain(server(), reconfigure_every=2)

    def answer(client, examples, value):
        statistic = Statistic({"coefficient": np.array([value])}, "mean")
        return ClientUpdate(
            client, examples, dict(params()), SubModel(), {"coefficient": statistic}
        )

    unanswered = algorithm.server_update(algorithm.init(first_model()), [])
    assert unanswered.coefficient == 0
    state = algorithm.server_update(unanswered, [answer(0, 25, 0.1), answer(1, 75, 0.3)])
    assert state.coefficient == pytest.approx(0.25)
    task = algorithm.configure(state, devices())[0]
    assert task.hparams["coefficient"] == state.coefficient
    update, _ = client_update(task, client_data()[0], ENGINE, {})
    assert not update.statistics, "asked for once"
    later = algorithm.server_update(state, [answer(0, 25, 9.0)])
    assert later.coefficient == state.coefficient


@pytest.mark.parametrize(("momentum", "amounts"), [(0.0, [1, 1, 1]), (0.5, [1, 1.5, 1.75])])
def test_local_steps_by_hand(momentum, amounts):
    """SGD, then groups shorter by lr·λ times what a constant gradient has gathered by then."""
    algorithm = prunetrain(
        server(), reconfigure_every=2, lr=0.1, local_steps=3, batch_size=4, momentum=momentum
    )
    state = replace(algorithm.init(first_model()), coefficient=0.2)
    task = algorithm.configure(state, devices())[2]
    update, held = client_update(task, client_data()[2], ENGINE, {})
    session = ENGINE.open(SPEC, params(), SubModel(), batch_size=4, optimizer=SGD(0.1, momentum))
    drawn = client_data()[2].draw(steps=3, batch_size=4, seed=task.seed)
    for (x, y), amount in zip(drawn, amounts, strict=True):
        session.step(x, y)
        now = session.params()
        session.load({**now, **shrunk(now, AXES, 0.02 * amount)})
    assert held == {} and same(update.params, session.params())


def test_the_penalty_shrinks_groups_and_leaves_the_rest_alone():
    """lr·λ = 0.5, lr -> 0: fc2's columns, all shorter, are 0, and conv's rows 0.5 shorter."""
    algorithm = prunetrain(server(), reconfigure_every=2, lr=1e-9, local_steps=1, batch_size=4)
    state = replace(algorithm.init(first_model()), coefficient=0.5e9)
    task = algorithm.configure(state, devices())[0]
    update, _ = client_update(task, client_data()[0], ENGINE, {})
    norms = np.linalg.norm(params()["fc2.weight"], axis=0)
    assert norms.max() < 0.5 and not update.params["fc2.weight"].any()
    for name in ("conv.bias", "fc1.bias", "fc2.bias"):
        np.testing.assert_allclose(update.params[name], params()[name], atol=1e-7)
    rows = np.linalg.norm(params()["conv.weight"].reshape(4, -1), axis=1)
    left = np.linalg.norm(update.params["conv.weight"].reshape(4, -1), axis=1)
    np.testing.assert_allclose(left, np.maximum(rows - 0.5, 0), atol=1e-6)


def near_dead():
    """Unit 5 of fc1 and map 2 of conv have nothing above 1e-4, unit 6 only on one side."""
    weights = {name: value.copy() for name, value in params().items()}
    weights["fc1.weight"][5] = 9e-5
    weights["fc2.weight"][:, 5] = -9e-5
    weights["conv.weight"][2] = 0.0
    weights["fc1.weight"][:, 32:48] = 5e-5
    weights["fc2.weight"][:, 6] = 0.0
    return weights


def test_dead_channels_are_removed_on_both_sides():
    algorithm = prunetrain(server(), reconfigure_every=2)
    state = replace(algorithm.init(first_model()), round=1, params=near_dead())
    after = algorithm.server_update(state, [])
    assert not after.masks["fc1.weight"][5].any() and not after.masks["fc1.weight"][:, 32:48].any()
    assert not after.masks["fc2.weight"][:, 5].any() and not after.masks["conv.weight"][2].any()
    removed = {name: int((~mask).sum()) for name, mask in after.masks.items()}
    assert removed == {"conv.weight": 9, "fc1.weight": 64 + 12 * 16 - 16, "fc2.weight": 3}
    assert after.masks["fc1.weight"][6, 0], "unit 6 is still made, so it stays"
    for name, mask in after.masks.items():
        assert not after.params[name][~mask].any()
        assert np.array_equal(after.params[name][mask], near_dead()[name][mask])


@pytest.mark.parametrize(("round", "settings"), [(1, {}), (6, {}), (2, {"penalty_ratio": 0.0})])
def test_nothing_is_removed_otherwise(round, settings):
    """Not between reconfigurations, not after the last round, not without a penalty."""
    algorithm = prunetrain(server(), reconfigure_every=2, **settings)
    state = replace(algorithm.init(first_model()), round=round - 1, params=near_dead())
    assert algorithm.server_update(state, []).masks == {}


def test_a_living_model_stays_dense():
    """No pattern travels, and devices may compute densely, until a channel is removed."""
    algorithm = prunetrain(server(), reconfigure_every=1)
    assert algorithm.server_update(algorithm.init(first_model()), []).masks == {}


def test_channels_die_and_stay_dead_and_no_answer_is_refused():
    masks = []

    def watch(progress, record):
        assert len(record.answered) == 4 and not record.refused
        masks.append(progress.state.masks)

    run(prunetrain(server(), **CASE.settings), watch=watch)
    assert density(masks[-1]) < 0.9
    for before, after in pairwise(masks):
        assert all((after[name] <= mask).all() for name, mask in before.items())


@pytest.mark.parametrize(
    "setting",
    [
        {"penalty_ratio": 1.0},
        {"penalty_ratio": -0.1},
        {"threshold": -1.0},
        {"reconfigure_every": 0},
        {"reconfigure_every": 6},  # of 6 rounds: nothing would be pruned
        {"lr": 0.0},
        {"cohort": 0},
    ],
)
def test_bad_hyperparameters_are_named(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=name):
        prunetrain(server(), **setting)
