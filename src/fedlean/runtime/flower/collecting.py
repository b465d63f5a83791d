"""A reply from a SuperLink, refused by its announced size before it is in memory.

Flower's `pull_messages` fetches whatever a node has sent and holds it several times over before
anybody can look at it.  So the objects of a reply are asked for here, one after the other: first
the array, which says how long the content is and of which pieces, then the pieces, each into its
place.  Every answer is cut off at what it may have.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import httpx
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest

from fedlean.runtime.flower import objects
from fedlean.runtime.flower.channel import delays
from fedlean.runtime.flower.objects import NotOurs, ObjectError
from fedlean.runtime.remote.exchange import Failed, too_large

Reply = tuple[str, bytes | Failed]

MESSAGE_BYTES = 1 << 22  # of the answer that announces a reply, with the names of its objects
STRUCTURE_BYTES = 1 << 20  # of an object that names others: the array and what holds it
OVERHEAD_BYTES = 1 << 10  # of the protobuf around an object
MAX_REASON = 1000  # characters of an error
PIECE_BYTES = 1 << 12  # that a reply's pieces have on the average, at least
FEW_PIECES = 64  # may be as small as they like
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.25, 1.0  # for what is still being uploaded
STALLED_SECONDS = 300.0  # without the next object; a SuperLink forgets such a reply after 180
SETTLE_SECONDS = 2.0  # for the rest of a refused reply, so that an honest node's upload ends well

_most_bytes: ContextVar[int | None] = ContextVar("_most_bytes", default=None)  # of an answer


class TooLarge(ValueError):
    """An answer has more bytes than were asked for."""


class Gone(ValueError):
    """An object will not come: its sender died, was too slow, or nobody waits any more."""


class Collector:
    """The replies of one run, over the HTTP client that its Grid has.

    stop: whether nobody waits for the reply any more.
    """

    def __init__(self, grid: Any, http: httpx.Client):
        self._grid, self._client = grid, grid._runtime_client
        if _cut_off not in http.event_hooks["response"]:
            http.event_hooks["response"].append(_cut_off)
        http.headers["accept-encoding"] = "identity"  # a size that is announced is then the size

    def collect(self, asked: str, limit_bytes: int, stop: Callable[[], bool]) -> Iterator[Reply]:
        """What answers the message `asked`: nothing where there is no reply yet.

        Raises what the connection raises; what is wrong with a reply alone is `Failed`.
        """
        try:
            with _at_most(MESSAGE_BYTES):
                answer = self._client.PullMessages(PullAppMessagesRequest(message_ids=[asked]))
        except TooLarge as error:
            yield asked, Failed(f"the list of what its reply is made of is too long: {error}")
            return
        pairs = zip(answer.messages_list, answer.message_object_trees, strict=True)
        for message, tree in pairs:
            content = self._content(message, tree, limit_bytes, stop)
            yield message.metadata.reply_to_message_id, content
            del content  # before the next is fetched

    def _content(
        self, message: Any, tree: Any, limit_bytes: int, stop: Callable[[], bool]
    ) -> bytes | Failed:
        name, seconds = message.metadata.message_id, STALLED_SECONDS
        above = [tree]  # what is uploaded last
        content: bytes | Failed
        try:
            if tree.object_id != name:
                raise ObjectError("its objects are those of another message")
            if message.HasField("error"):
                error = message.error
                content = failed(error)
            else:
                array = objects.array_name(tree)
                above = [tree.children[0].children[0], tree.children[0], tree]
                content = self._joined(array, limit_bytes, stop)
        except (NotOurs, ObjectError, TooLarge, Gone) as error:
            content, seconds = Failed(str(error)), SETTLE_SECONDS
        # A SuperLink takes no more of a message that is confirmed, and its sender would fail.
        for each in above:
            with suppress(TooLarge, Gone):
                self._object(each.object_id, STRUCTURE_BYTES, stop, seconds)
        self._confirm(name)
        return content

    def _joined(self, array: str, limit_bytes: int, stop: Callable[[], bool]) -> bytes:
        layout = objects.open_array(self._object(array, STRUCTURE_BYTES, stop), array)
        if layout.length_bytes > limit_bytes:
            raise TooLarge(too_large(layout.length_bytes, limit_bytes))
        pieces, most = len(set(layout.chunks)), FEW_PIECES + layout.length_bytes // PIECE_BYTES
        if pieces > most:
            raise TooLarge(
                f"its reply of {layout.length_bytes} bytes is in {pieces} pieces, at most {most} "
                "are taken"
            )
        # A BytesIO gives its bytes out without a copy: the content is in memory once.
        store = io.BytesIO(bytes(layout.length_bytes))
        with store.getbuffer() as buffer:
            objects.fill(buffer, layout, lambda name, most: self._object(name, most, stop))
        return store.getvalue()

    def _object(
        self,
        name: str,
        limit_bytes: int,
        stop: Callable[[], bool],
        seconds: float = STALLED_SECONDS,
    ) -> memoryview:
        """At most limit_bytes.  Waits for `seconds` until the SuperLink has it."""
        request = PullObjectRequest(
            node=self._grid.node, run_id=self._grid.run.run_id, object_id=name
        )
        ends, waits = time.monotonic() + seconds, delays(FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS)
        while True:
            with _at_most(limit_bytes + OVERHEAD_BYTES):
                answer = self._client.PullObject(request)
            if not answer.object_found:
                raise Gone("its sender did not upload the whole reply")
            if answer.object_available:
                return memoryview(answer.object_content)
            if stop() or time.monotonic() >= ends:
                raise Gone(f"its sender uploaded nothing more of the reply for {seconds:g} s")
            time.sleep(next(waits))

    def _confirm(self, name: str) -> None:
        """Lets the SuperLink delete the reply's objects, be they refused or taken."""
        request = ConfirmMessageReceivedRequest(
            node=self._grid.node, run_id=self._grid.run.run_id, message_object_id=name
        )
        self._client.ConfirmMessageReceived(request)


