"""DPF: the dense step at the pruned model, what travels, and which weights stay."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conformance import Case
from federation import ENGINE, SPEC, client_data, devices, first_model, params, run, same, server

from fedlean import wire
from fedlean.core import ClientUpdate, Statistic, SubModel
from fedlean.cost.price import cost
from fedlean.cost.way import work_memory_bytes
from fedlean.engine.open import open_engine
from fedlean.engine.protocol import SGD
from fedlean.methods.dpf import client_update, decayed, dpf, work
from fedlean.pruning.density import density, full_masks
from fedlean.runtime.clientstore import ClientStore
from fedlean.runtime.remote.limit import LimitedEngine
from fedlean.runtime.remote.room import TooLarge
from fedlean.train.local_sgd import LocalSGD
from fedlean.train.loss_gradient import loss_and_gradient
from fedlean.tree import apply_mask

SGD_SETTINGS = {"lr": 0.05, "local_steps": 2, "batch_size": 8}
CASE = Case(
    method=dpf,
    settings={**SGD_SETTINGS, "density": 0.3, "reconfigure_every": 2},
    knob={"density": 0.2},
    neutral={**SGD_SETTINGS, "density": 1.0},
    fedavg=SGD_SETTINGS,
)


def pruned_state(algorithm):
    """A dense model of which every third column of fc1 and some of conv is hidden."""
    masks = {name: mask.copy() for name, mask in full_masks(SPEC).items()}
    masks["fc1.weight"][:, ::3] = False
    masks["conv.weight"][2:] = False
    outside = {name: ~mask for name, mask in masks.items()}
    hidden = apply_mask({name: params()[name] for name in masks}, outside)
    state = replace(algorithm.init(first_model()), params=apply_mask(params(), masks))
    return replace(state, masks=masks, hidden=hidden)


def dense(state):
    return {name: value + state.hidden.get(name, 0) for name, value in state.params.items()}


def dense_sgd(weights, masks, data, task, *, steps, lr, momentum, weight_decay):
    """The paper's update with all weights in one place, gradients from new sessions."""
    weights = {name: value.astype(np.float64) for name, value in weights.items()}
    velocity = {name: np.zeros_like(value) for name, value in weights.items()}
    for x, y in data.draw(steps=steps, batch_size=4, seed=task.seed):
        at = {name: value.astype(np.float32) for name, value in apply_mask(weights, masks).items()}
        session = ENGINE.open(SPEC, at, SubModel(), batch_size=4, optimizer=SGD(0.0))
        _, entering = loss_and_gradient(session.forward(x, training=True)["fc2"], y, "ce")
        for name, g in session.backward({"fc2": entering}).items():
            velocity[name] = momentum * velocity[name] + g + weight_decay * weights[name]
            weights[name] = weights[name] - lr * velocity[name]
    return weights


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_round_is_sgd_on_the_dense_weights_with_gradients_of_the_pruned(momentum, weight_decay):
    """w(t+1) = w(t) - γ·g(m ⊙ w(t)) for three steps at two clients, then Σ p_n w_n."""
    sgd = {"lr": 0.5, "momentum": momentum, "weight_decay": weight_decay}
    algorithm = dpf(server(), local_steps=3, batch_size=4, density=1.0, **sgd)
    state = pruned_state(algorithm)
    tasks = algorithm.configure(state, devices()[:2])
    updates = [client_update(t, client_data()[t.client], ENGINE, {})[0] for t in tasks]
    after = algorithm.server_update(state, updates)
    ends = [
        dense_sgd(dense(state), state.masks, client_data()[t.client], t, steps=3, **sgd)
        for t in tasks
    ]
    share = [25 / 60, 35 / 60]  # of examples
    for name, value in dense(after).items():
        expected = sum(p * end[name] for p, end in zip(share, ends, strict=True))
        np.testing.assert_allclose(value, expected, atol=2e-6)
    moved = np.abs(after.hidden["fc1.weight"] - state.hidden["fc1.weight"])[:, ::3]
    assert (moved > 1e-5).mean() > 0.3, "pruned weights move too"
    assert not after.hidden["fc1.weight"][state.masks["fc1.weight"]].any()
    assert not after.params["fc1.weight"][:, ::3].any()


def test_decay_of_what_no_client_holds_by_hand():
    """lr 0.1, momentum 0.5, decay 0.2: v = 0.2, w = 0.98; v = 0.1 + 0.196, w = 0.98 - 0.0296."""
    sgd = LocalSGD(lr=0.1, local_steps=2, momentum=0.5, weight_decay=0.2)
    assert decayed(sgd, 0) == pytest.approx(0.9504)
    assert decayed(LocalSGD(lr=0.1, local_steps=5, momentum=0.9), 0) == 1.0
    halved = LocalSGD(lr=0.2, local_steps=2, momentum=0.5, weight_decay=0.2, lr_half_life_rounds=3)
    assert decayed(halved, 3) == pytest.approx(0.9504)


