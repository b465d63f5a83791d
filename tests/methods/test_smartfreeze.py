"""SmartFreeze: stages and their ends, what is frozen, who takes part, the switches."""

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
    dataset,
    devices,
    first_model,
    params,
    run,
    same,
    server,
)

from fedlean.algorithm import Device
from fedlean.core import Model, derive_seed
from fedlean.cost.price import cost
from fedlean.cost.profile import load_profile
from fedlean.cost.time import link_seconds
from fedlean.cost.way import peak_memory_bytes
from fedlean.data.batches import ClientData
from fedlean.freezing import selection
from fedlean.freezing.client import stage_work
from fedlean.freezing.rules import slope_of_movement
from fedlean.freezing.stages import deadline
from fedlean.methods.smartfreeze import (
    SQUARED_LOSS,
    client_update,
    rehearsals,
    smartfreeze,
    unused,
)
from fedlean.methods.synflow import synflow
from fedlean.models.initialise import init_params
from fedlean.models.resnet import resnet8
from fedlean.planning.rehearse import Stage as Rehearsed
from fedlean.submodels.parts import parts
from fedlean.train.cohort import sample_cohort
from fedlean.tree import apply_mask

SGD = {"lr": 0.05, "local_steps": 2, "batch_size": 8}
# the first part is frozen after three rounds, the soonest that a slope of two movements is there
PACE = {"window": 2, "values": 2, "patience": 1, "threshold": 1.0, "below": 9.0}
CASE = Case(
    method=smartfreeze,
    settings={**SGD, **PACE, "cohort": 3, "momentum": 0.5},
    knob={"select": False},
    neutral={**SGD, "cohort": 2, "momentum": 0.5, "schedule": False, "select": False},
    fedavg={**SGD, "cohort": 2, "momentum": 0.5},
    why_no_masks="parts are dense",
)
MORE_CASES = {
    "pieces": Case(
        method=smartfreeze,
        settings={**SGD, "cohort": 3, "pace": False, "beginning": "pieces", "micro_batch": 3},
        knob={"schedule": False},
        neutral={**SGD, "schedule": False, "beginning": "pieces"},  # nobody is chosen
        fedavg=SGD,
        why_no_masks="parts are dense",
    ),
    "masked": Case(
        method=smartfreeze,
        settings={**SGD, **PACE, "cohort": 3, "momentum": 0.5, "density": 0.5, "prune_steps": 5},
        knob={"criterion": "random"},
        neutral={**SGD, "schedule": False, "select": False, "density": 1.0},
        fedavg=SGD,
    ),
}
PARTS = parts(SPEC)
NORM = resnet8((1, 8, 8), 3, norm="batch")


def made(**settings):
    return smartfreeze(server(), **{**SGD, **settings})


def step(algorithm, state, present=None, data=None):
    """The state after a round, and its updates as the runtime hands them on."""
    data = data or client_data()
    updates = [
        replace(client_update(task, data[task.client], ENGINE, {})[0], task=task)
        for task in algorithm.configure(state, present or devices())
    ]
    return algorithm.server_update(state, updates), updates


def steps(algorithm, count, state=None, present=None):
    """The states after each of so many rounds, the first one before them."""
    states = [state or algorithm.init(first_model())]
    for _ in range(count):
        states.append(step(algorithm, states[-1], present)[0])
    return states


def test_parts_train_one_after_the_other_and_share_the_rounds():
    """Two parts, six rounds: three each; the module is dropped, and the whole model is left."""
    algorithm = made(pace=False, cohort=None)
    states = steps(algorithm, ROUNDS)
    assert [state.stage for state in states] == [0, 0, 0, 0, 1, 1, 1]
    assert [state.over for state in states] == [at == 3 for at in range(7)]
    assert deadline(0, 2, ROUNDS) == 3
    module = {"surrogate_fc.weight", "surrogate_fc.bias"}
    assert [set(state.extra) for state in states] == [module] * 4 + [set()] * 3
    tasks = [algorithm.configure(state, devices())[0] for state in states[:-1]]
    assert [task.hparams["stage"] for task in tasks] == ["conv"] * 3 + ["head"] * 3
    assert [task.sub_model.frozen for task in tasks[:3]] == [frozenset()] * 3
    assert {task.sub_model.frozen for task in tasks[3:]} == {PARTS[0].tensors}
    assert set(tasks[0].params) == PARTS[0].tensors | module
    assert tasks[3].spec == SPEC and algorithm.done(states[-1]) and not algorithm.done(states[-2])
    # what is evaluated is what was trained, with its module to the end of the stage
    early, late = (algorithm.model(states[at]) for at in (3, 4))
    assert early.spec == tasks[0].spec and late.spec == SPEC
    assert same(early.params["surrogate_fc.weight"], states[3].extra["surrogate_fc.weight"])
    assert not same(early.params["surrogate_fc.weight"], states[2].extra["surrogate_fc.weight"])
    assert all(same(late.params[name], states[4].params[name]) for name in SPEC.tensor_shapes)
    # the first values of the module are the seed's
    seed = derive_seed(SEED, 0, 0, "output module")
    drawn = init_params(tasks[0].spec, seed)
    assert all(same(states[0].extra[name], drawn[name]) for name in module)


