"""The reply to a message: named by its hash, announced, and sent object by object."""

from __future__ import annotations

import time
from typing import Any

from fedlean.runtime.flower import objects
from fedlean.runtime.flower.calls import Calls
from fedlean.runtime.flower.channel import LinkError
from fedlean.runtime.flower.objects import Packed
from fedlean.runtime.flower.receiving import RUN_OVER, Incoming

_ANSWER_BYTES = 1 << 20  # names every object that is to be sent
_TRIES = 5


def reply(calls: Calls, incoming: Incoming, content: Packed | None, error: Any = None) -> None:
    """Sends content (packed by objects.pack_content) or flwr's Error.  Raises LinkError.

    Where its `retry` is False the reply is lost: the run is over, or it came too late.
    """
    message, whole = _message(calls, incoming, content, error)
    request = calls.protos.fleet.PushMessagesRequest(
        node=calls.protos.node.Node(node_id=incoming.dst_node_id),
        messages_list=[message],
        message_object_trees=[_tree(calls, whole)],
    )
    failures = calls.channel.failures
    try:
        for tried in range(_TRIES):
            answer = calls.ask(
                "push-messages", request, calls.protos.fleet.PushMessagesResponse, _ANSWER_BYTES
            )
            missing = set(answer.objects_to_push)
            if not missing and tried == 0 and failures == calls.channel.failures:
                raise LinkError(
                    "the SuperLink did not take the reply: too late, or there was one already",
                    retry=False,
                )
            wanted = [each for each in objects.in_order(whole) if each.id in missing]
            # One that is not stored: sent twice over a broken link, or the session ran out.
            if all(_store(calls, incoming, answer.session_id, each) for each in wanted):
                return
    except LinkError as refusal:
        if refusal.code != RUN_OVER:
            raise
        raise LinkError("the reply's run is over", retry=False, code=RUN_OVER) from None
    raise LinkError("the SuperLink would not store the reply's objects", retry=True)


def _message(
    calls: Calls, incoming: Incoming, content: Packed | None, error: Any
) -> tuple[Any, Packed]:
    """The reply as PushMessages takes it, without its content, and its tree of objects."""
    now = time.time() - calls.channel.clock_ahead_seconds  # by the SuperLink's clock
    ttl = incoming.created_at + incoming.ttl - now
    if ttl <= 0:
        raise LinkError(f"the reply is {-ttl:.0f} s too late", retry=False)
    about = calls.protos.message.Metadata(
        run_id=incoming.run_id,
        src_node_id=incoming.dst_node_id,
        dst_node_id=incoming.src_node_id,
        reply_to_message_id=incoming.message_id,
        group_id=incoming.group_id,
        ttl=ttl,
        message_type=incoming.message_type,
        created_at=now,
        src_task_id=incoming.dst_task_id,
        dst_task_id=incoming.src_task_id,
    )
    message = calls.protos.message.Message(metadata=about, error=error)
    body = message.SerializeToString(deterministic=True)
    whole = objects.pack("Message", body, () if content is None else (content,))
    message.metadata.message_id = whole.id
    if error is None:
        message.content.SetInParent()
    return message, whole


def _tree(calls: Calls, packed: Packed) -> Any:
    children = [_tree(calls, child) for child in packed.children]
    return calls.protos.message.ObjectTree(object_id=packed.id, children=children)


def _store(calls: Calls, incoming: Incoming, session: str, each: Packed) -> bool:
    protos = calls.protos.message
    request = protos.PushObjectRequest(
        node=calls.protos.node.Node(node_id=incoming.dst_node_id),
        run_id=incoming.run_id,
        object_id=each.id,
        session_id=session,
    )
    parts = (each.head, each.body)
    field = objects.bytes_field(protos.PushObjectRequest.OBJECT_CONTENT_FIELD_NUMBER, parts)
    return calls.ask("push-object", request, protos.PushObjectResponse, 64, field, *parts).stored
