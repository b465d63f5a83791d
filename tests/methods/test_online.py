"""Online learning of the size: who measures what, and a decision by hand.

The formulas of the search are tested in tests/pruning/test_size_search.py.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from math import prod, sqrt

import numpy as np
import pytest
from conformance import Case
from federation import ENGINE, SPEC, client_data, devices, first_model, params, run, same, server

from fedlean.core import ClientUpdate, SubModel
from fedlean.cost.price import round_seconds
from fedlean.cost.profile import load_profile
from fedlean.cost.time import linear_round_time
from fedlean.engine.protocol import SGD as Optimizer
from fedlean.methods.online import client_update, online
from fedlean.pruning.density import density, layer_density
from fedlean.pruning.equal_density import keep_largest, kept_count
from fedlean.pruning.size_search import search_within
from fedlean.tree import apply_mask

SGD = {"lr": 0.05, "local_steps": 2, "batch_size": 8}
SMALL = {**SGD, "adapt_from": 0, "min_density": 0.1}
CASE = Case(
    method=online,
    settings={**SMALL, "cohort": 3},
    knob={"min_density": 0.4},
    neutral={**SGD, "adapt_every": 0},
    fedavg=SGD,
)
FIRST = 1 - 0.9 / sqrt(2)  # k_2 after a first decision that shrinks: 0.3636


def answer(state, client=0, examples=25, **losses):
    """An update that leaves the model as it is."""
    return ClientUpdate(
        client, examples, dict(state.params), SubModel(masks=state.masks), metrics=losses
    )


def at_the_end(size=1.0, **search):
    """(algorithm, state before the last round of the first stretch) at a size."""
    algorithm = online(server(8), **SMALL)
    state = algorithm.init(first_model())
    search = asdict(replace(search_within(0.1, 1.0), **search))
    if size < 1:
        masks = keep_largest(state.params, {}, size, SPEC.prunable)
        state = replace(state, size=size, masks=masks, params=apply_mask(state.params, masks))
    return algorithm, replace(state, round=1, search=search)


def test_a_decision_to_shrink_by_hand():
    """The probe is as good and takes less: k_2 = 1 - 0.9/√2 in every layer, smallest |w| first."""
    algorithm, state = at_the_end()
    after = algorithm.server_update(
        state, [answer(state, start_loss=2.0, end_loss=1.0, probe_loss=1.0)]
    )
    assert after.round == 2 and after.size == pytest.approx(FIRST)
    for name in SPEC.prunable:
        weights = np.abs(params()[name]).ravel()
        count = round(FIRST * weights.size)
        kept = np.zeros(weights.size, bool)
        kept[np.argsort(-weights)[:count]] = True
        assert np.array_equal(after.masks[name].ravel(), kept)
        assert np.array_equal(
            after.params[name].ravel(), np.where(kept, params()[name].ravel(), np.float32(0))
        )
    assert same(after.params["fc1.bias"], params()["fc1.bias"])


def test_a_decision_to_grow_keeps_what_is_there_and_draws_the_rest():
    """A probe that hardly helps: k = 0.3 + 0.9/√2 = 0.936."""
    algorithm, state = at_the_end(size=0.3)
    after = algorithm.server_update(
        state, [answer(state, start_loss=2.0, end_loss=1.0, probe_loss=1.999)]
    )
    assert after.size == pytest.approx(0.3 + 0.9 / sqrt(2))
    for name in SPEC.prunable:
        old, new = state.masks[name], after.masks[name]
        assert (new >= old).all()
        assert new.sum() == round(after.size * new.size)
        assert np.array_equal(after.params[name][old], state.params[name][old])
        rms = float(np.sqrt(np.mean(state.params[name][old] ** 2)))
        fresh = after.params[name][new & ~old]
        assert fresh.all() and float(np.abs(fresh).max()) < 5 * 0.1 * rms
        assert not after.params[name][~new].any()


def test_at_full_size_it_is_dense_again():
    algorithm, state = at_the_end(size=0.5)
    after = algorithm.server_update(
        state, [answer(state, start_loss=2.0, end_loss=1.0, probe_loss=1.999)]
    )
    assert after.size == 1.0 and after.masks == {}
    assert all(after.params[name].all() for name in SPEC.prunable)


def test_without_an_estimate_the_size_stays_until_patience_ends():
    """The loss rose: it waits; the twelfth time in a row k grows by 0.9/√2."""
    risen = {"start_loss": 1.0, "end_loss": 1.5, "probe_loss": 0.5}
    algorithm, state = at_the_end(size=0.3)
    after = algorithm.server_update(state, [answer(state, **risen)])
    assert after.size == 0.3 and after.search["waited"] == 1 and after.masks is state.masks
    algorithm, state = at_the_end(size=0.3, waited=11)
    after = algorithm.server_update(state, [answer(state, **risen)])
    assert after.size == pytest.approx(0.3 + 0.9 / sqrt(2)) and after.search["waited"] == 0


@pytest.mark.parametrize("time_model", ["linear", "device"])
def test_the_sign_turns_where_the_decrease_per_second_does(time_model):
    """k' = 1 - 0.9/√8 = 0.6818; it wins iff its decrease is more than T(k')/T(k) of k's."""
    device = load_profile("generic")

    def seconds(size):
        kept = {n: round(size * prod(SPEC.param_shapes[n])) for n in SPEC.prunable}
        if time_model == "device":
            return round_seconds(SPEC, kept, device, batch_size=8, local_steps=2)
        time = linear_round_time(SPEC, device, batch_size=8, local_steps=2)
        return time.constant_seconds + sum(kept[n] * time.seconds_per_weight[n] for n in kept)

    ratio = seconds(1 - 0.9 / sqrt(8)) / seconds(1.0)
    assert 0 < ratio < 1
    sizes = []
    for factor in (0.999, 1.001):
        algorithm = online(server(8), **SMALL, time_model=time_model)
        state = replace(algorithm.init(first_model()), round=1)
        losses = {"start_loss": 2.0, "end_loss": 1.0, "probe_loss": 2.0 - factor * ratio}
        sizes.append(algorithm.server_update(state, [answer(state, **losses)]).size)
    assert sizes == pytest.approx([1.0, FIRST])


