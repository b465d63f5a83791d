"""Devices with limits of memory: who is left out of a round and why, and what a run says of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from federation import CLIENTS, ENGINE, SPEC, client_data, first_model, params, run, same, server

from fedlean import wire
from fedlean.algorithm import Device, FederatedAlgorithm
from fedlean.core import SubModel, Work
from fedlean.cost.price import Model, cost
from fedlean.methods.fedavg import fedavg
from fedlean.methods.ntk_zo import ntk_zo
from fedlean.methods.prunefl import prunefl
from fedlean.methods.smartfreeze import smartfreeze
from fedlean.methods.snip import snip
from fedlean.runtime.clientstore import ClientStore
from fedlean.runtime.local import LocalDispatch
from fedlean.runtime.record import StepRecord
from fedlean.runtime.rounds import EMPTY_STEPS, LoopState, RunFailed
from fedlean.runtime.step import CHOICES

BATCH = 4
NEEDS = cost(
    Model(SPEC, SubModel()), [Work(2, BATCH)], server().profile
).peak_memory_bytes  # of a task of `quick`
Present = Callable[[int], Sequence[Device]]


def quick(rounds: int = 3, **settings: Any) -> FederatedAlgorithm:
    return fedavg(server(rounds), local_steps=2, batch_size=BATCH, **settings)


def fleet(*memory_bytes: int | None) -> Present:
    devices = [Device(id, memory_bytes=each) for id, each in enumerate(memory_bytes)]
    return lambda step: devices


def taken(
    algorithm: FederatedAlgorithm, present: Present, rounds: int = 3
) -> tuple[Any, list[StepRecord]]:
    records: list[StepRecord] = []
    dispatch = LocalDispatch(algorithm.client_update, ENGINE, client_data(), present)
    state = run(
        algorithm,
        dispatch=dispatch,
        rounds=rounds,
        watch=lambda progress, record: records.append(record),
    )
    return state, records


def mb(size: int) -> str:
    return f"{size / 1e6:.3f} MB"


def test_who_has_one_byte_less_than_a_task_needs_is_left_out_as_if_away():
    memory = [NEEDS, NEEDS - 1, None, NEEDS]
    state, records = taken(quick(), fleet(*memory))
    for record in records:
        assert record.answered == [task.client for task in record.tasks] == [0, 2, 3]
        assert record.left_out == {1: f"needs {mb(NEEDS)}, has {mb(NEEDS - 1)}"}
        assert record.refused == {} and record.attempts == 1
        assert record.cost.downlink_bytes > 0
    others = [Device(0), Device(2), Device(3)]
    away, there = taken(quick(), lambda step: others)
    assert same(state, away) and [one.cost.downlink_bytes for one in there] == [
        one.cost.downlink_bytes for one in records
    ]


def test_without_a_fleet_nothing_is_limited():
    state, records = taken(quick(), fleet(None, None, None, None))
    assert same(state, run(quick(), rounds=3))
    assert all(record.cost.memory_utilisation is None for record in records)


def test_where_a_whole_cohort_is_left_out_others_are_asked_in_the_same_step():
    """One of four a round, and only client 2 can hold the task."""
    small = NEEDS // 2
    state, records = taken(quick(6, cohort=1), fleet(small, small, NEEDS, small), rounds=6)
    assert [record.answered for record in records] == [[2]] * 6
    assert all(record.attempts == 1 for record in records)
    assert any(record.left_out for record in records)
    assert state.round == 6


def test_where_nobody_fits_the_run_says_so_and_ends_with_need_and_budget():
    records: list[StepRecord] = []
    algorithm = quick(20)
    memory = [NEEDS - 1, NEEDS // 2, NEEDS // 3, 0]
    dispatch = LocalDispatch(algorithm.client_update, ENGINE, client_data(), fleet(*memory))
    states = []

    def watch(progress: Any, record: StepRecord) -> None:
        states.append(progress.state)
        records.append(record)

    with pytest.raises(RunFailed) as failed:
        run(algorithm, dispatch=dispatch, rounds=20, watch=watch)
    said = (
        "nobody was asked: no task fits its device: 4 left out, the smallest task needs "
        f"{mb(NEEDS)} and the largest device has {mb(NEEDS - 1)}"
    )
    assert str(failed.value).startswith(
        f"{EMPTY_STEPS} steps without an answer; in the last {said}: train a smaller model"
    )
    assert len(records) == EMPTY_STEPS
    assert [record.notes[0] for record in records] == [said] * EMPTY_STEPS
    assert [(record.present, record.able) for record in records] == [(4, 0)] * EMPTY_STEPS
    assert all(
        (list(one.tasks), one.attempts, one.asked_round, sorted(one.left_out), one.server_only)
        == ([], 0, 1, [0, 1, 2, 3], False)
        for one in records
    )
    assert same(dict(states[-1].params), dict(params())) and states[-1].round == 0


@pytest.mark.parametrize(("stage", "pieces"), [(0, False), (1, True)])
def test_the_remedy_of_a_stage_that_fits_nobody_is_that_of_stages(stage, pieces):
    """Where something is frozen and runs in one session with the rest, it may run in pieces."""
    algorithm = smartfreeze(server(4), local_steps=2, batch_size=8, pace=False)
    state = algorithm.init(first_model())
    for _ in range(2 * stage):
        state = algorithm.server_update(state, ())
    dispatch = LocalDispatch(algorithm.client_update, ENGINE, client_data(), fleet(9, 9, 9, 9))
    with pytest.raises(RunFailed) as failed:
        run(algorithm, dispatch=dispatch, progress=LoopState(state, ClientStore()), rounds=4)
    remedy = str(failed.value).split("has 0.000 MB: ")[-1]
    assert remedy.startswith("divide the model into more parts (--set ends=..., or the model's ")
    assert ("--set beginning=pieces" in remedy) == pieces and "train a smaller model" in remedy


def test_a_step_in_which_nobody_is_there_is_said_and_does_not_count():
    def present(step: int) -> list[Device]:
        return [] if step in (2, 3) else [Device(client) for client in range(CLIENTS)]

    state, records = taken(quick(), present)
    assert [bool(record.answered) for record in records] == [True, False, False, True, True]
    assert [record.notes for record in records[1:3]] == [
        ["nobody was asked: no device is there"]
    ] * 2
    assert same(state, run(quick(), rounds=3))


def test_a_client_that_is_asked_and_away_gives_nothing():
    """PruneFL prunes at one client, whoever is there."""
    algorithm = prunefl(server(2), local_steps=2, batch_size=BATCH, initial_client=1)
    records: list[StepRecord] = []

    def present(step: int) -> list[Device]:
        return [Device(client) for client in range(CLIENTS) if client != 1 or step > 1]

    dispatch = LocalDispatch(algorithm.client_update, ENGINE, client_data(), present)
    run(algorithm, dispatch=dispatch, rounds=2, watch=lambda p, record: records.append(record))
    assert records[0].refused == {1: "is away"} and not records[0].answered
    assert records[1].answered == [1]


@pytest.mark.parametrize("understated", [(), None])
def test_a_device_that_finds_a_task_too_large_itself_is_a_missing_answer(understated):
    """The method claims no work, or says nothing of it: the engine looks before it allocates."""
    if ENGINE.name != "native":
        pytest.skip("the reason is of the native plan")
    work = None if understated is None else (lambda task: understated)
    algorithm = quick()._replace(work=work)
    if understated == ():  # what is charged must not exceed it
        inner = algorithm.client_update

        def silent(*given: Any) -> Any:
            update, state = inner(*given)
            return replace(update, work=()), state

        algorithm = algorithm._replace(client_update=silent)
    state, records = taken(algorithm, fleet(NEEDS, NEEDS - 1, NEEDS, NEEDS))
    for record in records:
        assert record.answered == [0, 2, 3] and record.left_out == {}
        assert record.refused[1].startswith(f"a training step needs {mb(NEEDS)}, ")
        assert "give the device more in --fleet" in record.refused[1]
    assert same(state.params, taken(quick(), fleet(NEEDS, 1, NEEDS, NEEDS))[0].params)


def test_whom_a_task_was_too_large_for_is_not_asked_again_in_the_step():
    algorithm = quick()._replace(work=None)
    records: list[StepRecord] = []
    dispatch = LocalDispatch(algorithm.client_update, ENGINE, client_data(), fleet(1, 1, 1, 1))
    with pytest.raises(RunFailed, match=r"of 4 clients in the last.*client 0: a training step"):
        run(algorithm, dispatch=dispatch, rounds=3, watch=lambda p, record: records.append(record))
    assert [record.attempts for record in records] == [1] * EMPTY_STEPS


METHODS = {
    "fedavg with momentum": lambda s: fedavg(s, local_steps=2, batch_size=BATCH, momentum=0.9),
    "prunefl": lambda s: prunefl(s, local_steps=2, batch_size=BATCH, reconfigure_every=2),
    "snip": lambda s: snip(s, local_steps=2, batch_size=BATCH, density=0.3),
    "ntk_zo": lambda s: ntk_zo(s, batch_size=BATCH, density=0.5),
}


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_is_priced_at_is_what_the_engine_of_its_devices_lets_it_have(name):
    """With the memory of the dearest task all goes on as without a limit, to rounding.

    With a byte less, a device that can compute in another way does, and in the end the server
    leaves clients out; never does a device have to refuse what it was sent.
    """
    algorithm = METHODS[name](server(4))
    free, records = taken(algorithm, fleet(None, None, None, None), rounds=4)
    limits = [peak_of(records)]
    while True:
        records, state = [], None
        dispatch = LocalDispatch(
            algorithm.client_update, ENGINE, client_data(), fleet(*[limits[-1]] * CLIENTS)
        )
        try:
            state = run(
                algorithm,
                dispatch=dispatch,
                rounds=4,
                watch=lambda progress, record, to=records: to.append(record),
            )
        except RunFailed as error:
            assert "no task fits its device" in str(error)
        assert all(not record.refused for record in records)
        if state is None:
            break
        if name == "ntk_zo":  # layers that keep half take their other form, with other last bits
            for tensor, value in state.params.items():
                np.testing.assert_allclose(value, free.params[tensor], rtol=1e-3, atol=1e-4)
        else:
            assert same(state, free)
        assert all(not record.left_out for record in records)
        assert max(record.cost.memory_utilisation or 0.0 for record in records) <= 1.0
        limits.append(peak_of(records) - 1)
    assert 2 <= len(limits) <= 5


def peak_of(records: Sequence[StepRecord]) -> int:
    return max(record.cost.peak_memory_bytes for record in records)


# Budgets of a round: bytes and seconds


ANY = 10**12


def within(**budget: Any) -> Present:
    """Client 1 has the budget, the others have no limit."""
    devices = [Device(id, profile=server().profile) for id in range(CLIENTS)]
    devices[1] = replace(devices[1], **budget)
    return lambda step: devices


def took(records: Sequence[StepRecord], client: int) -> list[tuple[int, float]]:
    """Bytes and seconds of each round of `quick` for a client, from its messages themselves."""
    store, found, profile = ClientStore(), [], server().profile
    for record in records:
        (task,) = (task for task in record.tasks if task.client == client)
        update, _ = quick().client_update(task, client_data()[client], ENGINE, {})
        down = len(wire.encode_task(task, store.known(client)))
        up = len(wire.encode_update(update, task))
        store.acknowledge(task, update)
        seconds = cost(Model(SPEC, SubModel()), [Work(2, BATCH)], profile).seconds
        link = down / profile.downlink_bytes_per_s + up / profile.uplink_bytes_per_s
        found.append((down + up, seconds + link))
    return found


def test_a_task_that_the_budget_of_bytes_cannot_carry_is_not_sent():
    """What is counted beforehand is the answer's size but for room for its metrics."""
    free, records = taken(quick(), within())
    first, later = (size for size, _ in took(records, 1)[:2])
    assert later < first, "the model's structure travels once"
    state, records = taken(quick(), within(budget_bytes=first + wire.METRICS_BYTES))
    assert same(state, free) and all(not record.left_out for record in records)
    state, records = taken(quick(), within(budget_bytes=first - 1))
    for record in records:
        assert record.answered == [0, 2, 3] and record.refused == {}
        said = record.left_out[1]
        assert said.startswith("needs ") and said.endswith(f" MB of traffic, has {mb(first - 1)}")
    others = [Device(client, profile=server().profile) for client in (0, 2, 3)]
    assert same(state, taken(quick(), lambda step: others)[0])


