"""A SuperLink that is away, lies or hangs."""

from __future__ import annotations

import json
import re
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import pytest

from fedlean.runtime.flower import calls, channel, heartbeat, receiving, replying
from fedlean.runtime.flower import superlink as module
from fedlean.runtime.flower.channel import delays, plain
from fedlean.runtime.flower.objects import CHUNK_BYTES, pack, pack_content
from fedlean.runtime.flower.superlink import LinkError, SuperLink

if find_spec("flwr") is None:
    pytest.skip("flwr is not installed", allow_module_level=True)

from runtime.flower.fake import NODE_ID, FakeSuperLink, serving

LIMIT = 8 << 20
CONTENT = bytes(range(251)) * 20_400  # five chunks, no two alike
TIMEOUT = 2.0


@contextmanager
def linked(fake: FakeSuperLink, **settings: Any) -> Iterator[tuple[SuperLink, list[str]]]:
    """An activated node of `fake`, and what it says."""
    said: list[str] = []
    defaults = {"timeout_seconds": TIMEOUT, "patience_seconds": 0, "activation_seconds": 5}
    with serving(fake):
        link = SuperLink(
            f"127.0.0.1:{fake.port}",
            key=None,
            root_certificates=None,
            insecure=True,
            limit_bytes=LIMIT,
            say=said.append,
            **(defaults | settings),
        )
        try:
            assert link.activate() == NODE_ID
            yield link, said
        finally:
            fake.tamper.clear()
            link.close()


@pytest.fixture
def fake() -> FakeSuperLink:
    return FakeSuperLink()


@pytest.fixture
def swift(monkeypatch):
    """Waits of milliseconds."""
    quick = lambda first=0.0, last=0.0: delays(0.01, 0.02)  # noqa: E731
    for each in (calls, module):
        monkeypatch.setattr(each, "delays", quick)


def test_pulls_and_pushes(fake):
    fake.send(pack_content(CONTENT))
    with linked(fake) as (link, said):
        incoming = link.pull()
        assert incoming is not None and incoming.content == CONTENT
        assert type(incoming.content) is bytes
        assert (incoming.group_id, incoming.message_type, incoming.run_id) == ("3", "train", 5)
        assert fake.asked[-1] == "confirm-message-received"
        link.push(incoming, CONTENT[::-1])
        assert link.pull() is None
    message, objects = fake.replies[-1]
    assert message.metadata.reply_to_message_id == incoming.message_id
    assert (message.metadata.src_node_id, message.metadata.dst_node_id) == (NODE_ID, 1)
    assert objects == {
        each.id: each.head + bytes(each.body)
        for each in replying.objects.in_order(pack_content(CONTENT[::-1]))
    } | {message.metadata.message_id: objects[message.metadata.message_id]}
    assert fake.asked[-2:] == ["deactivate-node", "unregister-node"]
    where = f"SuperLink 127.0.0.1:{fake.port}"
    assert said == [f"connected to {where} as node {NODE_ID}", f"left {where}"]


def test_nothing_is_confirmed_before_all_is_uploaded(fake):
    """The server uploads what is above the array last, and breaks on an early confirmation."""
    late: list[str] = []
    holds = fake.answer

    def answer(endpoint: str, body: bytes) -> bytes:
        if endpoint == "pull-object":
            name = fake.protos.message.PullObjectRequest.FromString(body).object_id
            kind = fake.objects[name].partition(b" ")[0]
            if kind in (b"Message", b"RecordDict", b"ArrayRecord") and name not in late:
                late.append(name)
                found = fake.protos.message.PullObjectResponse(object_found=True)
                return found.SerializeToString()
        return holds(endpoint, body)

    fake.answer = answer
    fake.send(pack_content(b"abc"))
    with linked(fake) as (link, _):
        incoming = link.pull()
        assert incoming is not None and incoming.content == b"abc" and len(late) == 3


def flipped(answer: bytes) -> bytes:
    return answer[:-1] + bytes([answer[-1] ^ 1])


