"""Replies over Flower's own HTTP Grid from a SuperLink that holds what a rogue node sent."""

from __future__ import annotations

import time
import tracemalloc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from importlib.util import find_spec
from typing import Any

import pytest

if find_spec("flwr") is None:
    pytest.skip("flwr is not installed", allow_module_level=True)
with warnings.catch_warnings():  # of what flwr imports
    warnings.simplefilter("ignore")
    from flwr.app import Error, Message, Metadata
    from flwr.common.serde import message_to_proto
    from flwr.proto.message_pb2 import ObjectTree, PullObjectRequest, PullObjectResponse
    from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
    from flwr.supercore.run import Run
    from flwr.superlink.grid.http_grid import HttpGrid

    from fedlean.runtime.flower import collecting
    from fedlean.runtime.flower.post import GridPost
from runtime.flower.fake import FakeSuperLink, serving

from fedlean.runtime.flower import objects
from fedlean.runtime.flower.objects import Packed, pack, pack_content
from fedlean.runtime.remote.exchange import Failed

LIMIT = 1_000_000
MB = 1_000_000


class Runtime(FakeSuperLink):
    """The side of a SuperLink that server apps speak to; replies by the message they answer."""

    def __init__(self) -> None:
        super().__init__()
        self.announced: dict[str, tuple[Any, Any]] = {}  # reply's proto and its tree
        self.pulled: list[str] = []
        self.confirmed: list[str] = []
        self.unavailable: dict[str, int] = {}  # object -> how often it is not there yet

    def reply(self, asked: str, content: Packed | None, error: Error | None = None) -> Packed:
        """`content` has come as the answer to `asked`; its whole tree."""
        about = Metadata(1, "", 2, 1, asked, "", time.time(), 60.0, "train")
        proto = message_to_proto(
            Message(metadata=about, error=error or Error(0))  # what has a content has no error
        )
        if error is None:
            proto.ClearField("error")
        body = proto.SerializeToString(deterministic=True)
        whole = pack("Message", body, () if content is None else (content,))
        proto.metadata.message_id = whole.id
        self.objects |= {each.id: each.head + bytes(each.body) for each in objects.in_order(whole)}
        self.announced[asked] = (proto, tree_of(whole))
        return whole

    def answer(self, endpoint: str, body: bytes) -> bytes:
        if endpoint == "pull-messages":
            answer = PullAppMessagesResponse()
            for asked in PullAppMessagesRequest.FromString(body).message_ids:
                if asked in self.announced:
                    proto, tree = self.announced.pop(asked)
                    answer.messages_list.append(proto)
                    answer.message_object_trees.append(tree)
            return answer.SerializeToString()
        if endpoint == "pull-object":
            name = PullObjectRequest.FromString(body).object_id
            self.pulled.append(name)
            if self.unavailable.get(name, 0):
                self.unavailable[name] -= 1
                return PullObjectResponse(object_found=True).SerializeToString()
            return super().answer(endpoint, body)
        if endpoint == "confirm-message-received":
            name = self.protos.message.ConfirmMessageReceivedRequest.FromString(body)
            self.confirmed.append(name.message_object_id)
        return b""


def tree_of(packed: Packed) -> ObjectTree:
    return ObjectTree(object_id=packed.id, children=[tree_of(each) for each in packed.children])


def around(array: Packed) -> Packed:
    """A RecordDict of ours, whatever the array is."""
    record = pack("ArrayRecord", b'{"message": "%s"}' % array.id.encode(), (array,))
    return pack("RecordDict", b'{"fedlean": "%s"}' % record.id.encode(), (record,))


def array_of(length: int, chunks: list[Packed], places: list[int]) -> Packed:
    body = (
        f'{{"dtype": "uint8", "shape": [{length}], "stype": "fedlean", "arraychunk_ids": {places}}}'
    ).encode()
    return pack("Array", body, tuple(chunks))


