"""The log of scalars: how far it reaches, what a client gets of it, and what it makes of that."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from federation import SPEC, client_data, params, same

from fedlean.core import ClientTask, SubModel
from fedlean.train import missed_rounds
from fedlean.train.forward_updates import (
    Entry,
    Held,
    Optimizer,
    Rule,
    Space,
    advance,
    estimate,
    read_log,
    replay,
    round_seed,
)
from fedlean.tree import pack

F = np.float32
MASKS = {"fc1.weight": np.arange(12 * 64).reshape(12, 64) % 5 == 0}
RUN_SEED = 9
ENTRIES = [Entry(n, 0.125 / n, np.array([n, -1, 0.5], F)) for n in (1, 2, 3, 4, 5)]
LOG = tuple(np.concatenate([np.array([e.lr], F), e.scalars]) for e in ENTRIES)


def start() -> Held:
    return Held(pack(params(), MASKS))


def after(rounds: int, rule: Rule) -> Held:
    """What the server has."""
    held = start()
    for entry in ENTRIES[:rounds]:
        space = Space(SPEC.param_shapes, MASKS, "gaussian")
        gradient = estimate(round_seed(RUN_SEED, entry.round), entry.scalars, space)
        held = advance(held, gradient, rule, entry.lr, entry.scalars)
    return held


def task(model: Held, rule: Rule, round: int) -> ClientTask:
    hparams = {"kind": "gaussian", "directions": 3}
    hparams |= missed_rounds.replaying(rule, RUN_SEED, round)
    sub_model = SubModel(masks=MASKS)
    return ClientTask(round + 1, "train", 2, 1, SPEC, model.params, sub_model, hparams)


@pytest.mark.parametrize("at", [None, 0, 1])
def test_whom_the_log_does_not_reach_gets_the_model_and_the_optimiser(at):
    """Of five rounds the log has the last three: it leads on from round 2."""
    rule, whole = Rule(), after(5, Rule())
    plain = task(whole, rule, 5)
    given = missed_rounds.from_what_it_keeps(plain, whole, LOG[2:], at, 5)
    assert given.params is plain.params and given.arrays is whole.moments
    assert given.hparams == {**plain.hparams, "steps": 5}
    got = missed_rounds.replayed(given, {})
    assert got is not None and same(dict(got.params), dict(whole.params)) and got.steps == 5


@pytest.mark.parametrize("at", [2, 4, 5])
def test_the_others_get_the_rounds_since(at):
    rule, whole = Rule(), after(5, Rule())
    given = missed_rounds.from_what_it_keeps(task(whole, rule, 5), whole, LOG[2:], at, 5)
    assert not given.params and given.hparams["from"] == at
    rounds = [entry.round for entry in read_log(given.arrays.get("log", {}))]
    assert rounds == list(range(at + 1, 6))


@pytest.mark.parametrize("optimizer", ["adam", "momentum", "normalised"])
def test_a_client_replays_to_the_server_s_model(optimizer: Optimizer):
    """It got the model at round 2, kept it, and hears of it again at round 5."""
    rule = Rule(optimizer, 0.5)
    early = after(2, rule)
    first = missed_rounds.from_what_it_keeps(task(early, rule, 2), early, LOG[:2], None, 2)
    got = missed_rounds.replayed(first, {})
    assert got is not None
    kept = missed_rounds.kept_for_later(got, first)
    assert all(isinstance(value, np.ndarray) for value in kept.values())

    whole = after(5, rule)
    later = missed_rounds.from_what_it_keeps(task(whole, rule, 5), whole, LOG, 2, 5)
    found = missed_rounds.replayed(later, kept)
    assert found is not None and found.steps == whole.steps == 5
    assert same(dict(found.params), dict(whole.params))
    assert same(dict(found.moments), dict(whole.moments))


def test_who_keeps_another_model_has_lost_it():
    """None, and a round that is not the one asked to go on from."""
    whole, rule = after(5, Rule()), Rule()
    given = missed_rounds.from_what_it_keeps(task(whole, rule, 5), whole, LOG, 3, 5)
    assert missed_rounds.replayed(given, {}) is None
    other = missed_rounds.kept_for_later(after(2, rule), task(whole, rule, 2))
    assert missed_rounds.replayed(given, other) is None
    update = missed_rounds.lost(given, client_data()[2])
    assert missed_rounds.has_lost(update) and not update.work
    assert update.statistics["c"].tensors["c"].tolist() == [0, 0, 0]
    assert not missed_rounds.has_lost(replace(update, metrics={}))


def test_the_log_ends_where_the_model_is_shorter():
    """Ten floats and as many moments against lines of 1 + 3: five rounds; at least one, though."""
    model = Held({"w": np.zeros(10, F)}, {"velocity": {"w": np.zeros(10, F)}})
    log: missed_rounds.Log = ()
    for entry in [*ENTRIES, *ENTRIES]:
        log = missed_rounds.logged(log, entry, model)
    assert len(log) == 5 and same(log, LOG)
    assert same(missed_rounds.logged(log, ENTRIES[0], Held({"w": np.zeros(1, F)})), (LOG[0],))


def test_the_log_has_an_end_however_large_the_model(monkeypatch):
    monkeypatch.setattr(missed_rounds, "MAX_LOG_ROUNDS", 2)
    assert same(missed_rounds.logged(LOG[:3], ENTRIES[3], start()), LOG[2:4])


def test_clients_out_of_reach_are_forgotten():
    held = {"0": 1, "1": 2, "2": 5}
    assert missed_rounds.within_reach(held, LOG[2:], 5) == {"1": 2, "2": 5}


def test_rounds_that_nobody_answered_move_nothing():
    rule = Rule("momentum")
    held = missed_rounds.kept_for_later(after(2, rule), task(start(), rule, 2))
    quiet = tuple(np.zeros(4, F) for _ in range(3))
    given = missed_rounds.from_what_it_keeps(
        task(start(), rule, 5), start(), (*LOG[:2], *quiet), 2, 5
    )
    found = missed_rounds.replayed(given, held)
    assert found is not None and same(dict(found.params), dict(after(2, rule).params))


def test_only_a_task_with_a_run_s_seed_is_for_replay():
    whole = task(start(), Rule(), 0)
    plain = {key: value for key, value in whole.hparams.items() if key != "run_seed"}
    assert missed_rounds.replays(whole) and not missed_rounds.replays(replace(whole, hparams=plain))
    space = Space(SPEC.param_shapes, MASKS, "gaussian")
    assert replay(start(), [], seed=0, space=space, rule=Rule()).steps == 0