def test_a_part_stays_bit_for_bit_once_it_is_frozen():
    states = steps(made(pace=False, momentum=0.9, weight_decay=0.1), ROUNDS)
    for before, after in pairwise(states[3:]):
        assert not same(before.params["fc1.weight"], after.params["fc1.weight"])
        for name in PARTS[0].tensors:
            assert before.params[name] is after.params[name]
    for before, after in pairwise(states[:4]):
        assert same(before.params["fc1.weight"], after.params["fc1.weight"])
        assert not same(before.params["conv.weight"], after.params["conv.weight"])


def test_the_beginning_runs_in_four_ways_with_one_result():
    results = [
        run(made(pace=False, momentum=0.5, **how)).params
        for how in (
            {},
            {"beginning": "pieces", "micro_batch": 3},
            {"beginning": "memory"},
            {"beginning": "disk"},
        )
    ]
    for other in results[1:]:
        assert same(dict(results[0]), dict(other))


def test_the_pace_controller_is_asked_with_the_parts_scalars():
    """Movement, floor and slope are of the trained part alone, and the freeze is the rule's."""
    settings = {"window": 2, "smoothing": 0.5, "values": 2, "threshold": 0.5, "patience": 1}
    algorithm = made(**settings)
    states = steps(algorithm, ROUNDS)
    rule = slope_of_movement(**settings, below=1.25)

    def flat(state):
        return np.concatenate([state.params[n].ravel() for n in ("conv.bias", "conv.weight")])

    paced = rule.init(flat(states[0]))
    for state in states[1:3]:
        paced = rule.update(paced, flat(state))
        expected = {**paced["measured"], "frozen": float(paced["frozen"])}
        assert algorithm.report(state) == expected
    # by hand in the second round: P_b of two moves, and the floor of a random walk of two
    moves = np.diff([flat(state).astype(np.float64) for state in states[:3]], axis=0)
    by_hand = np.abs(moves.sum(0)).sum() / np.abs(moves).sum()
    assert algorithm.report(states[2])["movement"] == pytest.approx(by_hand, rel=1e-5)
    assert algorithm.report(states[2])["floor"] == pytest.approx(2**-0.5)


def moved_by(algorithm, states, by):
    """The state after a round in which all of the first part moves by `by`."""
    state = states[-1]
    task = algorithm.configure(state, devices())[0]
    sent = {
        name: value + np.float32(by if name in PARTS[0].tensors else 0)
        for name, value in task.params.items()
    }
    update = replace(
        client_update(task, client_data()[task.client], ENGINE, {})[0], params=sent, task=task
    )
    return [*states, algorithm.server_update(state, [update])]


def test_a_part_is_frozen_when_its_movement_has_fallen_and_is_level():
    """Straight on P_b is 1 and level, which `below` keeps from counting; to and fro it is 0."""
    algorithm = smartfreeze(server(100), **SGD, window=2, values=2, patience=2, smoothing=0.0)
    states = [algorithm.init(first_model())]
    for _ in range(8):
        states = moved_by(algorithm, states, 0.25)
    straight = [algorithm.report(state) for state in states[3:]]
    assert all(one["movement"] == 1 and one["slope"] == 0 for one in straight)
    assert not any(one["frozen"] for one in straight)
    for by in (-0.25, 0.25, -0.25):
        assert not states[-1].over
        states = moved_by(algorithm, states, by)
    found = [algorithm.report(state) for state in states[-3:]]
    assert [one["movement"] for one in found] == pytest.approx([0, 0, 0], abs=1e-6)
    # √2·P_b falls from √2 to 0, then stays: the second level value in a row freezes
    assert [one["slope"] for one in found] == pytest.approx([-(2**0.5), 0, 0], abs=1e-6)
    assert [one["frozen"] for one in found] == [0, 0, 1]
    assert states[-1].over and states[-1].round == 11
    ever = smartfreeze(server(100), **SGD, window=2, values=2, patience=2, below=9.0)
    states = [ever.init(first_model())]
    for _ in range(4):
        states = moved_by(ever, states, 0.25)
    assert [state.over for state in states] == [False] * 4 + [True]


