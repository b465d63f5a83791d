"""The round loop: silence, server-only steps, failing clients, and what is charged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from conformance import case_of
from federation import (
    CLIENTS,
    ENGINE,
    SPEC,
    Around,
    client_data,
    first_model,
    fresh_dispatch,
    params,
    run,
    same,
    server,
)

from fedlean import wire
from fedlean.algorithm import FederatedAlgorithm
from fedlean.core import ClientTask, ClientUpdate, Masks, Params
from fedlean.cost.profile import load_profile
from fedlean.cost.time import link_seconds
from fedlean.methods.fedavg import fedavg
from fedlean.methods.prunefl import prunefl
from fedlean.runtime.clientstore import ClientStore
from fedlean.runtime.ledger import StepCost
from fedlean.runtime.local import ClientError, LocalDispatch
from fedlean.runtime.record import StepRecord
from fedlean.runtime.rounds import EMPTY_STEPS, LoopState, RunFailed
from fedlean.runtime.step import ATTEMPTS


def recorded(algorithm: FederatedAlgorithm, **rest: Any) -> tuple[Any, list[StepRecord]]:
    records: list[StepRecord] = []
    rest.setdefault("watch", lambda progress, record: records.append(record))
    return run(algorithm, **rest), records


def quick(rounds: int, **settings: Any) -> FederatedAlgorithm:
    return fedavg(server(rounds), local_steps=1, batch_size=4, **settings)


def test_the_measured_clock_counts_the_median_client_of_every_attempt():
    algorithm = quick(2)
    inner = fresh_dispatch(algorithm, ENGINE)
    dispatch = Around(inner, lambda tasks, updates: updates)
    seconds = iter([{0: 3.0, 1: 1.0, 2: 8.0}, {}])
    dispatch.measured_seconds = lambda: next(seconds)
    _, records = recorded(algorithm, rounds=2, dispatch=dispatch)
    assert [record.measured_seconds for record in records] == [3.0, 0.0]
    fresh = fresh_dispatch(algorithm, ENGINE)
    _, records = recorded(algorithm, rounds=2, dispatch=fresh)
    assert fresh.measured_seconds().keys() == {task.client for task in records[-1].tasks}
    assert all(0 < record.measured_seconds < record.wall_seconds for record in records)


# Silence


def test_a_round_without_an_answer_does_not_count():
    """Round 2 gets none in ATTEMPTS attempts and two more: the same tasks again, and no round 3."""
    asked: list[tuple[int, ...]] = []

    def change(tasks, updates):
        asked.append((tasks[0].round, *(task.seed for task in tasks)))
        return [] if 1 < len(asked) <= 1 + ATTEMPTS + 2 else updates

    algorithm, seen = quick(3), []
    state, _ = recorded(
        algorithm,
        rounds=3,
        dispatch=Around(fresh_dispatch(algorithm), change),
        watch=lambda progress, record: seen.append((progress, record)),
    )
    assert [round for round, *_ in asked] == [1] + [2] * (ATTEMPTS + 3) + [3]
    assert len(set(asked)) == 3  # the same tasks each time
    (first, _), (second, silent), (_, late), (fourth, _) = seen
    assert same(first.state, second.state)
    assert [one.state.round for one, _ in seen] == [1, 1, 2, 3]
    assert (silent.attempts, silent.answered, silent.refused, silent.metrics) == (
        ATTEMPTS,
        [],
        {},
        {},
    )
    assert late.attempts == 3 and late.answered == [0, 1, 2, 3]
    assert [one.empty_steps for one, _ in seen] == [0, 1, 0, 0]
    assert same(state, run(quick(3), rounds=3)) and fourth.step == 4


def test_one_answer_is_enough():
    def change(tasks, updates):
        return [update for update in updates if update.client == 2]

    algorithm = quick(2)
    _, records = recorded(algorithm, rounds=2, dispatch=Around(fresh_dispatch(algorithm), change))
    assert [(record.attempts, record.answered) for record in records] == [(1, [2])] * 2


def test_gives_up_after_so_many_silent_rounds():
    algorithm, seen = quick(EMPTY_STEPS + 5), []
    with pytest.raises(RunFailed) as failed:
        run(
            algorithm,
            rounds=EMPTY_STEPS + 5,
            dispatch=Around(fresh_dispatch(algorithm), lambda tasks, updates: []),
            watch=lambda progress, record: seen.append(progress),
        )
    message = str(failed.value)
    assert f"round 1 was asked in {EMPTY_STEPS} steps, of {CLIENTS} clients in the last" in message
    assert "(none of them said why)" in message
    assert [progress.empty_steps for progress in seen] == list(range(1, EMPTY_STEPS + 1))
    assert same(dict(seen[-1].state.params), dict(params()))


def test_three_rounds_of_refused_updates_end_the_run_with_the_remedy():
    """Not EMPTY_STEPS of them, each asked three times: what is wrong with an update is so again."""
    algorithm, seen = quick(EMPTY_STEPS), []

    def change(tasks, updates):
        return [with_value(update, float("nan")) for update in updates]

    with pytest.raises(RunFailed) as failed:
        run(
            algorithm,
            rounds=EMPTY_STEPS,
            dispatch=Around(fresh_dispatch(algorithm), change),
            watch=lambda progress, record: seen.append(record),
        )
    line = str(failed.value)
    assert "every update was refused 3 times in a row, the last of them in round 1" in line
    assert "not finite" in line and line.endswith("try a lower --lr") and len(line) < 400
    assert [record.attempts for record in seen] == [1, 1, 1]
    assert all(record.rejected == record.refused for record in seen)
    assert all(len(record.rejected) == len(record.tasks) for record in seen)


def test_a_refusal_of_some_or_now_and_then_does_not_end_the_run():
    """Of all in two steps of three, of one in the third."""
    algorithm, seen, calls = quick(3), [], []

    def change(tasks, updates):
        calls.append(tasks)
        updates = list(updates)
        worst = updates if len(calls) % 3 else updates[:1]
        bad = {update.client for update in worst}
        return [with_value(u, float("inf")) if u.client in bad else u for u in updates]

    state = run(
        algorithm,
        rounds=3,
        dispatch=Around(fresh_dispatch(algorithm), change),
        watch=lambda progress, record: seen.append(progress.refused_steps),
    )
    assert state.round == 3 and seen == [1, 2, 0, 1, 2, 0, 1, 2, 0]


def test_updates_that_claim_something_odd_end_the_run_with_another_remedy():
    algorithm = quick(4)

    def change(tasks, updates):
        return [replace(update, num_examples=0) for update in updates]

    with pytest.raises(RunFailed, match=r"claims 0 examples.*do they run this version"):
        run(algorithm, rounds=4, dispatch=Around(fresh_dispatch(algorithm), change))


def with_value(update: ClientUpdate, value: float) -> ClientUpdate:
    name, tensor = next(iter(update.params.items()))
    return replace(update, params={**update.params, name: np.full_like(tensor, value)})


def test_an_answer_in_between_starts_the_count_again():
    calls = []

    def change(tasks, updates):
        calls.append(tasks)
        return updates if len(calls) == ATTEMPTS * (EMPTY_STEPS - 1) + 1 else []

    algorithm, seen = quick(3), []
    with pytest.raises(RunFailed):
        run(
            algorithm,
            rounds=3,
            dispatch=Around(fresh_dispatch(algorithm), change),
            watch=lambda progress, record: seen.append(progress.empty_steps),
        )
    assert seen == [*range(1, EMPTY_STEPS), 0, *range(1, EMPTY_STEPS + 1)]


# Server-only steps


@dataclass(frozen=True)
class Counting:
    round: int
    phase: str
    params: Params
    masks: Masks = field(default_factory=dict)
    alone: int = 0


def thinking(steps: int) -> FederatedAlgorithm:
    """FedAvg that first takes `steps` steps at the server alone."""
    inner = quick(1)

    def configure(state: Counting, devices: Sequence[Any]) -> list[ClientTask]:
        return [] if state.alone < steps else inner.configure(state, devices)

    def server_update(state: Counting, updates: Any) -> Counting:
        if state.alone < steps:
            assert not list(updates)
            return replace(state, alone=state.alone + 1)
        return inner.server_update(state, updates)

    return FederatedAlgorithm(
        lambda model: Counting(0, "train", model.params),
        configure,
        inner.client_update,
        server_update,
        inner.done,
    )


def test_an_empty_task_list_is_a_step_of_the_server_alone():
    """No dispatch, no cost, and however many in a row they are not silence."""
    calls = []

    def change(tasks, updates):
        calls.append(len(tasks))
        return updates

    algorithm, steps = thinking(EMPTY_STEPS + 2), []
    state, _ = recorded(
        algorithm,
        rounds=1,
        dispatch=Around(fresh_dispatch(algorithm), change),
        watch=lambda progress, record: steps.append((progress, record)),
    )
    assert (state.alone, state.round) == (EMPTY_STEPS + 2, 1)
    assert calls == [CLIENTS]
    for at, (progress, record) in enumerate(steps[:-1], start=1):
        assert (progress.step, progress.empty_steps, progress.state.alone) == (at, 0, at)
        assert (list(record.tasks), record.attempts, record.cost) == ([], 0, StepCost())
    assert same(dict(state.params), dict(run(quick(1), rounds=1).params))


# Failing clients


def test_a_failing_client_is_named():
    algorithm = quick(3)
    seeds = {}

    def client_update(task, batches, engine, held):
        seeds[task.round, task.client] = task.seed
        if (task.round, task.client) == (2, 3):
            raise ZeroDivisionError("float division by zero")
        return algorithm.client_update(task, batches, engine, held)

    dispatch = LocalDispatch(client_update, ENGINE, client_data())
    with pytest.raises(ClientError) as failed:
        run(algorithm, rounds=3, dispatch=dispatch)
    assert str(failed.value) == (
        f"round 2 (train), client 3, seed {seeds[2, 3]}: ZeroDivisionError: float division by zero"
    )
    assert isinstance(failed.value.__cause__, ZeroDivisionError)


def test_ctrl_c_in_a_client_is_no_client_error():
    def client_update(task, batches, engine, held):
        raise KeyboardInterrupt

    dispatch = LocalDispatch(client_update, ENGINE, client_data())
    with pytest.raises(KeyboardInterrupt):
        run(quick(1), rounds=1, dispatch=dispatch)


# What is charged


@pytest.mark.parametrize("name", ["fedavg", "prunefl"])
def test_bytes_are_those_of_the_messages(name):
    """Every step: the sum of len(encode) over all messages, with what the store says is held."""
    algorithm = case_of(name).method(server(), **case_of(name).settings)
    store = ClientStore()
    down, up = [], []

    def change(tasks, updates):
        down.append(sum(len(wire.encode_task(task, store.known(task.client))) for task in tasks))
        asked = {task.client: task for task in tasks}
        answers = list(updates)
        up.append(sum(len(wire.encode_update(each, asked[each.client])) for each in answers))
        return answers

    _, records = recorded(
        algorithm,
        dispatch=Around(fresh_dispatch(algorithm), change),
        progress=LoopState(algorithm.init(first_model()), store),
    )
    assert [record.cost.downlink_bytes for record in records] == down
    assert [record.cost.uplink_bytes for record in records] == up
    assert all(record.cost.flops > 0 for record in records)


def test_every_attempt_is_charged():
    """Two silent attempts and one that is answered: three downlinks, and time for each."""
    profile = load_profile("generic")
    _, (plain,) = recorded(quick(1), rounds=1)
    calls = []

    def change(tasks, updates):
        calls.append(max(wire.task_bytes(task) for task in tasks))
        return updates if len(calls) == ATTEMPTS else []

    algorithm = quick(1)
    _, (record,) = recorded(algorithm, rounds=1, dispatch=Around(fresh_dispatch(algorithm), change))
    silent = ATTEMPTS - 1
    assert record.attempts == ATTEMPTS
    assert record.cost.downlink_bytes == ATTEMPTS * plain.cost.downlink_bytes
    assert record.cost.uplink_bytes == plain.cost.uplink_bytes
    assert record.cost.flops == plain.cost.flops
    waited = silent * link_seconds(calls[0], 0, profile)
    assert record.cost.simulated_seconds == pytest.approx(
        plain.cost.simulated_seconds + waited, rel=1e-12
    )


def test_refused_updates_are_charged():
    def change(tasks, updates):
        return [replace(update, num_examples=0) if update.client else update for update in updates]

    algorithm = quick(1)
    _, (record,) = recorded(algorithm, rounds=1, dispatch=Around(fresh_dispatch(algorithm), change))
    _, (plain,) = recorded(quick(1), rounds=1)
    assert record.answered == [0] and len(record.refused) == CLIENTS - 1
    assert record.cost.uplink_bytes == plain.cost.uplink_bytes
    assert record.cost.flops == plain.cost.flops


def test_answers_that_the_method_does_not_read_are_charged():
    inner = quick(1)
    algorithm = inner._replace(server_update=lambda state, updates: replace(state, round=1))
    _, (record,) = recorded(algorithm, rounds=1)
    _, (plain,) = recorded(quick(1), rounds=1)
    assert record.answered == list(range(CLIENTS))
    assert record.cost == plain.cost


def test_pattern_and_spec_travel_once():
    """Nothing changes after round 1, so its downlink is dearer by both, and only its."""
    algorithm = prunefl(server(3), local_steps=1, initial_pruning=False, reconfigure_every=0)
    _, records = recorded(algorithm, rounds=3)
    first, second, third = (record.cost.downlink_bytes for record in records)
    task = records[0].tasks[0]
    known = wire.Known(frozenset({SPEC.hash}), frozenset({wire.pattern_hash(task.sub_model.masks)}))
    once = wire.task_bytes(task) - wire.task_bytes(task, known)
    assert once > wire.pattern_payload_bytes(task.sub_model.masks) > 0
    assert first - second == CLIENTS * once
    assert second == third


def test_metrics_are_weighted_by_examples():
    sizes = {client: data.num_examples for client, data in enumerate(client_data())}

    def change(tasks, updates):
        for update in updates:
            extra = {"odd": 1.0} if update.client % 2 else {}
            yield replace(update, metrics={"id": float(update.client), **extra})

    algorithm = quick(1)
    _, (record,) = recorded(algorithm, rounds=1, dispatch=Around(fresh_dispatch(algorithm), change))
    mean = sum(client * n for client, n in sizes.items()) / sum(sizes.values())
    assert record.metrics == {"id": pytest.approx(mean), "odd": 1.0}