def noise(size: int) -> bytes:
    return b"".join(sha256(str(i).encode()).digest() for i in range(size // 32 + 1))[:size]


@pytest.fixture
def runtime(monkeypatch) -> Iterator[Runtime]:
    monkeypatch.setattr(collecting, "FIRST_WAIT_SECONDS", 0.01)
    with serving(Runtime()) as fake:
        yield fake


@pytest.fixture
def post(runtime) -> Iterator[GridPost]:
    grid = HttpGrid(f"127.0.0.1:{runtime.port}", insecure=True, token="any")
    grid.set_run(Run.create_empty(1))
    yield GridPost(grid)
    grid.close()


def fetch(post: GridPost, *ids: str, limit_bytes: int = LIMIT, seconds: float = 20.0):
    return dict(post.fetch(dict.fromkeys(ids, limit_bytes), seconds=seconds))


@contextmanager
def no_more_than(peak_bytes: int) -> Iterator[None]:
    """Of what Python allocates within, at once."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= peak_bytes, f"{peak / MB:.1f} MB"


@pytest.mark.parametrize("content", [b"", b"x", noise(300_000), bytes(LIMIT)])
@pytest.mark.parametrize("chunk_bytes", [None, 1 << 16])
def test_replies_within_their_limit_come_whole(runtime, post, content, chunk_bytes):
    whole = runtime.reply("a", pack_content(content, chunk_bytes))
    assert fetch(post, "a", "b") == {"a": content}
    assert runtime.confirmed == [whole.id]
    assert len(runtime.pulled) == len(set(runtime.pulled))
    assert fetch(post, "a", "b") == {}


def test_one_byte_more_is_refused_before_any_of_it_is_fetched(runtime, post):
    packed = pack_content(noise(LIMIT + 1))
    whole = runtime.reply("a", packed)
    (failed,) = fetch(post, "a").values()
    assert failed.reason == (
        f"its reply has {LIMIT + 1} bytes, an answer to what it was asked at most {LIMIT}"
    )
    record = packed.children[0]
    above = {whole.id, packed.id, record.id, record.children[0].id}
    assert set(runtime.pulled) == above, "none of its pieces"
    assert runtime.confirmed == [whole.id], "the SuperLink may delete it"


def test_a_reply_far_beyond_its_limit_costs_no_memory_and_holds_up_nobody(runtime, post):
    runtime.reply("a", pack_content(noise(40 * MB)))
    runtime.reply("b", pack_content(noise(LIMIT)))
    fetch(post, "warm")
    with no_more_than(8 * LIMIT):  # the stand-in for a SuperLink is in this process, too
        got = fetch(post, "a", "b")
    assert got["a"].reason.startswith(f"its reply has {40 * MB} bytes")
    assert got["b"] == noise(LIMIT)


def test_a_piece_larger_than_announced_is_not_read(runtime, post):
    """The array says 1000 bytes, its only piece has 30 million."""
    piece = pack("ArrayChunk", noise(30 * MB))
    runtime.reply("a", around(array_of(1000, [piece], [0])))
    fetch(post, "warm")
    served: list[int] = []

    def count(answer: bytes) -> bytes:
        served.append(len(answer))
        return answer

    runtime.tamper["pull-object"] = count
    (failed,) = fetch(post, "a").values()
    assert max(served) > 30 * MB
    assert failed.reason == (f"part of its reply has {max(served)} bytes, 2152 are the most for it")


def test_a_body_without_an_end_is_cut_off(runtime, post):
    """No length is announced by the answer, and more comes than may come."""
    runtime.reply("a", pack_content(noise(1000)))
    sent: list[int] = []

    def endless(answer: bytes):
        def write(handler, stopping) -> None:
            handler.send_response(200)
            handler.send_header("Connection", "close")
            handler.end_headers()
            while not stopping.is_set() and sum(sent) < 200 * MB:
                handler.wfile.write(bytes(MB))
                sent.append(MB)

        return write

    runtime.tamper["pull-object"] = endless
    fetch(post, "warm")
    with no_more_than(12 * MB):
        (failed,) = fetch(post, "a").values()
    assert "bytes or more, 1049600 are the most for it" in failed.reason
    assert sum(sent) < 100 * MB


def test_a_piece_that_is_named_again_and_again(runtime, post):
    """Announced, it is too large; not announced, it does not fit."""
    piece = pack("ArrayChunk", noise(LIMIT // 2))
    runtime.reply("a", around(array_of(2000 * len(piece.body), [piece], [0] * 2000)))
    runtime.reply("b", around(array_of(LIMIT, [piece], [0] * 2000)))
    fetch(post, "warm")
    with no_more_than(8 * LIMIT):
        got = fetch(post, "a", "b")
    assert got["a"].reason.startswith(f"its reply has {1000 * LIMIT} bytes")
    assert "chunk" in got["b"].reason


def test_a_flood_of_small_pieces_is_refused_from_the_list_of_them(runtime, post):
    pieces = [pack("ArrayChunk", b"%5d" % i) for i in range(10_000)]
    runtime.reply("a", around(array_of(50_000, pieces, list(range(10_000)))))
    (failed,) = fetch(post, "a").values()
    assert failed.reason == ("its reply of 50000 bytes is in 10000 pieces, at most 76 are taken")
    assert len(runtime.pulled) == 4


def test_a_flood_of_names_is_cut_off(runtime, post):
    whole = runtime.reply("a", pack_content(b"x"))
    proto, tree = runtime.announced["a"]
    name = "0" * 64
    tree.children[0].children.extend([ObjectTree(object_id=name)] * 100_000)
    runtime.announced["a"] = (proto, tree)
    (failed,) = fetch(post, "a").values()
    assert failed.reason.startswith("the list of what its reply is made of is too long: part of")
    assert not runtime.pulled and whole.id not in runtime.confirmed


def test_what_is_packed_on_the_way_has_no_size(runtime, post):
    runtime.reply("a", pack_content(b"x"))

    def squeezed(answer: bytes):
        def write(handler, stopping) -> None:
            handler.send_response(200)
            handler.send_header("Content-Encoding", "gzip")
            handler.send_header("Content-Length", "3")
            handler.end_headers()
            handler.wfile.write(b"zip")

        return write

    runtime.tamper["pull-object"] = squeezed
    (failed,) = fetch(post, "a").values()
    assert failed.reason == "part of its reply came packed with gzip, its size is unknown"


def test_an_error_in_place_of_a_content(runtime, post):
    runtime.reply("a", None, Error(7, "no disk"))
    runtime.reply("b", None, Error(7, "n" * 500_000))
    got = fetch(post, "a", "b")
    assert got["a"] == Failed("Flower error 7: no disk")
    assert len(got["b"].reason) < 1100


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (pack("ConfigRecord", b"{}"), "children"),
        (around(pack("Array", b"[]")), "is described by a list"),
        (around(array_of(3, [pack("ArrayRecord", b"abc")], [0])), "is no ArrayChunk"),
        (around(array_of(3, [pack("ArrayChunk", b"ab")], [0])), "the chunks make 2 bytes"),
    ],
)
def test_what_is_not_a_reply_of_ours_is_one_nodes_trouble(runtime, post, content, why):
    runtime.reply("a", content)
    runtime.reply("b", pack_content(b"two"))
    got = fetch(post, "a", "b")
    assert why in got["a"].reason and got["b"] == b"two"


def test_a_reply_that_is_being_uploaded_is_asked_for_again_soon(runtime, post):
    runtime.reply("a", pack_content(b"here"))
    runtime.unavailable = dict.fromkeys(runtime.objects, 2)
    assert fetch(post, "a") == {"a": b"here"}


def test_a_reply_whose_sender_died_is_said_to_be_gone(runtime, post):
    whole = runtime.reply("a", pack_content(b"here"))
    (array,) = whole.children[0].children[0].children
    del runtime.objects[array.children[0].id]
    assert fetch(post, "a") == {"a": Failed("its sender did not upload the whole reply")}


def test_a_pull_that_nobody_waits_for_ends(runtime, post, monkeypatch):
    from fedlean.runtime.flower import post as post_module

    monkeypatch.setattr(post_module, "PULL_SECONDS", 0.2)
    monkeypatch.setattr(collecting, "LONGEST_WAIT_SECONDS", 0.02)
    runtime.reply("a", pack_content(b"here"))
    runtime.unavailable = dict.fromkeys(runtime.objects, 1_000_000)
    assert fetch(post, "a") == {}
    (pull,) = post._pulls.values()
    assert not pull.done(0.1)
    assert fetch(post, "b") == {}
    assert pull.done(10)