def test_the_last_part_is_never_frozen():
    """It trains to the end, however level its movement."""
    states = steps(smartfreeze(server(10), **SGD, **PACE), 10)
    assert [state.stage for state in states] == [0] * 4 + [1] * 7
    assert [state.measured["frozen"] for state in states[1:]] == [0, 0, 1] + [0] * 7
    assert abs(states[-1].measured["slope"]) < PACE["threshold"]


@pytest.mark.parametrize("switch", ["schedule", "pace", "select"])
def test_each_switch_changes_the_result(switch):
    long = server(10)  # of five rounds each, where the rule freezes after three
    settings = {**SGD, **PACE, "cohort": 2}
    usual, without = (
        run(smartfreeze(long, **settings, **off), rounds=10) for off in ({}, {switch: False})
    )
    assert usual.round == without.round == 10
    assert not same(dict(usual.params), dict(without.params))


def test_without_pace_and_selection_nothing_of_them_is_held():
    state = run(made(pace=False, cohort=2, select=False))
    assert state.known["clients"].size == 0 and "measured" in state.pace
    assert "last" not in state.pace


def needs(one: int, **hparams) -> int:
    """Bytes of a task of stage `one`, from the plan of its work."""
    algorithm = made(pace=False, **hparams)
    task = algorithm.configure(steps(algorithm, 3 * one)[-1], [Device(0)])[0]
    frozen = task.sub_model.frozen
    return peak_memory_bytes(task.spec, stage_work(task), frozen=frozen)


@pytest.mark.parametrize("select", [True, False])
@pytest.mark.parametrize("stage", [0, 1])
def test_who_has_the_memory_for_the_stage_is_eligible(stage, select):
    enough = needs(stage, momentum=0.5)
    algorithm = made(pace=False, momentum=0.5, cohort=2, select=select)
    state = replace(steps(algorithm, 3 * stage)[-1], round=4)
    memory = [enough - 1, enough, None, enough + 1]
    present = [Device(client, memory_bytes=each) for client, each in enumerate(memory)]
    chosen = {
        task.client
        for round in range(20)
        for task in algorithm.configure(replace(state, round=round), present)
    }
    assert chosen == {1, 2, 3}
    # where nobody is able all are asked, so that the run can say what they lack
    small = [Device(client, memory_bytes=enough - 1) for client in range(2)]
    assert [task.client for task in algorithm.configure(state, small)] == [0, 1]


def test_eligibility_is_by_what_the_stage_freezes_and_how_its_beginning_runs():
    """The last stage trains less than the whole model; what is held in memory counts as well."""
    whole = made(schedule=False).configure(made(schedule=False).init(first_model()), devices())[0]
    of_whole = peak_memory_bytes(SPEC, stage_work(whole))
    assert needs(1) < of_whole
    algorithm = made(pace=False, beginning="memory")
    state = steps(algorithm, 3, present=[Device(0)])[-1]
    few, many = Device(0, num_examples=8), Device(0, num_examples=80)
    bytes_of = [
        peak_memory_bytes(task.spec, stage_work(task), frozen=task.sub_model.frozen)
        for device in (few, many)
        for task in algorithm.configure(state, [device])
    ]
    assert bytes_of[0] < bytes_of[1]
    limit = bytes_of[1] - 1
    present = [replace(few, id=1, memory_bytes=limit), replace(many, id=2, memory_bytes=limit)]
    assert [task.client for task in algorithm.configure(state, present)] == [1]


def test_a_first_cohort_is_the_uniform_draw():
    """Nobody has been heard from, and all are as fast."""
    algorithm = made(cohort=2)
    chosen = [task.client for task in algorithm.configure(algorithm.init(first_model()), devices())]
    assert chosen == sample_cohort(devices(), 2, seed=SEED, round=1)


