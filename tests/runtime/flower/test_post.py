"""GridPost over a Grid whose pulls may hang."""

from __future__ import annotations

import time
import warnings
from threading import Event

import pytest

pytest.importorskip("flwr")
with warnings.catch_warnings():  # of what flwr imports
    warnings.simplefilter("ignore")
    from flwr.app import Error, Message, Metadata

    from fedlean.runtime.flower import post as post_module
    from fedlean.runtime.flower.content import to_record
    from fedlean.runtime.flower.post import GridPost
    from fedlean.runtime.remote.exchange import Failed


def reply(key: str, content: bytes | None):
    about = Metadata(1, "", 2, 3, key, "", time.time(), 60.0, "train")
    if content is None:
        return Message(metadata=about, error=Error(1, "the node is gone"))
    return Message(metadata=about, content=to_record(content))


class Grid:
    """Replies by message id; an Event is waited for, an exception raised."""

    def __init__(self, **replies):
        self.replies, self.pulls = replies, []

    def pull_messages(self, ids):
        (key,) = ids
        self.pulls.append(key)
        found = self.replies.get(key)
        if isinstance(found, Event):
            found.wait(30)
            return [reply(key, b"late")]
        if isinstance(found, Exception):
            raise found
        return [] if found is None else [found]


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(post_module, "PULL_SECONDS", 0.2)


def fetch(post, *ids, seconds=10.0):
    return dict(post.fetch(dict.fromkeys(ids, 100), seconds=seconds))


def test_what_has_come_and_what_has_not():
    grid = Grid(a=reply("a", b"one"), c=reply("c", None))
    got = fetch(GridPost(grid), "a", "b", "c")
    assert bytes(got["a"]) == b"one" and "b" not in got
    assert got["c"] == Failed("Flower error 1: the node is gone")


def test_a_pull_that_hangs_holds_up_nobody():
    stuck = Event()
    grid = Grid(a=stuck, b=reply("b", b"two"))
    post = GridPost(grid)
    began = time.monotonic()
    assert [*fetch(post, "a", "b")] == ["b"]
    assert [*fetch(post, "a", seconds=10.0)] == []  # and is not waited for again
    assert time.monotonic() - began < 2
    assert grid.pulls.count("a") == 1, "it goes on, and is not repeated"
    stuck.set()
    end = time.monotonic() + 10
    while not (got := fetch(post, "a")) and time.monotonic() < end:
        time.sleep(0.01)
    assert bytes(got["a"]) == b"late"


def test_the_round_ends_at_its_deadline(monkeypatch):
    monkeypatch.setattr(post_module, "PULL_SECONDS", 60.0)
    stuck = Event()
    post = GridPost(Grid(a=stuck))
    began = time.monotonic()
    assert fetch(post, "a", seconds=0.1) == {}
    assert time.monotonic() - began < 5
    stuck.set()


def test_a_reply_that_flower_cannot_read_is_one_nodes_trouble():
    got = fetch(GridPost(Grid(a=ValueError("no such object"), b=reply("b", b"two"))), "a", "b")
    assert got["a"] == Failed("a reply that Flower cannot read: ValueError: no such object")
    assert bytes(got["b"]) == b"two"


def test_what_ends_the_connection_ends_the_round():
    with pytest.raises(ConnectionError):
        fetch(GridPost(Grid(a=ConnectionError("gone"))), "a")


def test_a_reply_beyond_its_limit_is_refused_by_itself():
    """From a Grid that has it in this process's memory already."""
    grid = Grid(a=reply("a", bytes(101)), b=reply("b", bytes(100)), c=reply("c", bytes(7)))
    got = dict(GridPost(grid).fetch({"a": 100, "b": 100, "c": 6}, seconds=10.0))
    why = "its reply has {} bytes, an answer to what it was asked at most {}"
    assert got["a"] == Failed(why.format(101, 100)) and got["c"] == Failed(why.format(7, 6))
    assert bytes(got["b"]) == bytes(100)
