"""Who is waited for, who is left out, and what that costs in time: on a clock that stands in."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from federation import CLIENTS, ROUNDS, first_model, nothing_wrong, run, same, server
from loopback import Clock, Loopback, kind_of, remote

from fedlean.algorithm import FederatedAlgorithm
from fedlean.methods.fedavg import fedavg
from fedlean.runtime.clientstore import ClientStore
from fedlean.runtime.record import StepRecord
from fedlean.runtime.remote import envelope as env
from fedlean.runtime.remote.attendance import READMIT_SECONDS
from fedlean.runtime.remote.dispatch import NobodyThere, RemoteDispatch
from fedlean.runtime.remote.envelope import seal, unseal
from fedlean.runtime.remote.exchange import Failed
from fedlean.runtime.remote.worker import trouble

pytestmark = pytest.mark.usefixtures("clock")

SILENT = 101  # the node of client 1


def everybody() -> FederatedAlgorithm:
    return fedavg(server(), lr=0.05, local_steps=2, batch_size=8)


def step(dispatch: RemoteDispatch, number: int, **refused: str) -> list[int]:
    """One attempt at a step; who was asked.  The updates of the clients in `refused` are."""
    present = dispatch.begin(ClientStore(), number)
    algorithm = everybody()
    tasks = algorithm.configure(algorithm.init(first_model()), present)
    taken = [update.client for update in dispatch(tasks, nothing_wrong)]
    bad = [client for client in taken if f"c{client}" in refused]
    dispatch.acknowledge([client for client in taken if client not in bad], bad)
    return [device.id for device in present]


def sent_tasks(post: Loopback) -> list[int]:
    return [node for node, content in post.sent if kind_of(content) == env.TASK]


class Killed:
    """A node that is dead from `at` on, gone from the list `gone` later, back `back` later."""

    def __init__(self, post: Loopback, clock: Clock, node: int, gone: float, back: float):
        self.post, self.clock, self.node = post, clock, node
        self.gone, self.back, self.at = gone, back, float("inf")
        post.nodes = self.nodes  # type: ignore[method-assign]
        post.on_the_way_down = self.deliver

    def nodes(self) -> set[int]:
        since = self.clock.now - self.at
        return self.post.there - ({self.node} if self.gone <= since < self.back else set())

    def deliver(self, node: int, content: bytes) -> bytes | None:
        dead = node == self.node and 0 <= self.clock.now - self.at < self.back
        return None if dead else content


# The silent


def test_one_silent_node_does_not_make_every_round_last_to_the_deadline(post, clock):
    dispatch, lines = remote(post, deadline_seconds=100.0)
    step(dispatch, 1)
    Killed(post, clock, SILENT, gone=1e9, back=1e9).at = clock.now  # connected, and never heard
    seconds = {}
    for number in range(2, 22):
        began = clock.now
        step(dispatch, number)
        seconds[number] = clock.now - began
    long = [number for number, took in seconds.items() if took >= 100]
    assert long == [2, 4, 7, 12, 21], "asked after 1, 2, 4 and 8 steps without it"
    assert all(took < 3 for number, took in seconds.items() if number not in long)
    assert len([line for line in lines if "it is left out of" in line]) == 4
    assert any("left out of the next step" in note for note in dispatch.notes())


def test_who_answers_a_greeting_is_asked_at_once_again(post, clock):
    """It lost one task; two steps later it would still be left out."""
    dispatch, _ = remote(post, deadline_seconds=10.0)
    killed = Killed(post, clock, SILENT, gone=1e9, back=1e9)
    step(dispatch, 1)
    killed.at = clock.now
    for number in (2, 3, 4):
        step(dispatch, number)
    assert step(dispatch, 5) == [0, 2, 3]
    killed.at = float("inf")
    clock.sleep(60.0)  # greetings are a minute apart
    assert step(dispatch, 6) == [0, 1, 2, 3]


@pytest.mark.parametrize("gave_up", [False, True])
def test_who_answers_late_is_asked_at_once_again_unless_it_gave_up(gave_up, post):
    dispatch, lines = remote(post)
    late: list[tuple[str, bytes]] = []
    step(dispatch, 1)
    original = post.fetch

    def fetch(ids, *, seconds):
        late.extend(one for one in original(ids, seconds=seconds))
        ready = [one for one in late if one[0] in ids and one[0] not in held]
        for one in ready:
            late.remove(one)
        return ready

    held: set[str] = set()
    tasks: set[str] = set()
    if gave_up:
        post.on_the_way_up = lambda node, content: (
            trouble("gave up", gave_up=True)
            if node == SILENT and kind_of(content) == env.UPDATE
            else content
        )
    original_send = post.send

    def send(letters, *, seconds):
        keys = original_send(letters, seconds=seconds)
        for key, (node, content) in zip(keys, letters, strict=True):
            if node == SILENT:
                held.add(key)
                tasks.update({key} if kind_of(content) == env.TASK else ())
        return keys

    post.fetch, post.send = fetch, send
    assert step(dispatch, 2) == [0, 1, 2, 3]
    assert step(dispatch, 3) == [0, 2, 3], "its greeting is not answered, either"
    assert step(dispatch, 4) == [0, 1, 2, 3]
    assert step(dispatch, 5) == [0, 2, 3]
    held -= tasks  # what it says to greetings still does not come
    post.send = original_send
    assert step(dispatch, 6) == ([0, 2, 3] if gave_up else [0, 1, 2, 3])
    assert "discarded a late reply: node 101, step 2" in lines


def test_who_gives_up_is_asked_less_often_although_it_answers(post):
    dispatch, _ = remote(post)
    gave_up = trouble("gave up: the server's deadline is over", gave_up=True)
    post.on_the_way_up = lambda node, content: (
        gave_up if node == SILENT and kind_of(content) == env.UPDATE else content
    )
    asked = [number for number in range(1, 12) if 1 in step(dispatch, number)]
    assert asked == [1, 3, 6, 11]
    assert dispatch.troubles()[1].startswith("gave up: ")


def test_the_silent_are_asked_all_the_same_where_their_answers_are_needed(post):
    """Every round needs all four: the run is that of an undisturbed one, or none."""
    dispatch, lines = remote(post, min_replies=CLIENTS)
    tries: list[int] = []

    def fault(node: int, content: bytes) -> bytes | None:
        if kind_of(content) != env.UPDATE:
            return content
        tries.append(node)
        return None if node == SILENT and tries.count(SILENT) <= 2 else content

    post.on_the_way_up = fault
    records: list[StepRecord] = []
    state = run(everybody(), dispatch=dispatch, watch=lambda p, r: records.append(r))
    assert [record.attempts for record in records] == [3] + [1] * (ROUNDS - 1)
    assert not any("left out" in line for line in lines)
    assert same(state, run(everybody()))


def test_nobody_is_left_out_whose_answer_is_needed_even_if_it_is_never_heard(post, clock):
    dispatch, _ = remote(post, min_replies=CLIENTS, deadline_seconds=8.0)
    step(dispatch, 1)
    Killed(post, clock, SILENT, gone=1e9, back=1e9).at = clock.now
    assert [step(dispatch, number) for number in (2, 3)] == [[0, 1, 2, 3]] * 2


def test_whom_no_task_reached_in_time_has_missed_nothing(post, clock):
    """The first answer takes the whole deadline, and nothing is sent to the others."""
    dispatch, _ = remote(post, deadline_seconds=10.0, join_seconds=1000.0)
    step(dispatch, 1)
    answer = post.on_the_way_up
    post.on_the_way_up = lambda node, content: (clock.sleep(20.0), content)[1]
    step(dispatch, 2)
    assert sent_tasks(post)[CLIENTS:] == [100]
    post.waiting.clear()
    post.on_the_way_up = answer
    post.on_the_way_down = lambda node, content: None if kind_of(content) == env.HELLO else content
    assert step(dispatch, 3) == [1, 2, 3]


def test_whose_updates_are_refused_is_left_out_from_the_second_on(post):
    dispatch, _ = remote(post)
    asked = [number for number in range(1, 13) if 3 in step(dispatch, number, c3="too far")]
    assert asked == [1, 2, 4, 7, 12]
    assert step(dispatch, 21) == [0, 1, 2, 3]
    assert step(dispatch, 22, c3="too far") == [0, 1, 2, 3]
    assert step(dispatch, 23) == [0, 1, 2, 3], "since 21 was taken, 22 is the first in a row"


def test_a_node_that_never_answers_its_greeting_costs_a_second_a_minute(post, clock):
    post.there.add(999)
    post.workers[999] = post.new_worker(0)
    post.on_the_way_down = lambda node, content: None if node == 999 else content
    dispatch, _ = remote(post, join_seconds=1000.0)
    step(dispatch, 1)
    began = clock.now
    for number in range(2, 7):
        clock.sleep(60.0)
        step(dispatch, number)
    assert clock.now - began - 5 * 60 < 6


# Attempts in vain


@pytest.mark.parametrize(("gone", "back"), [(60.0, 62.0), (3.0, 5.0)])
def test_a_killed_node_is_waited_for_before_it_is_asked_again(post, clock, gone, back):
    """Its key is refused for up to a minute: three attempts of 8 s would all meet the dead."""
    dispatch, _ = remote(post, min_replies=CLIENTS, deadline_seconds=8.0, join_seconds=60.0)
    killed = Killed(post, clock, SILENT, gone, back)
    records: list[StepRecord] = []

    def watch(progress, record) -> None:
        records.append(record)
        if progress.step == 2:
            killed.at = clock.now

    state = run(everybody(), dispatch=dispatch, watch=watch)
    assert [record.attempts for record in records] == [1, 1, 2] + [1] * (ROUNDS - 3)
    began = killed.at
    assert max(8.0, back) <= clock.now - began <= max(8.0, back) + 3, "and no longer"
    assert same(state, run(everybody()))


def test_a_node_that_the_transport_gave_up_is_waited_for_too(post, clock):
    """A SuperLink answers for a node that it takes for dead."""
    dispatch, _ = remote(post, min_replies=CLIENTS, deadline_seconds=100.0)
    step(dispatch, 1)
    killed = Killed(post, clock, SILENT, gone=0.0, back=20.0)
    killed.at = clock.now
    post.on_the_way_down = lambda node, content: content
    post.nodes = lambda: set(post.there)  # type: ignore[method-assign]
    dead = Failed("node unavailable")
    post.on_the_way_up = lambda node, content: dead if node == SILENT else content
    step(dispatch, 2)
    assert dispatch.troubles() == {1: "node unavailable"}
    post.on_the_way_up = lambda node, content: content
    post.nodes, post.on_the_way_down = killed.nodes, killed.deliver  # type: ignore[method-assign]
    began = clock.now
    assert step(dispatch, 2) == [0, 1, 2, 3] and dispatch.troubles() == {}
    assert 19.0 < clock.now - began < 22.0


def test_whoever_is_there_is_asked_again_at_once(post, clock):
    """The task was lost and the device was not."""
    dispatch, _ = remote(post, min_replies=CLIENTS, deadline_seconds=8.0)
    lost = [SILENT]

    def fault(node: int, content: bytes) -> bytes | None:
        if kind_of(content) == env.TASK and node in lost:
            lost.remove(node)
            return None
        return content

    post.on_the_way_down = fault
    began = clock.now
    records: list[StepRecord] = []
    run(everybody(), dispatch=dispatch, watch=lambda p, r: records.append(r))
    assert records[0].attempts == 2
    assert clock.now - began < 8.0 + 1


def test_attempts_at_the_silent_are_spaced(post, clock):
    dispatch, lines = remote(post, deadline_seconds=8.0)
    step(dispatch, 1)
    post.on_the_way_down = lambda node, content: None
    sent: list[float] = []
    for _ in range(3):
        step(dispatch, 2)
        sent.append(clock.now - 8.0)
    spaces = [round(after - before) for before, after in pairwise(sent)]
    assert spaces == [READMIT_SECONDS, READMIT_SECONDS]
    assert any("until silent clients are heard: 0, 1, 2" in line for line in lines)


def test_an_answer_between_two_attempts_is_not_asked_for_again(post, clock):
    """It comes while the others are waited for, and a download is spared."""
    dispatch, lines = remote(post, min_replies=CLIENTS, deadline_seconds=8.0)
    step(dispatch, 1)
    killed = Killed(post, clock, 102, gone=20.0, back=30.0)
    killed.at = clock.now
    original, held = post.send, []

    def send(letters, *, seconds):
        keys = original(letters, seconds=seconds)
        for key, (node, content) in zip(keys, letters, strict=True):
            if node == SILENT and kind_of(content) == env.TASK:
                (mine,) = (one for one in post.waiting if one[0] == key)
                post.waiting.remove(mine)
                held.append(mine)
        return keys

    post.send = send
    assert step(dispatch, 2) == [0, 1, 2, 3]
    post.waiting += held
    before = len(sent_tasks(post))
    step(dispatch, 2)
    assert SILENT not in sent_tasks(post)[before:]
    assert dispatch.troubles() == {}
    assert not any("discarded" in line for line in lines)
    post.send = original
    dispatch._early[1] = held[0][1]
    step(dispatch, 3)
    assert dispatch.troubles() == {}, "an answer to another step is forgotten with it"


# Numbers


def test_fewer_connected_than_replies_are_needed_ends_with_what_to_do(post):
    post.there = {100, 101}
    dispatch, _ = remote(post, min_clients=1, min_replies=3)
    with pytest.raises(NobodyThere, match=r"2 of 3 clients are connected .* lower min-replies"):
        dispatch.begin(ClientStore(), 1)


@pytest.mark.parametrize("name", ["min_clients", "min_replies"])
def test_more_than_there_are_can_never_come(name, post):
    with pytest.raises(ValueError, match=f"{name.replace('_', '-')} is 5, and the run has 4"):
        remote(post, **{name: 5})


def test_devices_come_with_the_examples_that_they_say_they_hold(post):
    dispatch, _ = remote(post)
    found = {device.id: device.num_examples for device in dispatch.begin(ClientStore(), 1)}
    assert found == {0: 25, 1: 35, 2: 50, 3: 50}


@pytest.mark.parametrize(("said", "noted"), [(35_001, True), (35_000, False)])
def test_who_says_that_it_has_a_thousand_times_more_than_others_is_noted(said, noted, post):
    """The others hold 25, 35 and 50."""

    def boast(node: int, content: bytes) -> bytes:
        envelope = unseal(content, expected=tuple(env.KINDS))
        if envelope.kind != env.WELCOME or node != 103:
            return content
        return seal(replace(envelope, fields={**envelope.fields, "num_examples": said}))

    post.on_the_way_up = boast
    dispatch, _ = remote(post)
    dispatch.begin(ClientStore(), 1)
    line = "client 3 says that it has 35001 examples, more than 1000 times the median of the others"
    assert any(note.startswith(line) for note in dispatch.notes()) is noted
    dispatch.begin(ClientStore(), 2)
    assert dispatch.notes() == [], "once"


def test_the_letter_says_how_long_the_server_still_waits(post, clock):
    dispatch, _ = remote(post, deadline_seconds=100.0)
    dispatch.begin(ClientStore(), 1)
    post.on_the_way_up = lambda node, content: (clock.sleep(7.0), content)[1]
    step(dispatch, 1)
    waits = [
        unseal(content, expected=(env.TASK,)).fields["deadline_seconds"]
        for _, content in post.sent
        if kind_of(content) == env.TASK
    ]
    assert waits == [100.0, 93.0, 86.0, 79.0]