def test_the_selector_is_asked_with_what_clients_sent(monkeypatch):
    """Sketches of update - sent of the module, |B|, squared losses, and seconds of a round."""
    asked = []

    def choose(devices, size, known, seconds, **how):
        asked.append((size, known, [*seconds], how))
        return [device.id for device in devices][:size]

    monkeypatch.setattr(selection, "choose", choose)
    algorithm = made(cohort=2, straggler_penalty=3.0, pace=False)
    slow = load_profile("raspberry_pi_4")
    present = [Device(0), Device(1, profile=slow), Device(2), Device(3, profile=slow)]
    state = algorithm.init(first_model())
    after, updates = step(algorithm, state, present)
    tasks = algorithm.configure(after, present)
    (_, first, _, _), (size, known, seconds, how) = asked[0], asked[-1]
    assert first["clients"].size == 0 and size == 2
    assert how == {"penalty": 3.0, "seed": SEED, "round": 2}
    assert known["clients"].tolist() == [0, 1]
    assert known["examples"].tolist() == [25, 35]
    moves = [
        {
            name: update.params[name] - update.task.params[name]
            for name in ("surrogate_fc.weight", "surrogate_fc.bias")
        }
        for update in updates
    ]
    sketches = [selection.sketch(one, SEED) for one in moves]
    assert same(known["sketches"], np.stack(sketches)) and sketches[0].any()
    squares = [update.metrics[SQUARED_LOSS] for update in updates]
    assert known["squared_losses"].tolist() == squares
    sent = 4 * sum(value.size for value in tasks[0].params.values())
    by_hand = [
        cost(tasks[0], stage_work(tasks[0]), profile).seconds + link_seconds(sent, sent, profile)
        for profile in (server().profile, slow)
    ]
    assert seconds == pytest.approx(by_hand * 2) and by_hand[0] != by_hand[1]


def test_squared_losses_by_hand():
    """The mean of loss² over the batches, each step's loss before it."""
    algorithm = made(local_steps=3)
    task = algorithm.configure(algorithm.init(first_model()), devices())[1]
    update, _ = client_update(task, client_data()[1], ENGINE, {})
    losses = []
    for count in (1, 2, 3):  # the mean of so many, of which the last is new
        short = replace(task, hparams={**task.hparams, "local_steps": count})
        metrics = client_update(short, client_data()[1], ENGINE, {})[0].metrics
        losses.append(metrics["train_loss"] * count - sum(losses))
    assert update.metrics["train_loss"] == pytest.approx(np.mean(losses))
    assert update.metrics[SQUARED_LOSS] == pytest.approx(np.mean(np.square(losses)))


def test_who_says_no_loss_is_not_heard():
    algorithm = made(cohort=2)
    state = algorithm.init(first_model())
    _, updates = step(algorithm, state)
    silent = [replace(updates[0], metrics={}), replace(updates[1], metrics={SQUARED_LOSS: -1.0})]
    for one in silent:
        after = algorithm.server_update(state, [one])
        assert after.known["clients"].size == 0 and not same(after.params, state.params)


def test_what_is_known_of_clients_is_of_their_stage():
    states = steps(made(cohort=2, pace=False), 5)
    counts = [state.known["clients"].size for state in states]
    assert counts[0] == 0 and counts[1] == counts[4] == 2  # 4 is the first round of the last stage
    assert 3 <= counts[3] <= 4
    # the last stage has no module: the last layer's updates are looked at
    assert states[4].known["sketches"].any()


def test_clients_with_the_same_classes_are_a_community():
    """Six clients, of whom three have the first class and three the second."""
    everything = dataset()
    labels = np.asarray(everything.y_train)
    data = [
        ClientData(everything, np.flatnonzero(labels == client % 2)[client // 2 :: 3])
        for client in range(6)
    ]
    present = [Device(client) for client in range(6)]
    algorithm = made(cohort=5, pace=False)
    state = algorithm.init(first_model())
    for _ in range(3):
        state, _ = step(algorithm, state, present, data)
        if state.stage == 0:
            known = state.known
            assert known["communities"].tolist() == [
                int(c % 2 != known["clients"][0] % 2) for c in known["clients"]
            ]
            assert algorithm.report(state)["communities"] == 2


def test_a_cohort_follows_from_the_state():
    """A restored state draws what the first one would have, whatever was drawn before."""
    algorithm, again = made(cohort=2), made(cohort=2)
    states = steps(algorithm, 3)
    for state in reversed(states):
        first, second = (
            [task.client for task in one.configure(replace(state), devices())]
            for one in (algorithm, again)
        )
        assert first == second


def test_the_seed_decides_who_is_drawn():
    def drawn(seed):
        algorithm = smartfreeze(replace(server(), seed=seed), **SGD, cohort=2)
        return [[t.client for t in algorithm.configure(s, devices())] for s in steps(algorithm, 2)]

    assert len({str(drawn(seed)) for seed in range(6)}) > 1


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"lr": 0.0}, "lr"),
        ({"cohort": 0}, "cohort"),
        ({"window": 1}, "window must be an integer of at least 2"),
        ({"values": 1}, "values must be an integer of at least 2"),
        ({"smoothing": 1.0}, "smoothing must lie in"),
        ({"threshold": 0.0}, "threshold must lie in"),
        ({"patience": 0}, "patience must be an integer of at least 1"),
        ({"below": -0.1}, "below must lie in"),
        ({"window": 1, "pace": False}, "window"),
        ({"straggler_penalty": -1.0}, "straggler_penalty must lie in"),
        ({"beginning": "later"}, "beginning must be one of"),
        ({"ends": "nowhere"}, "no block or layer 'nowhere'"),
    ],
)
def test_bad_settings_are_named(setting, said):
    with pytest.raises(ValueError, match=said):
        made(**setting)


