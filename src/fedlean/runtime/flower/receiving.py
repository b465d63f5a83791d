"""A message for this node: its objects fetched, checked and put together."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass
from typing import Any

from fedlean.runtime.flower import objects
from fedlean.runtime.flower.calls import Calls
from fedlean.runtime.flower.channel import LinkError, delays
from fedlean.runtime.flower.objects import NotOurs, ObjectError

RUN_OVER = 2007  # flwr's ApiErrorCode
_STRUCTURE_BYTES = 1 << 20  # of an object that names others: the array and what holds it
_OVERHEAD_BYTES = 1 << 10  # of the protobuf around an object
UPLOAD_SECONDS = 300.0  # that the server may take to upload a message that it has announced
_PATIENCE_SECONDS = 10.0  # without the next object, after which other messages have their turn


@dataclass(frozen=True)
class Incoming:
    """A message for this node.  `content`: the bytes of its one array."""

    message_id: str
    run_id: int
    src_node_id: int
    dst_node_id: int
    group_id: str  # the round, where the server says so
    message_type: str
    created_at: float  # seconds since 1970, by the server's clock
    ttl: float  # seconds from then on in which a reply is taken
    src_task_id: int | None
    dst_task_id: int | None
    content: bytes


class Late(Exception):
    """An object has not been uploaded yet: its sender is slow, or died.  To be tried again."""


class Gone(Exception):
    """The message needs no reply any more: its run is over, or the SuperLink dropped it."""


def described(about: Any) -> Incoming:
    """A message's Metadata, without its content."""
    return Incoming(
        message_id=about.message_id,
        run_id=about.run_id,
        src_node_id=about.src_node_id,
        dst_node_id=about.dst_node_id,
        group_id=about.group_id,
        message_type=about.message_type,
        created_at=about.created_at,
        ttl=about.ttl,
        src_task_id=about.src_task_id if about.HasField("src_task_id") else None,
        dst_task_id=about.dst_task_id if about.HasField("dst_task_id") else None,
        content=b"",
    )


def receive(calls: Calls, incoming: Incoming, tree: Any, limit_bytes: int) -> bytes:
    """The message's content, of at most limit_bytes, which the SuperLink may then forget.

    tree: the message's ObjectTree.  Raises NotOurs, ObjectError, LinkError, Gone or Late.
    """
    try:
        content = _content(calls, incoming, tree, limit_bytes)
        # The server uploads them last, and breaks where the message is confirmed before.
        for above in (tree.children[0].children[0], tree.children[0], tree):
            _object(calls, incoming, above.object_id, _STRUCTURE_BYTES)
        _confirm(calls, incoming)
        return content
    except LinkError as error:
        if error.code == RUN_OVER:
            raise Gone("its run is over") from None
        raise


def is_over(calls: Calls, incoming: Incoming) -> bool:
    """Whether the message's run is known to have ended: nothing of it is given out any more."""
    request = calls.protos.message.PullObjectRequest(
        node=calls.protos.node.Node(node_id=incoming.dst_node_id),
        run_id=incoming.run_id,
        object_id=incoming.message_id,
    )
    try:
        calls.raw("pull-object", request, limit_bytes=_STRUCTURE_BYTES + _OVERHEAD_BYTES)
    except LinkError as error:
        return error.code == RUN_OVER
    return False


def _content(calls: Calls, incoming: Incoming, tree: Any, limit_bytes: int) -> bytes:
    if tree.object_id != incoming.message_id:
        raise ObjectError("its objects are those of another message")
    name = objects.array_name(tree)
    layout = objects.open_array(_object(calls, incoming, name, _STRUCTURE_BYTES), name)
    if layout.length_bytes > limit_bytes:
        raise NotOurs(
            f"it has {layout.length_bytes} bytes, and this node takes at most {limit_bytes}"
        )
    # A BytesIO gives its bytes out without a copy: the content is in memory once.
    store = io.BytesIO(bytes(layout.length_bytes))
    with store.getbuffer() as buffer:
        objects.fill(buffer, layout, lambda name, most: _object(calls, incoming, name, most))
    return store.getvalue()


def _object(calls: Calls, incoming: Incoming, name: str, limit_bytes: int) -> memoryview:
    """At most limit_bytes, good until the next call.  Waits until the SuperLink has it."""
    request = calls.protos.message.PullObjectRequest(
        node=calls.protos.node.Node(node_id=incoming.dst_node_id),
        run_id=incoming.run_id,
        object_id=name,
    )
    limit_bytes += _OVERHEAD_BYTES
    end, waits = time.monotonic() + _PATIENCE_SECONDS, delays(0.1, 0.5)
    while True:
        raw = calls.raw("pull-object", request, limit_bytes=limit_bytes)
        found, available, content = objects.open_pulled(raw)
        if not found:
            raise Gone("the SuperLink does not hold it any more")
        if available:
            return content
        if time.monotonic() >= end:
            raise Late(f"object {name[:8]} was not uploaded within {UPLOAD_SECONDS:.0f} s")
        time.sleep(next(waits))


def _confirm(calls: Calls, incoming: Incoming) -> None:
    """Lets the SuperLink delete the message's objects."""
    request = calls.protos.message.ConfirmMessageReceivedRequest(
        node=calls.protos.node.Node(node_id=incoming.dst_node_id),
        run_id=incoming.run_id,
        message_object_id=incoming.message_id,
    )
    calls.raw("confirm-message-received", request)