def test_losses_are_weighed_by_examples_of_those_who_sent_them():
    """With p = (1/4, 3/4) the probe's decrease is 0.25·1 + 0.75·0.01, unweighted it is 0.5.

    The third client was not there at the beginning of the stretch.
    """
    algorithm, state = at_the_end()
    plain = {"start_loss": 2.0, "end_loss": 1.0}
    first, second = {**plain, "probe_loss": 1.0}, {**plain, "probe_loss": 1.99}
    updates = [
        answer(state, 0, 25, **first),
        answer(state, 1, 75, **second),
        answer(state, 2, 10_000, train_loss=7.0),
    ]
    grown = algorithm.server_update(state, updates)
    assert grown.size == 1.0 and grown.search["moves"] == 1
    turned = [answer(state, 0, 75, **first), answer(state, 1, 25, **second)]
    assert algorithm.server_update(state, turned).size < 1


def test_nobody_measured_is_no_failed_estimate():
    algorithm, state = at_the_end(size=0.3)
    for updates in ([], [answer(state, train_loss=1.0)]):
        after = algorithm.server_update(state, updates)
        assert after.round == 2 and after.size == 0.3 and after.search == state.search


def test_losses_that_were_not_asked_for_decide_nothing():
    """In the first round of a stretch."""
    algorithm = online(server(8), **SMALL)
    state = algorithm.init(first_model())
    update = answer(state, start_loss=2.0, end_loss=1.0, probe_loss=1.0)
    assert algorithm.server_update(state, [update]).size == 1.0


def tasks_at(algorithm, round, **fields):
    state = replace(algorithm.init(first_model()), round=round - 1, **fields)
    return algorithm.configure(state, devices())


def test_which_rounds_measure():
    """Stretches of 3 from round 4 on; the one that the last round ends decides nothing."""
    algorithm = online(server(12), **{**SMALL, "adapt_every": 3, "adapt_from": 1})
    asked = [tasks_at(algorithm, round)[0].hparams["measure"] for round in range(1, 13)]
    assert asked == ["", "", "", "start", "", "end", "start", "", "end", "", "", ""]


def test_a_stretch_has_one_cohort_and_its_own_examples():
    algorithm = online(server(40), **{**SMALL, "cohort": 2, "adapt_from": 20})
    cohorts = [tuple(t.client for t in tasks_at(algorithm, r)) for r in range(1, 39)]
    pairs = list(zip(cohorts[::2], cohorts[1::2], strict=True))
    assert any(first != second for first, second in pairs[:10]), "drawn anew before it adapts"
    assert all(first == second for first, second in pairs[10:])
    assert len(set(pairs[10:])) > 1
    start, end, following = (tasks_at(algorithm, round)[0] for round in (21, 22, 23))
    assert start.hparams["probe_seed"] == end.hparams["probe_seed"]
    assert start.hparams["probe_seed"] != following.hparams["probe_seed"]
    assert start.seed != end.seed, "it trains on others in each round"