def truncated(answer: bytes) -> Any:
    def send(handler: Any, _: threading.Event) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(answer)))
        handler.end_headers()
        handler.wfile.write(answer[: len(answer) // 2])

    return send


def announced(length: int) -> Callable[[bytes], Any]:
    """A head that promises so many bytes, and then as many as are taken."""

    def tamper(_: bytes) -> Any:
        def send(handler: Any, stopping: threading.Event) -> None:
            handler.send_response(200)
            handler.send_header("Content-Length", str(length))
            handler.end_headers()
            stopping.wait(5)

        return send

    return tamper


def endless(_: bytes) -> Any:
    """Chunked encoding, which announces no length."""

    def send(handler: Any, stopping: threading.Event) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        piece = b"10000\r\n" + bytes(1 << 16) + b"\r\n"
        try:
            while not stopping.is_set():
                handler.wfile.write(piece)
        except OSError:
            pass

    return send


def trickling(_: bytes) -> Any:
    def send(handler: Any, stopping: threading.Event) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        try:
            while not stopping.wait(0.05):
                handler.wfile.write(b"x")
        except OSError:
            pass

    return send


def hanging(_: bytes) -> Any:
    return lambda handler, stopping: stopping.wait(5)


OBJECT_FAULTS = {
    "corrupted": (flipped, "corrupted on its way"),
    "truncated": (truncated, "ended after"),
    "announced": (announced(1 << 40), "announced an answer of 1099511627776 bytes"),
    "endless": (endless, "sent more than"),
    "trickling": (trickling, "trickled in"),
    "hanging": (hanging, "timed out"),
    "hung up": (lambda _: None, "RemoteDisconnected"),
    "error": (lambda _: (500, b'{"detail":"Internal server error."}'), "HTTP 500: Internal"),
    "html": (lambda _: b"<html>hello</html>", "not the answer to a pull"),
    "redirect": (lambda _: (302, b""), "HTTP 302"),
}


@pytest.mark.parametrize("fault", OBJECT_FAULTS)
def test_bad_objects(fake, fault):
    tamper, says = OBJECT_FAULTS[fault]
    fake.send(pack_content(CONTENT))
    with linked(fake) as (link, said):
        fake.tamper["pull-object"] = tamper
        tracemalloc.start()
        began = time.monotonic()
        with pytest.raises(LinkError, match=says) as caught:
            link.pull()
        seconds, peak = time.monotonic() - began, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert caught.value.retry
        assert seconds < 2 * TIMEOUT + 1
        assert peak < 2 * LIMIT
        assert sum("refused" in line for line in said) == 1
        reply, _ = fake.replies[-1]
        assert reply.HasField("error") and says.split()[0] in reply.error.reason
        fake.tamper.clear()
        fake.send(pack_content(b"the next one"))
        after = link.pull()
        assert after is not None and after.content == b"the next one"


def lying_array(**lies: Any) -> Any:
    """A sound tree whose array says something untrue, or unusual."""
    chunk = pack("ArrayChunk", b"abc")
    described = {"dtype": "uint8", "shape": [3], "stype": "fedlean", "arraychunk_ids": [0]} | lies
    array = pack("Array", json.dumps(described).encode(), (chunk,))
    record = pack("ArrayRecord", json.dumps({"message": array.id}).encode(), (array,))
    return pack("RecordDict", json.dumps({"fedlean": record.id}).encode(), (record,))


@pytest.mark.parametrize(
    ("lies", "says"),
    [
        ({"shape": [2]}, "chunk .* of 3 bytes at 0 of 2"),
        ({"shape": [4]}, "make 3 bytes, the array announces 4"),
        ({"arraychunk_ids": [1]}, "chunks that it does not have"),
        ({"arraychunk_ids": [-1]}, "chunks that it does not have"),
        ({"arraychunk_ids": None}, "chunks that it does not have"),
        ({"arraychunk_ids": [0] * 100_000, "shape": [1000]}, "bytes at 999 of 1000"),
    ],
)
def test_lying_arrays(fake, lies, says):
    fake.send(lying_array(**lies))
    with linked(fake) as (link, _), pytest.raises(LinkError, match=says):
        link.pull()
    assert fake.replies[-1][0].error.reason.startswith("refused by the node")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (lying_array(shape=[LIMIT + 1]), f"has {LIMIT + 1} bytes, and this node takes at most"),
        (lying_array(shape=[1, 3]), "one dimension"),
        (lying_array(shape=[True]), "one dimension"),
        (lying_array(dtype="float32"), "uint8"),
        (pack("RecordDict", b"{}"), "one array"),
    ],
)
def test_messages_that_are_not_ours_are_refused(fake, content, says):
    fake.send(content)
    with linked(fake) as (link, said):
        assert link.pull() is None
    reply, _ = fake.replies[-1]
    assert reply.error.code == 0 and says in reply.error.reason
    assert any(says in line for line in said)
    assert "confirm-message-received" not in fake.asked