def test_the_largest_of_the_dense_model_stay_wherever_they_are():
    """After round 2 of 6, target at round 3: d = 0.1 + 0.9/27 of 840 weights, 112 of them."""
    algorithm = dpf(server(), density=0.1, reconfigure_every=2, local_steps=1, batch_size=4)
    state = replace(pruned_state(algorithm), round=1)
    moves = {
        f"pruned/{name}": np.zeros(int((~mask).sum()), np.float32)
        for name, mask in state.masks.items()
        if not mask.all()
    }
    moves["pruned/fc1.weight"][0] = 7.0  # the first hidden one of fc1, (0, 0)
    update = ClientUpdate(
        0,
        5,
        dict(state.params),
        SubModel(masks=state.masks),
        {"pruned": Statistic(moves, "mean")},
    )
    after = algorithm.server_update(state, [update])
    grown = state.hidden["fc1.weight"][0, 0] + 7
    assert after.masks["fc1.weight"][0, 0] and after.params["fc1.weight"][0, 0] == grown
    before = {name: value.copy() for name, value in dense(state).items()}
    before["fc1.weight"][0, 0] = grown
    sizes = np.concatenate([np.abs(before[name]).ravel() for name in SPEC.prunable])
    cut = np.sort(sizes)[-112]
    for name in SPEC.prunable:
        assert np.array_equal(after.masks[name], np.abs(before[name]) >= cut)
    assert density(after.masks) == 112 / 840
    assert all(np.array_equal(dense(after)[name], before[name]) for name in before)


def test_density_follows_the_schedule():
    """Masks after rounds 2 and 4 of 6; the target of 0.3 holds from round 0.5 · 6 = 3 on."""
    kept, masks = {}, []

    def watch(progress, record):
        assert len(record.answered) == 4 and not record.refused
        kept[progress.state.round] = density(progress.state.masks)
        masks.append(progress.state.masks)

    run(dpf(server(), **CASE.settings), watch=watch)
    assert not same(masks[3], masks[2]) and same(masks[3], masks[5]), "no new one at the end"
    assert kept[1] == 1.0
    assert kept[2] == kept[3] == pytest.approx(0.3 + 0.7 / 27, abs=1 / 840)
    assert kept[4] == kept[5] == kept[6] == 252 / 840


def test_pruned_model_down_and_dense_update_up():
    """Values alone: 4 bytes per kept weight and other parameter down, per parameter up."""
    algorithm = dpf(server(), local_steps=1, batch_size=4)
    state = pruned_state(algorithm)
    task = algorithm.configure(state, devices())[0]
    update, held = client_update(task, client_data()[0], ENGINE, {})
    assert held == {}
    store = ClientStore()
    store.acknowledge(task, update)
    hidden = sum(int((~mask).sum()) for mask in state.masks.values())
    down = wire.task_bytes(task, store.known(task.client)) - 4 * (SPEC.num_params - hidden)
    up = wire.update_bytes(update, task) - 4 * SPEC.num_params
    zeros = sum(int(np.sum(v == 0)) for v in update.statistics["pruned"].tensors.values())
    assert 0 < down < 400 and -4 * zeros < up < 400, "header and hyper-parameters only"


def test_dense_weight_gradients_are_charged_once_there_is_a_mask():
    algorithm = dpf(server(), local_steps=3, batch_size=4)
    for state, steps in ((algorithm.init(first_model()), 0), (pruned_state(algorithm), 3)):
        task = algorithm.configure(state, devices())[0]
        (did,) = client_update(task, client_data()[0], ENGINE, {})[0].work
        assert (did.steps, did.importance_steps) == (3, steps)


@pytest.mark.usefixtures("has_native")
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_what_a_pruned_round_is_said_to_take_is_what_its_device_must_hold(momentum):
    """Without the client's own moves and velocities, which its engine does not see: to the byte."""
    algorithm = dpf(server(), local_steps=2, batch_size=4, momentum=momentum)
    state = pruned_state(algorithm)
    (task, *_) = algorithm.configure(state, devices())
    (ordered,) = work(task)
    own = 8 * sum(int((~mask).sum()) for mask in state.masks.values())
    granted = work_memory_bytes(SPEC, ordered) - own
    native, data = open_engine("native", 1), client_data()[0]
    update, _ = client_update(task, data, LimitedEngine(native, granted, emulated=True), {})
    assert update.work == (ordered,)
    with pytest.raises(TooLarge, match="a backward pass needs"):
        client_update(task, data, LimitedEngine(native, granted - 1, emulated=True), {})
    for memory_bytes in (granted - 1, granted + own, 10**8):  # whichever way the price is of
        profile = replace(server().profile, memory_bytes=memory_bytes)
        priced = cost(task, (ordered,), profile).peak_memory_bytes
        engine = LimitedEngine(native, priced, emulated=True, dense_way=profile.dense_way)
        client_update(task, data, engine, {})


def test_an_unanswered_round_leaves_the_hidden_weights_alone():
    algorithm = dpf(server(), weight_decay=0.1, density=1.0)
    state = pruned_state(algorithm)
    after = algorithm.server_update(state, [])
    assert after.round == 1 and same(after.hidden, state.hidden)


@pytest.mark.parametrize(
    "setting",
    [
        {"density": 0.0},
        {"density": 1.1},
        {"density": 1e-4},
        {"reconfigure_every": 0},
        {"target_share": 0.0},
        {"target_share": 1.5},
        {"lr": -1.0},
        {"cohort": 0},
    ],
)
def test_bad_hyperparameters_are_named(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=name):
        dpf(server(), **setting)


def test_the_last_mask_has_the_final_density():
    """Of 10 rounds the mask changes after the 8th last, before `target_share` is over."""
    algorithm = dpf(
        replace(server(), rounds=10),
        density=0.2,
        reconfigure_every=4,
        target_share=1.0,
        **SGD_SETTINGS,
    )
    assert density(run(algorithm, rounds=10).masks) == pytest.approx(0.2, abs=0.01)
    with pytest.raises(ValueError, match="must be below the number of rounds"):
        dpf(replace(server(), rounds=3), density=0.2, reconfigure_every=3)
