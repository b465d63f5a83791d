"""Flower's object format, as far as one message of ours needs it.

An object is a head `TYPE CHILD,CHILD LENGTH`, a zero byte and LENGTH bytes of body; its name is the
SHA-256 of all that.  Ours is one tree: Message > RecordDict "fedlean" > ArrayRecord > Array
"message" > ArrayChunks, whose bodies in order are the content.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, TypeGuard

Buffer = bytes | bytearray | memoryview

RECORD, ARRAY, DTYPE, STYPE = "fedlean", "message", "uint8", "fedlean"
# A SuperLink forgets a reply of which it stored no object for 180 s, and what a broken link
# interrupts is sent again from the object's beginning: small enough for a slow uplink.  But every
# object costs requests at both ends: 26 MB in 25 objects take half as long again as in 7.
CHUNK_BYTES = 1 << 20
CHUNKS = 8  # of a large content, at most
HEAD_BYTES = 128  # of an ArrayChunk, at most
_ID = re.compile("[0-9a-f]{64}")


class ObjectError(ValueError):
    """Bytes that are not the object that was asked for, or no object at all."""


class NotOurs(ValueError):
    """A sound message that does not hold one array of ours."""


@dataclass(frozen=True)
class Packed:
    """An object to be sent.  Its bytes are head + body; the body is not a copy."""

    id: str
    head: bytes
    body: Buffer
    children: tuple[Packed, ...]


@dataclass(frozen=True)
class Layout:
    """What the content is made of: chunk names in order (a name twice is the same bytes twice)."""

    length_bytes: int
    chunks: tuple[str, ...]


def pack(kind: str, body: Buffer, children: tuple[Packed, ...] = ()) -> Packed:
    head = f"{kind} {','.join(child.id for child in children)} {len(body)}\0".encode()
    name = sha256(head)
    name.update(body)
    return Packed(name.hexdigest(), head, body, children)


def pack_content(content: Buffer, chunk_bytes: int | None = None) -> Packed:
    """The RecordDict of one message; its chunks are views of `content`."""
    view = memoryview(content)
    chunk_bytes = chunk_bytes or max(CHUNK_BYTES, -(-len(view) // CHUNKS))
    starts = range(0, len(view), chunk_bytes)
    chunks = [pack("ArrayChunk", view[start : start + chunk_bytes]) for start in starts]
    distinct = tuple({chunk.id: chunk for chunk in chunks}.values())
    place = {chunk.id: index for index, chunk in enumerate(distinct)}
    description = {
        "dtype": DTYPE,
        "shape": [len(view)],
        "stype": STYPE,
        "arraychunk_ids": [place[chunk.id] for chunk in chunks],
    }
    array = pack("Array", json.dumps(description).encode(), distinct)
    record = _named("ArrayRecord", ARRAY, array)
    return _named("RecordDict", RECORD, record)


def _named(kind: str, name: str, child: Packed) -> Packed:
    return pack(kind, json.dumps({name: child.id}).encode(), (child,))


def in_order(packed: Packed) -> list[Packed]:
    """Every object of a tree once, children before parents."""
    found: dict[str, Packed] = {}
    _visit(packed, found)
    return list(found.values())


def _visit(one: Packed, found: dict[str, Packed]) -> None:
    # No closure: one that calls itself is a cycle, which keeps a whole model until it is collected.
    for child in one.children:
        _visit(child, found)
    found.setdefault(one.id, one)


def array_name(tree: Any) -> str:
    """Of the one array in a received message's ObjectTree.  Raises NotOurs.

    The records above the array hold names alone, so their own names follow from the array's and
    need not be fetched.
    """
    records = _only_child(tree)
    record = _only_child(records)
    array = _only_child(record)
    if not _ID.fullmatch(array.object_id):
        raise NotOurs(f"an object's name is a SHA-256 in hex, got {array.object_id[:80]!r}")
    leaf = Packed(array.object_id, b"", b"", ())
    expected = _named("ArrayRecord", ARRAY, leaf)
    if (record.object_id, records.object_id) != (
        expected.id,
        _named("RecordDict", RECORD, expected).id,
    ):
        raise NotOurs(f"its content is not a record {RECORD!r} with an array {ARRAY!r}")
    return array.object_id


def _only_child(tree: Any) -> Any:
    if len(tree.children) != 1:
        raise NotOurs(
            f"expected one array {ARRAY!r} in one ArrayRecord {RECORD!r}, got an object with "
            f"{len(tree.children)} children"
        )
    return tree.children[0]


def open_array(raw: memoryview, name: str) -> Layout:
    """Raises ObjectError for a corrupt object, NotOurs for an array that is not ours."""
    children, body = _open(raw, name, "Array", len(raw))
    try:
        described = json.loads(bytes(body))
    except (ValueError, RecursionError):
        raise ObjectError(f"the array {name[:8]} is not described in JSON") from None
    if not isinstance(described, dict):
        raise ObjectError(f"the array {name[:8]} is described by a {type(described).__name__}")
    if (described.get("dtype"), described.get("stype")) != (DTYPE, STYPE):
        raise NotOurs(
            f"expected an array of {DTYPE} in serialisation {STYPE!r}, got "
            f"{str(described.get('dtype'))[:40]!r} in {str(described.get('stype'))[:40]!r}"
        )
    shape, places = described.get("shape"), described.get("arraychunk_ids")
    if not _naturals(shape) or len(shape) != 1:
        raise NotOurs(f"expected an array of one dimension, got the shape {str(shape)[:80]}")
    if not _naturals(places) or any(place >= len(children) for place in places):
        raise ObjectError(f"the array {name[:8]} names chunks that it does not have")
    return Layout(shape[0], tuple(children[place] for place in places))


def _naturals(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(each) is int and each >= 0 for each in values)


def open_chunk(raw: memoryview, name: str) -> memoryview:
    """Its body, a view of `raw`.  Raises ObjectError."""
    return _open(raw, name, "ArrayChunk", HEAD_BYTES)[1]


def _open(raw: memoryview, name: str, kind: str, head_bytes: int) -> tuple[list[str], memoryview]:
    if (got := sha256(raw).hexdigest()) != name:
        raise ObjectError(f"object {name[:8]} came with the hash {got[:8]}: corrupted on its way")
    head, zero, _ = bytes(raw[:head_bytes]).partition(b"\0")
    parts = head.decode("latin-1").split(" ")
    if not zero or len(parts) != 3 or parts[0] != kind:
        raise ObjectError(f"object {name[:8]} is no {kind}: it starts with {head[:40]!r}")
    children = parts[1].split(",") if parts[1] else []
    if not all(_ID.fullmatch(child) for child in children):
        raise ObjectError(f"object {name[:8]} has a child whose name is no SHA-256")
    body = raw[len(head) + 1 :]
    if parts[2] != str(len(body)):
        raise ObjectError(f"object {name[:8]} announces {parts[2][:20]} bytes and has {len(body)}")
    return children, body


def fill(buffer: memoryview, layout: Layout, pull: Callable[[str, int], memoryview]) -> None:
    """Copies every chunk to its place in `buffer` (layout.length_bytes).  Raises ObjectError.

    `pull(name, at most so many bytes)` fetches an object; each is fetched once.
    """
    seen: dict[str, slice] = {}
    at = 0
    for name in layout.chunks:
        body = (
            buffer[seen[name]]
            if name in seen
            else open_chunk(pull(name, len(buffer) - at + HEAD_BYTES), name)
        )
        place = slice(at, at + len(body))
        if not len(body) or place.stop > len(buffer):
            raise ObjectError(f"chunk {name[:8]} of {len(body)} bytes at {at} of {len(buffer)}")
        buffer[place] = body
        seen.setdefault(name, place)
        at = place.stop
    if at != len(buffer):
        raise ObjectError(f"the chunks make {at} bytes, the array announces {len(buffer)}")


def open_pulled(raw: memoryview) -> tuple[bool, bool, memoryview]:
    """A PullObjectResponse: found, available, content as a view of `raw`.  Raises ObjectError.

    Read here and not by protobuf, which would copy the content twice.
    """
    found = available = False
    content = raw[:0]
    for number, value in _fields(raw):
        if number == 1:
            found = bool(value)
        elif number == 2:
            available = bool(value)
        elif number == 3 and isinstance(value, memoryview):
            content = value
    return found, available, content


def _fields(raw: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Field number and value of a protobuf message's varint (wire type 0) and bytes (2) fields."""
    at = 0
    while at < len(raw):
        tag, at = _varint(raw, at)
        value, at = _varint(raw, at)
        if tag & 7 == 0:
            yield tag >> 3, value
        elif tag & 7 == 2 and value <= len(raw) - at:
            yield tag >> 3, raw[at : at + value]
            at += value
        else:
            raise ObjectError("not the answer to a pull: no such protobuf field")


def _varint(raw: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        if at >= len(raw):
            break
        value |= (raw[at] & 0x7F) << shift
        at += 1
        if raw[at - 1] < 0x80:
            return value, at
    raise ObjectError("not the answer to a pull: a protobuf number without an end")


def bytes_field(number: int, parts: Sequence[Buffer]) -> bytes:
    """What goes before `parts` to make them one bytes field of a protobuf message."""
    out, rest = bytearray([number << 3 | 2]), sum(len(part) for part in parts)
    while rest > 0x7F:
        out.append(rest & 0x7F | 0x80)
        rest >>= 7
    out.append(rest)
    return bytes(out)
