"""Run as its own process: our objects beside those of flwr's own classes."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

from fedlean.runtime.flower import objects, replying
from fedlean.runtime.flower.protobufs import protobufs
from fedlean.runtime.flower.receiving import described

PROTOS = protobufs()
assert "flwr" not in sys.modules and "flwr.common" not in sys.modules

from flwr.app import Array, ArrayRecord, Error, Message, RecordDict  # noqa: E402
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE  # noqa: E402
from flwr.common.serde import message_from_proto, message_to_proto  # noqa: E402
from flwr.supercore.inflatable.inflatable_object import (  # noqa: E402
    get_all_nested_objects,
    get_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import (  # noqa: E402
    inflate_object_from_contents,
    validate_object_content,
)
from flwr.supercore.task_identity import TaskIdentity  # noqa: E402

CHUNK = FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
CHANNEL = SimpleNamespace(clock_ahead_seconds=0.0)
CALLS: Any = SimpleNamespace(protos=PROTOS, channel=CHANNEL)


def theirs(content: bytes) -> RecordDict:
    array = Array("uint8", (len(content),), "fedlean", content)
    return RecordDict({"fedlean": ArrayRecord({"message": array})})


def ours(packed: objects.Packed) -> dict[str, bytes]:
    return {each.id: each.head + bytes(each.body) for each in objects.in_order(packed)}


def check(content: bytes) -> None:
    packed = objects.pack_content(content, CHUNK)
    expected = {
        name: each.deflate() for name, each in get_all_nested_objects(theirs(content)).items()
    }
    assert ours(packed) == expected and list(ours(packed)) == list(expected)
    for each in expected.values():
        validate_object_content(each)
    back: Any = inflate_object_from_contents(packed.id, ours(packed))
    array = back["fedlean"]["message"]
    assert (array.dtype, array.shape, array.stype) == ("uint8", (len(content),), "fedlean")
    assert array.data == content
    check_messages(content, packed)


def check_messages(content: bytes, packed: objects.Packed) -> None:
    sent = Message(theirs(content), dst_node_id=9, message_type="train", group_id="4")
    sent.metadata.__dict__["_message_id"] = sent.object_id
    tree = get_object_tree(sent)
    name = objects.array_name(tree)
    stored = {name: each.deflate() for name, each in get_all_nested_objects(sent).items()}
    layout = objects.open_array(memoryview(stored[name]), name)
    buffer = bytearray(layout.length_bytes)
    objects.fill(memoryview(buffer), layout, lambda name, most: memoryview(stored[name]))
    assert buffer == content

    incoming = described(message_to_proto(sent).metadata)
    for reply_content, error in ((packed, None), (None, PROTOS.error.Error(code=2, reason="r"))):
        proto, whole = replying._message(CALLS, incoming, reply_content, error)
        assert replying._tree(CALLS, whole).object_id == whole.id == proto.metadata.message_id
        reply = message_from_proto(proto)
        if error is None:
            assert reply.has_content()
            reply.content = theirs(content)
            model = Message(theirs(content), reply_to=sent)
        else:
            model = Message(Error(2, "r"), reply_to=sent)
        assert reply.object_id == whole.id
        assert replying._tree(CALLS, whole) == get_object_tree(reply)
        assert stable(reply) == stable(model)
        assert abs(reply.metadata.ttl - model.metadata.ttl) < 5


def stable(message: Message) -> dict[str, Any]:
    about = vars(message.metadata)
    return {
        name: about[name] for name in about if name not in ("_created_at", "_ttl", "_message_id")
    }


TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 5, 1, 6
NOISE = bytes((each * each) % 251 for each in range(3 * CHUNK + 5))
for length in (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5):
    check(NOISE[:length])
    check(bytes(length))
