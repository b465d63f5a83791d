"""A node learns that a run is over while it works for it, and how old a message is."""

from __future__ import annotations

import json
import time
from importlib.util import find_spec
from typing import Any

import pytest

from fedlean.runtime.flower import heartbeat
from fedlean.runtime.flower.channel import delays
from fedlean.runtime.flower.objects import pack_content

if find_spec("flwr") is None:
    pytest.skip("flwr is not installed", allow_module_level=True)

from runtime.flower.fake import FakeSuperLink
from runtime.flower.test_superlink_faults import linked

RUN_OVER = (409, json.dumps({"code": 2007, "detail": "the run is over"}).encode())


@pytest.fixture
def fake() -> FakeSuperLink:
    return FakeSuperLink()


@pytest.fixture
def quick_heart(monkeypatch):
    monkeypatch.setattr(heartbeat, "delays", lambda first=0.0, last=0.0: delays(0.02, 0.04))


def until(condition: Any, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_run_that_ends_is_noticed_while_the_node_works(fake, quick_heart):
    fake.send(pack_content(b"work"))
    with linked(fake) as (link, _):
        incoming = link.pull()
        over = link.watch(incoming)
        asked = fake.asked.count("pull-object")
        until(lambda: fake.asked.count("pull-object") > asked)
        assert not over()
        fake.tamper["pull-object"] = lambda answer: RUN_OVER
        until(over)


def test_whatever_else_goes_wrong_does_not_end_the_work(fake, quick_heart):
    fake.send(pack_content(b"work"))
    with linked(fake) as (link, _):
        over = link.watch(link.pull())
        for answer in ((500, b"{}"), b"\xff" * 40, None):
            fake.tamper["pull-object"] = lambda _, answer=answer: answer
            beats = fake.asked.count("send-node-heartbeat")
            until(lambda beats=beats: fake.asked.count("send-node-heartbeat") > beats + 1)
        assert not over()


def test_after_the_reply_nothing_is_asked_any_more(fake, quick_heart):
    fake.send(pack_content(b"work"))
    with linked(fake) as (link, _):
        incoming = link.pull()
        link.watch(incoming)
        link.push(incoming, b"done")
        asked, beats = (
            fake.asked.count("pull-object"),
            fake.asked.count("send-node-heartbeat"),
        )
        until(lambda: fake.asked.count("send-node-heartbeat") > beats + 3)
        assert fake.asked.count("pull-object") <= asked + 1, "one may have been under way"


def test_a_message_is_as_old_as_the_clocks_and_the_last_look_say(fake):
    """A server app whose clock is an hour behind must not make every task too late."""
    with linked(fake) as (link, _):
        assert link.pull() is None
        fake.send(pack_content(b"work"))
        incoming = link.pull()
        assert link.age_seconds(incoming) == 0.0
        hour_ago = incoming.__class__(
            **{**vars(incoming), "created_at": incoming.created_at - 3600}
        )
        assert link.age_seconds(hour_ago) < 5.0, "the SuperLink had nothing a moment ago"
        link._empty -= 100.0
        assert 100.0 <= link.age_seconds(hour_ago) < 105.0
        assert link.age_seconds(incoming) == 0.0, "within the slack of two clocks"