def test_another_object_in_its_place(fake):
    """A sound chunk of an earlier message, replayed."""
    fake.send(pack_content(b"first"))
    fake.send(pack_content(b"second"))
    with linked(fake) as (link, _):
        assert link.pull() is not None
        old = pack("ArrayChunk", b"first")
        answer = fake.protos.message.PullObjectResponse(
            object_found=True, object_available=True, object_content=old.head + old.body
        ).SerializeToString()
        fake.tamper["pull-object"] = lambda it: answer if b"ArrayChunk" in it else it
        with pytest.raises(LinkError, match="came with the hash"):
            link.pull()


def test_equal_chunks_are_fetched_once(fake):
    fake.send(pack_content(bytes(3 * CHUNK_BYTES)))
    with linked(fake) as (link, _):
        incoming = link.pull()
        assert incoming is not None and incoming.content == bytes(3 * CHUNK_BYTES)
        assert fake.asked.count("pull-object") == 1 + 1 + 3  # array, chunk, what is above


def test_memory_of_a_message_is_its_content(fake):
    content = pack_content(bytes(range(256)) * (LIMIT // 256))
    fake.send(content)
    with linked(fake) as (link, _):
        tracemalloc.start()
        incoming = link.pull()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert incoming is not None and len(incoming.content) == LIMIT
    server_bytes = LIMIT + 4 * CHUNK_BYTES  # in this process, too: all objects, one under way
    assert peak - server_bytes < LIMIT + 3 * CHUNK_BYTES


def test_a_message_for_another_node(fake):
    fake.send(pack_content(b"x"))

    def readdress(answer: bytes) -> bytes:
        parsed = fake.protos.fleet.PullMessagesResponse.FromString(answer)
        parsed.messages_list[0].metadata.dst_node_id = 1
        return parsed.SerializeToString()

    with linked(fake) as (link, _):
        fake.tamper["pull-messages"] = readdress
        with pytest.raises(LinkError, match="for node 1"):
            link.pull()


@pytest.mark.parametrize("endpoint", ["pull-messages", "activate-node"])
def test_garbage_is_no_answer(fake, endpoint):
    with linked(fake) as (link, _):
        fake.tamper[endpoint] = lambda _: b"<html>\xff\xff\xff"
        with pytest.raises(LinkError, match=f"answer to {endpoint} is no"):
            link.activate() if endpoint == "activate-node" else link.pull()


def refusing(status: int, code: int) -> Callable[[bytes], Any]:
    return lambda _: (status, json.dumps({"code": code, "detail": "No."}).encode())


def withheld(fake, names: set[str]):
    """The objects are announced and not there, as while their sender is slow or dead."""
    absent = fake.protos.message.PullObjectResponse(object_found=True).SerializeToString()

    def answer(endpoint: str, body: bytes) -> bytes:
        if endpoint == "pull-object":
            name = fake.protos.message.PullObjectRequest.FromString(body).object_id
            if name in names:
                return absent
        return FakeSuperLink.answer(fake, endpoint, body)

    return answer


def test_a_message_that_is_not_uploaded_lets_others_pass(fake, monkeypatch):
    """Its sender died: the next message is taken, and the first one when it is whole after all."""
    monkeypatch.setattr(receiving, "_PATIENCE_SECONDS", 0.0)
    first, second = pack_content(b"first"), pack_content(b"second")
    names: set[str] = {each.id for each in replying.objects.in_order(first)}
    monkeypatch.setattr(fake, "answer", withheld(fake, names))
    fake.send(first)
    fake.send(second)
    with linked(fake) as (link, said):
        assert link.pull() is None
        incoming = link.pull()
        assert incoming is not None and incoming.content == b"second"
        assert link.pull() is None, "still not there"
        names.clear()
        incoming = link.pull()
        assert incoming is not None and incoming.content == b"first"
        assert link.pull() is None
        assert not any("refused" in line for line in said)


def test_a_message_that_is_never_uploaded_is_refused_in_the_end(fake, monkeypatch):
    monkeypatch.setattr(receiving, "_PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(module, "UPLOAD_SECONDS", 0.0)
    content = pack_content(b"never")
    names = {each.id for each in replying.objects.in_order(content)}
    monkeypatch.setattr(fake, "answer", withheld(fake, names))
    fake.send(content)
    with linked(fake) as (link, said):
        with pytest.raises(LinkError, match="was not uploaded within"):
            link.pull()
        assert "refused" in said[-1]
        assert link.pull() is None
    assert fake.replies[-1][0].error.reason.startswith("refused by the node")


def test_a_run_that_is_over(fake):
    fake.send(pack_content(b"x"))
    fake.send(pack_content(b"y"))
    with linked(fake) as (link, said):
        fake.tamper["pull-object"] = refusing(403, 2007)
        assert link.pull() is None
        assert said[-1].endswith("dropped: its run is over")
        fake.tamper.clear()
        incoming = link.pull()
        assert incoming is not None
        fake.tamper["push-messages"] = refusing(403, 2007)
        with pytest.raises(LinkError, match="run is over") as caught:
            link.push(incoming, b"z")
        assert not caught.value.retry


def test_a_reply_that_is_not_taken(fake):
    fake.send(pack_content(b"x"))
    with linked(fake) as (link, _):
        incoming = link.pull()
        assert incoming is not None
        nothing = fake.protos.fleet.PushMessagesResponse(session_id="s").SerializeToString()
        fake.tamper["push-messages"] = lambda _: nothing
        with pytest.raises(LinkError, match="did not take the reply") as caught:
            link.push(incoming, b"z")
        assert not caught.value.retry


@pytest.mark.usefixtures("swift")
@pytest.mark.parametrize("endpoint", ["push-messages", "push-object"])
def test_a_reply_whose_answer_got_lost(fake, endpoint):
    """What was stored is not stored again, and the reply arrives whole."""
    fake.send(pack_content(b"x"))
    lost: list[int] = []

    def lose_one(answer: bytes) -> bytes | None:
        lost.append(len(answer))
        return None if len(lost) == 1 else answer

    with linked(fake, patience_seconds=5) as (link, _):
        incoming = link.pull()
        assert incoming is not None
        time.sleep(0.01)
        fake.tamper[endpoint] = lose_one
        link.push(incoming, CONTENT)
    assert len(fake.replies[-1][1]) == 5 + 4  # chunks, array, two records, message


@pytest.mark.usefixtures("swift")
def test_says_once_that_it_is_away_and_once_that_it_is_back(fake):
    failures = iter([(503, b""), None, (502, b""), (500, b"x")])
    with linked(fake, patience_seconds=30) as (link, said):
        fake.tamper["pull-messages"] = lambda answer: next(failures, answer)
        assert link.pull() is None
        assert [line for line in said if " is away " in line or line.endswith(" is back")] == [
            f"SuperLink 127.0.0.1:{fake.port} is away (127.0.0.1:{fake.port} answered "
            "pull-messages with HTTP 503); trying until it is back",
            f"SuperLink 127.0.0.1:{fake.port} is back",
        ]


@pytest.mark.usefixtures("swift")
def test_outlives_a_restart(fake):
    said: list[str] = []
    with serving(fake):
        link = SuperLink(
            f"127.0.0.1:{fake.port}",
            key=None,
            root_certificates=None,
            insecure=True,
            limit_bytes=LIMIT,
            say=said.append,
        )
        link.activate()
    port = fake.port
    again = FakeSuperLink()
    again.send(pack_content(b"hello"))
    pulled: list[Any] = []
    puller = threading.Thread(target=lambda: pulled.append(link.pull()), daemon=True)
    puller.start()
    time.sleep(0.3)
    assert not pulled
    with serving(again, port):
        puller.join(20)
        assert pulled[0].content == b"hello"
        link.close()


@pytest.mark.usefixtures("swift")
def test_waits_until_a_dead_node_of_the_same_key_is_forgotten(fake):
    answers = iter([refusing(412, 2004), refusing(412, 2004)])
    fake.tamper["activate-node"] = lambda it: next(answers, lambda same: same)(it)
    with linked(fake) as (_, said):
        assert fake.asked.count("activate-node") == 3
        assert [line for line in said if "does not let this node in yet" in line] == said[:1]


@pytest.mark.usefixtures("swift")
def test_a_key_that_is_never_let_in(fake):
    fake.tamper["activate-node"] = refusing(412, 2004)
    with (
        pytest.raises(LinkError, match="is the key registered there") as caught,
        linked(fake, activation_seconds=0.1),
    ):
        pass
    assert not caught.value.retry and caught.value.code == 2004


def test_a_superlink_that_takes_registered_nodes_only(fake):
    fake.tamper["register-node"] = refusing(412, 2001)
    with pytest.raises(LinkError, match="Give this node a key"), linked(fake):
        pass


def test_a_refused_signature_is_activated_again(fake):
    """As after the restart of a SuperLink that keeps nothing; where that fails, too, it ends."""
    with linked(fake) as (link, _):
        first = iter([(401, b"{}")])
        fake.tamper["pull-messages"] = lambda answer: next(first, answer)
        assert link.pull() is None
        assert fake.asked.count("activate-node") == 2
        fake.tamper["pull-messages"] = lambda _: (401, b"{}")
        with pytest.raises(LinkError, match="key registered") as caught:
            link.pull()
        assert not caught.value.retry


@pytest.mark.parametrize(("seconds", "way"), [(120.5, "behind"), (-119.5, "ahead of")])
def test_a_clock_that_is_off_loses_no_reply(fake, seconds, way):
    """Boards without a battery: a reply is dated by the SuperLink's clock, and the log says so."""
    fake.clock_seconds = seconds
    fake.send(pack_content(CONTENT))
    with linked(fake) as (link, said):
        (line,) = (line for line in said if "clock" in line)
        assert re.search(rf"clock is (119|120|121) s {way} the SuperLink's", line)
        incoming = link.pull()
        assert incoming is not None
        link.push(incoming, CONTENT)
    about = fake.replies[-1][0].metadata
    assert about.created_at == pytest.approx(time.time() + seconds, abs=5)
    assert about.created_at + about.ttl == pytest.approx(incoming.created_at + incoming.ttl)


@pytest.mark.parametrize(
    "date", ["", "soon", "Mon, 01 Jan 2024 00:00:00 +" + 20 * "9", f"Mon, 01 Jan {20 * '9'} 00:00"]
)
def test_a_date_that_is_none_says_nothing_of_a_clock(date):
    assert channel._clock_ahead_seconds(date) == 0.0


@pytest.mark.parametrize("seconds", [0.0, -1e8])
def test_a_refused_key_and_a_wrong_clock_are_told_apart(fake, seconds):
    fake.tamper["activate-node"] = lambda _: (401, b"{}")
    fake.clock_seconds = seconds
    with (
        pytest.raises(LinkError, match="is this node's key registered there") as caught,
        linked(fake),
    ):
        pass
    assert bool(re.search(r"clock is 10000000\d s ahead of", str(caught.value))) == bool(seconds)


@pytest.fixture
def quick_heart(monkeypatch):
    """Beats every few hundredths of a second, after a failure, too."""
    monkeypatch.setattr(heartbeat, "delays", lambda first=0.0, last=0.0: delays(0.05, 0.05))


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.usefixtures("quick_heart")
def test_the_heart_outlives_failures(fake):
    failures = iter([None, (503, b"")])
    fake.tamper["send-node-heartbeat"] = lambda answer: next(failures, answer)
    with linked(fake) as (_, said):
        wait_for(lambda: fake.asked.count("send-node-heartbeat") > 4)
        wait_for(lambda: said[-1].endswith("is back"))
        assert sum(" is away " in line for line in said) == 1
    assert not any(each.name == "heartbeat" for each in threading.enumerate())
    assert fake.asked[-2:] == ["deactivate-node", "unregister-node"]


@pytest.mark.usefixtures("quick_heart")
def test_a_forgotten_node_activates_again(fake):
    no = fake.protos.heartbeat.SendNodeHeartbeatResponse().SerializeToString()
    fake.tamper["send-node-heartbeat"] = lambda _: no
    with linked(fake) as (link, _):
        wait_for(lambda: "send-node-heartbeat" in fake.asked)
        wait_for(lambda: link.pull() is None and fake.asked.count("activate-node") > 1)


@pytest.mark.usefixtures("quick_heart")
def test_close_interrupts_a_heartbeat_that_hangs(fake):
    fake.tamper["send-node-heartbeat"] = lambda _: lambda handler, stopping: stopping.wait(20)
    with linked(fake, timeout_seconds=30) as (link, said):
        wait_for(lambda: "send-node-heartbeat" in fake.asked)
        began = time.monotonic()
        link.close()
        assert time.monotonic() - began < 2
        assert not any(" is away " in line for line in said)


def test_close_without_a_superlink(fake):
    with serving(fake):
        said: list[str] = []
        link = SuperLink(
            f"127.0.0.1:{fake.port}",
            key=None,
            root_certificates=None,
            insecure=True,
            limit_bytes=LIMIT,
            say=said.append,
        )
        link.activate()
    link.close()
    link.close()
    assert "did not hear it" in said[-1]


def test_delays_double_up_to_a_bound():
    drawn = [each for each, _ in zip(delays(), range(12), strict=False)]
    bounds = [min(0.5 * 2**each, 30.0) for each in range(12)]
    assert all(most / 2 <= each <= most for each, most in zip(drawn, bounds, strict=True))
    assert all(later > earlier / 2 for earlier, later in pairwise(drawn))


def test_what_others_wrote_is_one_line():
    assert plain("a\nb\x1b[31m" + "c" * 999) == r"a\nb\x1b[31m" + "c" * 188