def test_fewer_rounds_than_stages_are_refused():
    with pytest.raises(ValueError, match=r"2 stages need 2 rounds or more, got 1.* with ends"):
        smartfreeze(server(1))
    assert steps(smartfreeze(server(1), **SGD, schedule=False), 1)[-1].round == 1
    assert [s.stage for s in steps(smartfreeze(server(2), **SGD), 2)] == [0, 0, 1]


def test_the_whole_model_under_masks_is_synflow():
    """Bit for bit: what is masked is all that it adds to FedAvg."""
    one, other = (
        run(method)
        for method in (
            made(schedule=False, select=False, density=0.3, prune_steps=7),
            synflow(server(), **SGD, density=0.3, synflow_steps=7),
        )
    )
    assert same(dict(one.params), dict(other.params)) and same(dict(one.masks), dict(other.masks))


def test_the_pace_is_that_of_kept_weights_and_sketches_are_of_kept_updates():
    """Half of fc1 and of the last layer, which the last stage looks at."""
    mask = np.arange(12 * 64).reshape(12, 64) % 2 == 0
    last = np.arange(3 * 12).reshape(3, 12) % 3 == 0
    masks = {"fc1.weight": mask, "fc2.weight": last}
    algorithm = made(cohort=2, **PACE)
    state = algorithm.init(Model(SPEC, apply_mask(params(), masks), masks))
    states = [state]
    while len(states) < 6:
        states.append(step(algorithm, states[-1])[0])
    after, updates = step(algorithm, states[-1])
    assert states[-1].stage == 1
    assert states[-1].pace["last"].size == mask.sum() + 12 + last.sum() + 3
    by_hand = [
        selection.sketch(
            {
                "fc2.weight": update.params["fc2.weight"] - states[-1].params["fc2.weight"][last],
                "fc2.bias": update.params["fc2.bias"] - states[-1].params["fc2.bias"],
            },
            SEED,
        )
        for update in updates
    ]
    places = [after.known["clients"].tolist().index(update.client) for update in updates]
    assert same(after.known["sketches"][places], np.stack(by_hand))


def test_networkx_is_asked_for_only_where_it_is_needed(monkeypatch):
    def missing():
        raise ValueError("not there")

    monkeypatch.setattr(selection, "check_louvain", missing)
    with pytest.raises(ValueError, match="not there"):
        made(cohort=2)
    assert made(cohort=2, select=False) and made()


def test_settings_without_effect_are_named():
    usual = {"schedule": True, "pace": True, "select": True, "cohort": 3}
    usual |= {"density": 0.5, "criterion": "synflow"}
    assert unused(usual) == {}
    assert set(unused({**usual, "pace": False})) == {
        *("window", "smoothing", "values", "threshold", "patience", "below")
    }
    assert set(unused({**usual, "cohort": None})) == {"select", "straggler_penalty"}
    assert set(unused({**usual, "select": False})) == {"straggler_penalty"}
    alone = unused({**usual, "schedule": False})
    assert {"pace", "ends", "window", "beginning"} <= set(alone)
    algorithm = [made(schedule=False, **one) for one in ({}, {"window": 3}, {"pace": False})]
    results = [run(one).params for one in algorithm]
    assert same(dict(results[0]), dict(results[1])) and same(dict(results[0]), dict(results[2]))


@pytest.mark.parametrize("spec", [SPEC, NORM], ids=["small", "resnet8"])
def test_a_plan_walks_through_every_stage(spec):
    profile = load_profile("raspberry_pi_4")
    device = Device(0, memory_bytes=10**9)
    walked = Rehearsed(spec).walked("smartfreeze", {}, device, profile)
    stages = [kind.task.hparams["stage"] for kind in walked.walk.kinds]
    assert stages == [part.name for part in parts(spec)] and walked.walk.complete
    assert len(rehearsals({"schedule": False, "density": 1.0})) == 1