def failed(error: Any) -> Failed:
    """Of a message that carries an error in place of a content."""
    return Failed(f"Flower error {error.code}: {error.reason[:MAX_REASON] or 'no reason given'}")


def collector_of(grid: Any) -> Collector | None:
    """None for a Grid without a SuperLink behind it, as in Flower's simulation."""
    http = getattr(getattr(grid, "_runtime_client", None), "_client", None)
    return Collector(grid, http) if isinstance(http, httpx.Client) else None


@contextmanager
def _at_most(most_bytes: int) -> Iterator[None]:
    """Of the body of every answer that comes within."""
    token = _most_bytes.set(most_bytes)
    try:
        yield
    finally:
        _most_bytes.reset(token)


def _cut_off(response: httpx.Response) -> None:
    """Called once an answer's head is here.  Raises TooLarge, then or while its body is read."""
    most_bytes = _most_bytes.get()
    if most_bytes is None:
        return
    encoding = response.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise TooLarge(f"part of its reply came packed with {encoding[:20]}, its size is unknown")
    announced = response.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > most_bytes:
        raise TooLarge(f"part of its reply has {announced} bytes, {most_bytes} are the most for it")
    if isinstance(response.stream, httpx.SyncByteStream):
        response.stream = _Cut(response.stream, most_bytes)


class _Cut(httpx.SyncByteStream):
    """A body without the end that it should not have."""

    def __init__(self, whole: httpx.SyncByteStream, most_bytes: int):
        self._whole, self._most_bytes = whole, most_bytes

    def __iter__(self) -> Iterator[bytes]:
        taken = 0
        for part in self._whole:
            taken += len(part)
            if taken > self._most_bytes:
                raise TooLarge(
                    f"part of its reply has {taken} bytes or more, {self._most_bytes} are the most "
                    "for it"
                )
            yield part

    def close(self) -> None:
        self._whole.close()