def test_a_task_that_would_take_the_device_too_long_is_not_sent():
    free, records = taken(quick(), within())
    first = took(records, 1)[0][1]
    slack = 2 * wire.METRICS_BYTES / server().profile.uplink_bytes_per_s
    state, records = taken(quick(), within(budget_seconds=first + slack))
    assert same(state, free) and all(not record.left_out for record in records)
    state, records = taken(quick(), within(budget_seconds=0.99 * first))
    for record in records:
        assert record.answered == [0, 2, 3]
        assert record.left_out[1].endswith(f" s, has {0.99 * first:.3g} s")
    assert "traffic" not in records[0].left_out[1]


def test_the_link_counts_in_the_budget_of_seconds():
    """A device that computes as fast, on a link a thousand times as slow."""
    slow = replace(server().profile, uplink_bytes_per_s=1e3, downlink_bytes_per_s=1e3)
    _, records = taken(quick(), within())
    seconds = took(records, 1)[0][1]
    assert all(
        not record.left_out for record in taken(quick(), within(budget_seconds=1.1 * seconds))[1]
    )
    _, records = taken(quick(), within(budget_seconds=1.1 * seconds, profile=slow))
    assert all(list(record.left_out) == [1] for record in records)


def test_answers_of_scalars_alone_are_counted_as_such():
    """Those of zeroth order hold no tensor: a budget between the two ways lets them through."""
    algorithm = ntk_zo(server(2), batch_size=BATCH, density=1.0)
    _, records = taken(algorithm, within(), rounds=2)
    assert records[0].cost.uplink_bytes < records[0].cost.downlink_bytes / 2
    each = records[0].cost.downlink_bytes // CLIENTS
    _, records = taken(algorithm, within(budget_bytes=int(1.5 * each)), rounds=2)
    assert all(not record.left_out for record in records)
    _, records = taken(quick(), within(budget_bytes=int(1.5 * each)))
    assert all(list(record.left_out) == [1] for record in records)