def loss_by_hand(model, masks, seed):
    """Mean loss of two batches of client 1 in a session of its own."""
    session = ENGINE.open(SPEC, model, SubModel(masks), batch_size=8, optimizer=Optimizer(1.0))
    drawn = client_data()[1].draw(steps=2, batch_size=8, seed=seed)
    return float(np.mean([session.loss(x, y) for x, y in drawn]))


def test_a_client_measures_before_it_trains():
    """L₀ of the model sent first, L of the model sent last, L' of that without its smallest."""
    algorithm = online(server(8), **SMALL, probe_batches=2)
    masks = keep_largest(params(), {}, 0.5, SPEC.prunable)
    fields = {"masks": masks, "size": 0.5}
    start = tasks_at(algorithm, 3, params=apply_mask(params(), masks), **fields)[1]
    seed = start.hparams["probe_seed"]
    update, held = client_update(start, client_data()[1], ENGINE, {})
    assert int(held["stretch"]) == 2
    assert float(held["start_loss"]) == loss_by_hand(start.params, masks, seed)
    assert "start_loss" not in update.metrics
    assert [work.forward_examples for work in update.work] == [16]

    moved = {name: value * np.float32(1.1) for name, value in start.params.items()}
    end = tasks_at(algorithm, 4, params=moved, **fields)[1]
    update, after = client_update(end, client_data()[1], ENGINE, held)
    assert after == {}
    probe = 0.5 - 0.9 / sqrt(4) / 2  # k' = k - δ_2 / 2
    assert end.hparams["probe_density"] == pytest.approx(probe)
    smaller = keep_largest(moved, masks, probe, SPEC.prunable)
    assert density(smaller) < density(masks)
    assert update.metrics["start_loss"] == float(held["start_loss"])
    assert update.metrics["end_loss"] == loss_by_hand(moved, masks, seed)
    assert update.metrics["probe_loss"] == pytest.approx(
        loss_by_hand(apply_mask(moved, smaller), smaller, seed), rel=1e-6
    )
    assert [work.forward_examples for work in update.work] == [32]

    untouched = replace(end, hparams={**end.hparams, "measure": ""})
    plain, kept = client_update(untouched, client_data()[1], ENGINE, held)
    assert kept == held, "in between it keeps L₀"
    assert same(dict(plain.params), dict(update.params)), "measuring changes no training"
    assert [work.forward_examples for work in plain.work] == [0]


@pytest.mark.parametrize("held", [{}, {"stretch": np.array(1), "start_loss": np.array(2.0)}])
def test_a_client_without_the_beginning_trains_and_measures_nothing(held):
    algorithm = online(server(8), **SMALL)
    end = tasks_at(algorithm, 4)[1]
    update, after = client_update(end, client_data()[1], ENGINE, held)
    assert after == {} and not {"start_loss", "end_loss", "probe_loss"} & set(update.metrics)
    assert [work.forward_examples for work in update.work] == [0]


def test_a_run_moves_at_the_ends_of_stretches_and_equally_in_every_layer():
    sizes = {}

    def watch(progress, record):
        state = progress.state
        sizes[state.round] = state.size
        for name, kept in layer_density(state.masks).items():
            n = prod(SPEC.param_shapes[name])
            assert kept == kept_count(n, state.size) / n

    run(online(server(), **CASE.settings), watch=watch)
    assert sizes[1] == 1.0 and sizes[2] == pytest.approx(FIRST)
    assert sizes[3] == sizes[2] and sizes[5] == sizes[4] == sizes[6]


@pytest.mark.parametrize(
    "setting",
    [
        {"adapt_every": 1},
        {"adapt_every": -1},
        {"adapt_from": -1},
        {"min_density": 0.0},
        {"min_density": 1.5},
        {"probe_batches": 0},
        {"readd_scale": -0.1},
        {"time_model": "quadratic"},
        {"lr": 0.0},
        {"cohort": 0},
    ],
)
def test_bad_hyperparameters_are_named(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=name):
        online(server(), **setting)
