"""Rounds over devices that are slow, silent, forgetful or gone."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
from conformance import built_in, case_of
from federation import (
    CLIENTS,
    ENGINE,
    ROUNDS,
    client_data,
    devices,
    first_model,
    fresh_dispatch,
    run,
    same,
    server,
)
from loopback import Loopback, flipped, kind_of, remote

from fedlean import wire
from fedlean.algorithm import FederatedAlgorithm
from fedlean.methods.fedavg import fedavg
from fedlean.runtime.checkpoint import load_checkpoint, save_checkpoint, state_tree
from fedlean.runtime.clientstore import ClientStore
from fedlean.runtime.record import StepRecord
from fedlean.runtime.remote import envelope as env
from fedlean.runtime.remote import unwilling
from fedlean.runtime.remote.dispatch import NobodyThere
from fedlean.runtime.remote.envelope import Envelope, seal, unseal
from fedlean.runtime.remote.exchange import Failed
from fedlean.runtime.remote.holding import expected_by
from fedlean.runtime.remote.worker import Worker
from fedlean.runtime.rounds import LoopState

pytestmark = pytest.mark.usefixtures("clock")


def build(name: str) -> FederatedAlgorithm:
    case = case_of(name)
    return case.method(server(), **case.settings)


def everybody() -> FederatedAlgorithm:
    """FedAvg over all four in every round."""
    return fedavg(server(), lr=0.05, local_steps=2, batch_size=8)


def only_tasks(fault):
    """A fault that leaves greetings alone."""
    return lambda node, content: (
        fault(node, content) if kind_of(content) in (env.TASK, env.UPDATE) else content
    )


@pytest.mark.parametrize("name", built_in())
def test_bit_equal_to_this_process(name, post):
    dispatch, lines = remote(post, name)
    assert same(run(build(name), dispatch=dispatch), run(build(name)))
    assert len(lines) == CLIENTS, lines  # who is who, and no trouble


@pytest.mark.parametrize("name", ["fedavg", "prunefl"])
def test_devices_that_restart_after_every_round(name, post):
    """What counts is on their disks."""
    dispatch, _ = remote(post, name)

    def watch(progress: LoopState, record: StepRecord) -> None:
        for client in range(CLIENTS):
            post.restart(client)

    assert same(run(build(name), dispatch=dispatch, watch=watch), run(build(name)))


def test_a_device_that_lost_its_disk_gets_spec_and_pattern_again(post):
    dispatch, lines = remote(post, "prunefl")
    records: list[StepRecord] = []

    def watch(progress: LoopState, record: StepRecord) -> None:
        records.append(record)
        if progress.state.phase == "train" and progress.state.round == 3:
            shutil.rmtree(post.folder / "2")
            post.restart(2)

    state = run(build("prunefl"), dispatch=dispatch, watch=watch)
    assert "client 2 lacks the spec: it is sent again" in lines
    assert "client 2 has lost what it kept between rounds" in lines
    assert state.round == ROUNDS
    undisturbed: list[StepRecord] = []
    run(build("prunefl"), watch=lambda progress, record: undisturbed.append(record))
    differ = {
        step: record.cost.downlink_bytes - before.cost.downlink_bytes
        for step, (record, before) in enumerate(zip(records, undisturbed, strict=True))
        if record.cost.downlink_bytes != before.cost.downlink_bytes
    }
    (step,) = differ  # in which it was sent twice
    (task,) = (task for task in records[step].tasks if task.client == 2)
    assert differ[step] == wire.task_bytes(task, wire.Known())


def test_only_the_pattern_is_lost(post):
    dispatch, lines = remote(post, "prunefl")

    def watch(progress: LoopState, record: StepRecord) -> None:
        if progress.state.phase == "train" and progress.state.round == 3:
            for path in post.folder.glob("1/*/pattern-*"):
                path.write_bytes(b"torn")
            post.restart(1)

    state = run(build("prunefl"), dispatch=dispatch, watch=watch)
    assert lines.count("client 1 lacks the pattern: it is sent again") == 1
    assert same(state, run(build("prunefl")))


def test_the_server_dies_after_the_devices_answered(post, tmp_path):
    """Resumed from the checkpoint before, on a new connection: the step is done again, the same."""
    saved: list[int] = []

    def watch(progress: LoopState, record: StepRecord) -> None:
        if progress.step <= 4:
            clients = {str(c): dict(s) for c, s in dispatch.client_states().items()}
            tree = {
                "step": progress.step,
                "state": state_tree(progress.state),
                "store": progress.store.to_tree(),
                "clients": clients,
            }
            save_checkpoint(tmp_path / "checkpoint", progress.step, tree)
            saved.append(progress.step)
        else:
            raise KeyboardInterrupt  # after the answers to step 5, before its checkpoint

    name = "prunefl"
    dispatch, _ = remote(post, name)
    with pytest.raises(KeyboardInterrupt):
        run(build(name), dispatch=dispatch, watch=watch)
    tree, _ = load_checkpoint(tmp_path / "checkpoint")
    algorithm = build(name)
    state = type(algorithm.init(first_model()))(**tree["state"])
    again, lines = remote(post, name)
    again.restore({int(k): v for k, v in tree["clients"].items()})
    progress = LoopState(state, ClientStore(tree["store"]), tree["step"])
    assert same(run(algorithm, dispatch=again, progress=progress), run(build(name)))
    assert not any("lost" in line or "lacks" in line for line in lines)


# Silence


def test_a_silent_device_costs_the_deadline_and_is_named(post):
    dispatch, _ = remote(post)
    post.on_the_way_up = only_tasks(lambda node, content: None if node == 101 else content)
    records: list[StepRecord] = []
    run(everybody(), dispatch=dispatch, watch=lambda p, record: records.append(record))
    assert all(record.answered == [0, 2, 3] for record in records)
    assert records[0].refused == {1: "no reply within 0.3 s"}


def test_after_the_deadline_nobody_else_is_asked(post, clock):
    """The second device takes longer than all of it; what the first two answered serves later."""
    dispatch, _ = remote(post)
    slow = [101]

    def fault(node: int, content: bytes) -> bytes:
        if slow == [node]:
            slow.clear()
            clock.sleep(1.0)
        return content

    post.on_the_way_up = only_tasks(fault)
    records: list[StepRecord] = []
    state = run(everybody(), dispatch=dispatch, watch=lambda p, r: records.append(r))
    asked = [node for node, content in post.sent if kind_of(content) == env.TASK]
    assert asked[:4] == [100, 101, 102, 103]
    assert [record.attempts for record in records] == [2] + [1] * (ROUNDS - 1)
    assert same(state, run(everybody()))


def test_too_few_replies_are_not_used_and_asked_again(post):
    """Minimum 3: two attempts with 2 replies come to nothing, the third has all."""
    dispatch, lines = remote(post, min_replies=3)
    tries: list[int] = []

    def fault(node: int, content: bytes) -> bytes | None:
        tries.append(node)
        return None if len(tries) <= 8 and node in (100, 103) else content

    post.on_the_way_up = only_tasks(fault)
    records: list[StepRecord] = []
    state = run(everybody(), dispatch=dispatch, watch=lambda p, r: records.append(r))
    assert [record.attempts for record in records] == [3] + [1] * (ROUNDS - 1)
    assert sum("nothing is aggregated" in line for line in lines) == 2
    assert same(state, run(everybody()))


def test_replies_that_cannot_be_used_do_not_count(post):
    """Minimum 3 of 4: with two torn updates nothing is aggregated, and the log says which."""
    dispatch, lines = remote(post, min_replies=3)
    tries: list[int] = []

    def tear(node: int, content: bytes) -> bytes:
        tries.append(node)
        if kind_of(content) == env.UPDATE and len(tries) <= 8 and node in (100, 103):
            whole = unseal(content, expected=(env.UPDATE,))
            return seal(Envelope(env.UPDATE, whole.fields, bytes(whole.body)[:-4]))
        return content

    post.on_the_way_up = only_tasks(tear)
    records: list[StepRecord] = []
    state = run(everybody(), dispatch=dispatch, watch=lambda p, r: records.append(r))
    assert [record.attempts for record in records] == [3] + [1] * (ROUNDS - 1)
    assert sum("2 of 4 gave an answer that can be used" in line for line in lines) == 2
    assert sum(line.startswith(("client 0: ", "client 3: ")) for line in lines) == 4
    assert same(state, run(everybody()))


def test_updates_that_the_checks_refuse_do_not_count(post):
    """The bound on an update's norm is the runtime's: the dispatch asks it before it is content."""
    dispatch, _ = remote(post, min_replies=4)
    updates = everybody().configure(everybody().init(first_model()), devices())
    dispatch.begin(ClientStore(), 1)
    assert list(dispatch(updates, lambda update, task: "too far" if task.client else None)) == []
    assert dispatch.troubles() == {1: "too far", 2: "too far", 3: "too far"}
    dispatch, _ = remote(post, min_replies=1)
    dispatch.begin(ClientStore(), 1)
    got = list(dispatch(updates, lambda update, task: "too far" if task.client else None))
    assert [update.client for update in got] == [0, 1, 2, 3], "for the runtime to charge and refuse"


def test_who_refuses_a_task_for_good_is_not_asked_for_the_same_again(post, monkeypatch):
    """Not enough memory: until the model is another, or ten minutes have passed.

    It has not said so when it joined; else it would not be asked at all.  The method does not say
    what a task takes; else the device would be known to have less.
    """
    algorithm = everybody()._replace(work=None)
    monkeypatch.setattr(Worker, "_memory_bytes", lambda self: None)
    post.workers[101] = Worker(
        post.folder / "1",
        client_data()[1],
        client=1,
        engine=ENGINE.name,
        memory_limit_bytes=1 << 20,
    )
    dispatch, _ = remote(post)
    records: list[StepRecord] = []
    run(algorithm, dispatch=dispatch, watch=lambda p, r: records.append(r))
    asked = [node for node, content in post.sent if kind_of(content) == env.TASK]
    assert asked.count(101) == 1 and asked.count(100) == ROUNDS
    assert all("MB are free" in record.refused[1] for record in records)
    assert records[1].refused[1].endswith("(it was not asked again)")
    dispatch, _ = remote(post)
    monkeypatch.setattr(unwilling, "REFUSAL_SECONDS", 0.0)
    before = len(post.sent)
    run(algorithm, dispatch=dispatch)
    asked = [node for node, content in post.sent[before:] if kind_of(content) == env.TASK]
    assert asked.count(101) == 3, "of six rounds in the first, second and fourth, as the refused"


def test_late_and_second_replies_are_discarded_and_said(post):
    dispatch, lines = remote(post)
    held: list[tuple[str, bytes]] = []

    def watch(progress: LoopState, record: StepRecord) -> None:
        if progress.step == 1:
            key, content = held[0]
            post.waiting.append((key, content))  # round 1's answer, in round 2

    original = post.send

    def send(letters, *, seconds):
        keys = original(letters, seconds=seconds)
        for key, (node, content) in zip(keys, letters, strict=True):
            if kind_of(content) == env.TASK and node == 101 and not held:
                late = [one for one in post.waiting if one[0] == key]
                post.waiting.remove(late[0])
                held.append(late[0])
            elif kind_of(content) == env.TASK and node == 102:
                post.waiting += [one for one in post.waiting if one[0] == key]
        return keys

    post.send = send
    records: list[StepRecord] = []
    run(
        everybody(),
        dispatch=dispatch,
        watch=lambda p, r: (watch(p, r), records.append(r)),
    )
    assert records[0].answered == [0, 2, 3] and records[1].answered == [0, 1, 2, 3]
    assert "discarded a late reply: node 101, step 1" in lines
    assert lines.count("discarded a second reply to one message") >= 1


def test_nobody_there_ends_with_the_count(post):
    post.there = {100}
    dispatch, lines = remote(post)
    with pytest.raises(NobodyThere, match="1 of 4 clients are connected after"):
        run(everybody(), dispatch=dispatch)
    assert "waiting: 1 of 4 clients are connected" in lines


def test_a_node_that_comes_back_under_another_id_is_the_same_client(post):
    dispatch, lines = remote(post)

    def watch(progress: LoopState, record: StepRecord) -> None:
        if progress.step == 2:
            post.workers[777] = post.workers.pop(103)
            post.there = {100, 101, 102, 777, 103}  # the old one is not known to be dead yet

    assert same(run(everybody(), dispatch=dispatch, watch=watch), run(everybody()))
    assert any(line.startswith("client 3 is node 777") for line in lines)


def test_an_answer_to_the_first_asking_serves_the_second(post):
    """The device takes longer than the deadline: its reply comes while it is asked again."""
    dispatch, _ = remote(post, min_replies=4)
    held: list[tuple[str, bytes]] = []
    original = post.send

    def send(letters, *, seconds):
        keys = original(letters, seconds=seconds)
        for key, (node, content) in zip(keys, letters, strict=True):
            if kind_of(content) == env.TASK and node == 101:
                (mine,) = (one for one in post.waiting if one[0] == key)
                post.waiting.remove(mine)
                if held:
                    post.waiting += held
                held[:] = [mine]
        return keys

    post.send = send
    records: list[StepRecord] = []
    state = run(everybody(), dispatch=dispatch, watch=lambda p, r: records.append(r))
    assert records[0].attempts == 2 and records[0].answered == [0, 1, 2, 3]
    assert state.round == ROUNDS


def test_a_node_restarted_with_another_number_is_asked_again(post):
    """A key keeps its node id; what the operator corrected is seen once the node was gone."""
    dispatch, lines = remote(post, min_clients=2)
    post.workers[103] = post.new_worker(2)  # by mistake
    del post.workers[102]
    post.there = {100, 101, 103}

    def watch(progress: LoopState, record: StepRecord) -> None:
        if progress.step == 2:
            post.there = {100, 101}
        if progress.step == 3:
            post.workers[103] = post.new_worker(3)
            post.there = {100, 101, 103}

    run(everybody(), dispatch=dispatch, watch=watch)
    said = [line.partition(" is node 103")[0] for line in lines if "is node 103" in line]
    assert said == ["client 2", "client 3"]


def test_nodes_without_a_number_keep_the_one_they_had(tmp_path):
    post = Loopback(tmp_path / "nodes", client=None)
    first, lines = remote(post)
    run(everybody(), dispatch=first, rounds=2)
    second, again = remote(post)
    second.restore(first.client_states())
    post.waiting.clear()
    second.begin(ClientStore(), 3)
    assert sorted(line.partition(",")[0] for line in again) == sorted(
        line.partition(",")[0] for line in lines
    )


def test_local_and_remote_runs_are_not_mixed_up(post):
    dispatch, _ = remote(post)
    run(everybody(), dispatch=dispatch, rounds=1)
    with pytest.raises(ValueError, match="submitting its Flower app again"):
        fresh_dispatch(everybody()).restore(dispatch.client_states())
    with pytest.raises(ValueError, match="fedlean resume"):
        dispatch.restore({0: {"importance": np.zeros(3)}})


# Trouble


def test_errors_of_the_transport_and_of_the_device_are_the_reason_in_the_log(post):
    dispatch, _ = remote(post)
    fields = {"reason": "out of disk", "missing": None, "final": False, "gave_up": False}
    fields["too_large"] = False
    trouble = seal(Envelope(env.TROUBLE, fields))
    answers = {101: Failed("node unavailable"), 102: trouble, 103: b"\x00" * 99}
    post.on_the_way_up = only_tasks(lambda node, content: answers.get(node, content))
    records: list[StepRecord] = []
    run(everybody(), dispatch=dispatch, watch=lambda p, record: records.append(record))
    assert records[0].answered == [0]
    assert records[0].refused[1] == "node unavailable"
    assert records[0].refused[2] == "out of disk"
    assert "not a FedLean envelope" in records[0].refused[3]


def test_a_replayed_answer_to_another_step_is_refused(post):
    dispatch, _ = remote(post)
    first: dict[int, bytes] = {}

    def replay(node: int, content: bytes) -> bytes:
        return first.setdefault(node, content) if node == 102 else content

    post.on_the_way_up = only_tasks(replay)
    records: list[StepRecord] = []
    run(everybody(), dispatch=dispatch, watch=lambda p, record: records.append(record))
    assert records[0].answered == [0, 1, 2, 3]
    assert records[1].refused == {2: "answered step 1, expected 2"}


@pytest.mark.parametrize("way", ["on_the_way_down", "on_the_way_up"])
def test_flipped_bytes_are_refused_and_the_run_goes_on(way, post):
    """Every second message has one; each of those is refused with its reason."""
    dispatch, _ = remote(post, "prunefl")
    seeds = count()

    def flip(node: int, content: bytes) -> bytes:
        seed = next(seeds)
        return flipped(content, seed) if seed % 2 else content

    setattr(post, way, only_tasks(flip))
    records: list[StepRecord] = []
    state = run(build("prunefl"), dispatch=dispatch, watch=lambda p, r: records.append(r))
    assert state.round == ROUNDS
    assert all(np.isfinite(value).all() for value in state.params.values())
    reasons = {reason for record in records for reason in record.refused.values()}
    said = ("envelope", "digest", "fields", "expected")
    assert reasons and all(any(word in reason for word in said) for reason in reasons)


def test_a_node_of_another_shape_or_number_is_not_admitted(post):
    welcome = unseal(post.workers[101].answer(_hello()), expected=(env.WELCOME,))
    odd = {
        101: {"client": 9},
        102: {"input_shape": [3, 32, 32]},
        103: {"classes": ["0", "nine"]},
    }

    def change(node: int, content: bytes) -> bytes:
        if kind_of(content) != env.WELCOME or node not in odd:
            return content
        fields = {**unseal(content, expected=(env.WELCOME,)).fields, **odd[node]}
        return seal(replace(welcome, fields=fields))

    post.on_the_way_up = change
    dispatch, lines = remote(post, min_clients=1)
    state = run(everybody(), dispatch=dispatch)
    assert state.round == ROUNDS
    for node, what in ((101, "it is client 9"), (102, "(3, 32, 32)"), (103, "'nine'")):
        assert any(line.startswith(f"node {node} cannot") and what in line for line in lines)


def _hello() -> bytes:
    expected = expected_by(client_data()[0].dataset).to_fields()
    return seal(Envelope(env.HELLO, {"run": "a1", **expected, "refused": None}))


@pytest.mark.parametrize("claimed", [1e29, -1e29])
def test_seconds_that_a_client_claims_are_held_to_the_deadline(claimed, post):
    def lie(node: int, content: bytes) -> bytes:
        if kind_of(content) != env.UPDATE:
            return content
        honest = unseal(content, expected=(env.UPDATE,))
        return seal(Envelope(env.UPDATE, {**honest.fields, "seconds": claimed}, honest.body))

    dispatch, _ = remote(post, "fedavg")
    post.on_the_way_up = lie
    records: list[StepRecord] = []
    run(build("fedavg"), dispatch=dispatch, watch=lambda _, record: records.append(record))
    assert all(0 <= record.measured_seconds <= 600 for record in records)