NEVER = {
    "budget_bytes": (
        1000,
        r"smallest task needs .* MB of traffic and the largest budget is 0\.001 MB",
    ),
    "budget_seconds": (1e-6, r"quickest task needs .* s and the largest budget is 1e-06 s"),
    "memory_bytes": (10, r"smallest task needs .* MB and the largest device has 0\.000 MB"),
}


@pytest.mark.parametrize("budget", NEVER)
def test_where_no_budget_is_enough_the_run_says_of_what(budget):
    has, said = NEVER[budget]
    devices = [Device(id, profile=server().profile, **{budget: has}) for id in range(CLIENTS)]
    with pytest.raises(RunFailed, match=rf"no task fits its device: 4 left out, the {said}: train"):
        taken(quick(20), lambda step: devices, rounds=20)


def test_others_whose_bytes_are_enough_are_found_at_once_and_the_search_ends():
    """Cohorts of one of 300: one device has the bytes, and without it nobody is found."""
    clients, able = 300, 177
    for there in (True, False):
        devices = [
            Device(c, profile=server().profile, budget_bytes=ANY if there and c == able else 1)
            for c in range(clients)
        ]
        algorithm = quick(1, cohort=1)
        data = client_data()[:1] * clients
        records: list[StepRecord] = []
        dispatch = LocalDispatch(algorithm.client_update, ENGINE, data, lambda step, d=devices: d)
        watch = {"watch": lambda progress, record, to=records: to.append(record)}
        if there:
            run(algorithm, dispatch=dispatch, rounds=1, **watch)
            assert records[0].answered == [able] and len(records[0].left_out) <= 1
            continue
        with pytest.raises(RunFailed, match=f"{clients - CHOICES} others were not chosen"):
            run(algorithm, dispatch=dispatch, rounds=1, **watch)
        assert all(len(record.left_out) == CHOICES for record in records)


def test_statistics_count_in_what_an_answer_takes():
    """PruneFL's g² of every weight, in the round that asks for it."""
    algorithm = prunefl(server(4), local_steps=2, batch_size=BATCH, reconfigure_every=2)
    _, records = taken(algorithm, within(), rounds=4)
    dense = next(r for r in records if algorithm.statistics(r.tasks[0]))
    (task,) = (task for task in dense.tasks if task.client == 1)
    forms = algorithm.statistics(task)
    plain, all_of_it = wire.answer_bytes(task, {}), wire.answer_bytes(task, forms)
    assert all_of_it - plain >= 4 * SPEC.num_params
    update, _ = algorithm.client_update(task, client_data()[1], ENGINE, {})
    assert plain < wire.update_bytes(update, task) <= all_of_it
