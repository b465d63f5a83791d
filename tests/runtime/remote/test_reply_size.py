"""What an answer may have in bytes, and replies for which there is no room on the disk."""

from __future__ import annotations

import os
import tempfile
from math import prod
from pathlib import Path

import pytest
from conformance import built_in, case_of
from federation import SPEC, devices, first_model, run, same, server
from loopback import Clock, Loopback, remote

from fedlean.core import ClientTask, StatisticForm
from fedlean.methods.fedavg import fedavg
from fedlean.runtime.clientstore import ClientStore
from fedlean.runtime.remote import dispatch as dispatch_module
from fedlean.runtime.remote import envelope as env
from fedlean.runtime.remote import exchange as exchange_module
from fedlean.runtime.remote import roster as roster_module
from fedlean.runtime.remote.envelope import Envelope, seal, unseal
from fedlean.runtime.remote.exchange import BARE_BYTES, Exchange, Failed
from fedlean.runtime.remote.replysize import reply_bytes

ROOM_BYTES = (1 << 20) + (1 << 15) + 1024


@pytest.fixture(autouse=True)
def clock(monkeypatch) -> Clock:
    """Of all that waits for devices."""
    clock = Clock()
    for module in (dispatch_module, exchange_module, roster_module):
        monkeypatch.setattr(module, "time", clock)
    return clock


class Bounded(Loopback):
    """As a transport that knows the size of a reply before it takes it."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.sizes: list[tuple[int, int, int]] = []  # kind, bytes, limit

    def fetch(self, ids, *, seconds):
        for key, content in super().fetch(ids, seconds=seconds):
            if isinstance(content, bytes):
                kind = unseal(content, expected=tuple(env.KINDS)).kind
                self.sizes.append((kind, len(content), ids[key]))
                if len(content) > ids[key]:
                    content = Failed("too large")
            yield key, content


@pytest.fixture
def post(tmp_path) -> Bounded:
    return Bounded(tmp_path / "nodes")


def a_task() -> ClientTask:
    algorithm = fedavg(server(), lr=0.1, local_steps=1, batch_size=4)
    return algorithm.configure(algorithm.init(first_model()), devices())[0]


def test_by_hand():
    """32 values, their masks, and one statistic of six numbers that the task asks for."""
    values = sum(prod(shape) for shape in SPEC.tensor_shapes.values())
    assert reply_bytes(a_task(), lambda task: {}) == ROOM_BYTES + 5 * values
    forms = {"scores": StatisticForm({"a": (2, 2), "b": (2,)})}
    assert reply_bytes(a_task(), lambda task: forms) == ROOM_BYTES + 5 * values + 9 * 6
    assert reply_bytes(a_task(), None) == ROOM_BYTES + 32 * values


@pytest.mark.parametrize("name", built_in())
def test_every_honest_answer_is_within_its_limit(name, post, monkeypatch):
    """Without the room for fields, which would hide a bound on the arrays that is too low."""
    monkeypatch.setattr("fedlean.runtime.remote.replysize._FIELDS_BYTES", 0)
    monkeypatch.setattr("fedlean.runtime.remote.replysize._ENVELOPE_BYTES", 1500)
    algorithm = case_of(name).method(server(), **case_of(name).settings)
    dispatch, _ = remote(post, name)
    dispatch._statistics = algorithm.statistics
    assert same(
        run(algorithm, dispatch=dispatch),
        run(case_of(name).method(server(), **case_of(name).settings)),
    )
    updates = [(size, limit) for kind, size, limit in post.sizes if kind == env.UPDATE]
    assert updates and all(size <= limit for size, limit in updates)
    assert {limit for kind, _, limit in post.sizes if kind == env.WELCOME} == {BARE_BYTES}


def test_an_answer_beyond_it_is_one_clients_trouble(post):
    def swell(node: int, content: bytes) -> bytes:
        kind = unseal(content, expected=tuple(env.KINDS)).kind
        if kind != env.UPDATE or node != 102:
            return content
        whole = unseal(content, expected=(env.UPDATE,))
        return seal(Envelope(env.UPDATE, whole.fields, bytes(whole.body) + bytes(5 << 20)))

    post.on_the_way_up = swell
    dispatch, _ = remote(post)
    tasks = everybody(dispatch)
    assert [update.client for update in dispatch(tasks, sound)] == [0, 1, 3]
    assert dispatch.troubles() == {2: "too large"}


def test_a_late_reply_keeps_its_limit(clock):
    """It is asked for in the next exchange, whose own messages may have more."""
    asked: list[dict[str, int]] = []

    class Silent:
        def nodes(self):
            return [7]

        def send(self, letters, *, seconds):
            return [f"m{len(asked)}"]

        def fetch(self, ids, *, seconds):
            asked.append(dict(ids))
            return []

    exchange = Exchange(Silent(), poll_seconds=0.5, say=print)
    letters = {7: lambda: b"x"}
    for limit in (10, 2000):
        exchange.run(
            letters,
            ends=clock.monotonic() + 0.4,
            about="it",
            take=lambda node, content: {},
            limit=lambda node, limit=limit: limit + node,
        )
    assert asked == [{"m0": 17}, {"m0": 17, "m1": 2007}]


def everybody(dispatch) -> list[ClientTask]:
    algorithm = fedavg(server(), lr=0.05, local_steps=2, batch_size=8)
    tasks = algorithm.configure(algorithm.init(first_model()), devices())
    dispatch.begin(ClientStore(), 1)
    return list(tasks)


def sound(update, task) -> None:
    return None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
def test_a_reply_for_which_the_disk_has_no_room_costs_that_reply(post, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    real, made = tempfile.mkstemp, []

    def full_for_the_second(**where):
        descriptor, path = real(**where)
        made.append(path)
        if len(made) == 2:
            os.close(descriptor)
            descriptor = os.open("/dev/full", os.O_WRONLY)
        return descriptor, path

    monkeypatch.setattr(tempfile, "mkstemp", full_for_the_second)
    dispatch, lines = remote(post)
    tasks = everybody(dispatch)
    assert [update.client for update in dispatch(tasks, sound)] == [0, 2, 3]
    why = f"No space left on device: free space in {tmp_path}, or set TMPDIR to another folder"
    assert dispatch.troubles() == {1: f"the server has no room for its reply: {why}"}
    assert f"client 1: the server has no room for its reply: {why}" in lines
    assert not list(tmp_path.glob("fedlean-replies-*"))


def test_without_a_folder_for_replies_the_round_ends_and_says_why(post, tmp_path, monkeypatch):
    dispatch, _ = remote(post)
    tasks = everybody(dispatch)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    assert list(dispatch(tasks, sound)) == []
    assert len(dispatch.troubles()) == 4
    assert "the server cannot keep its reply: No such file" in dispatch.troubles()[3]
    (tmp_path / "gone").mkdir()
    assert len(list(dispatch(tasks, sound))) == 4, "the next attempt has one"
