"""One envelope as the content of a Flower message: one Array, since each costs round trips.

The Array is of our own serialisation type, which Flower carries end to end without looking into it.
"""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, RecordDict

RECORD, ARRAY, STYPE = "fedlean", "message", "fedlean"


class NotOurs(ValueError):
    """The content is no FedLean message."""


def to_record(envelope: bytes) -> RecordDict:
    """The content of a message."""
    array = Array("uint8", (len(envelope),), STYPE, envelope)
    return RecordDict({RECORD: ArrayRecord({ARRAY: array})})


def from_record(content: RecordDict) -> bytes:
    """The envelope.  Raises NotOurs naming what the content is instead."""
    if list(content) != [RECORD] or not isinstance(content[RECORD], ArrayRecord):
        raise NotOurs(f"expected one ArrayRecord {RECORD!r}, got {sorted(map(str, content))[:5]}")
    record = content.array_records[RECORD]
    if list(record) != [ARRAY]:
        raise NotOurs(f"expected one Array {ARRAY!r}, got {sorted(map(str, record))[:5]}")
    array = record[ARRAY]
    if array.stype != STYPE or array.dtype != "uint8" or array.shape != (len(array.data),):
        raise NotOurs(f"expected {STYPE!r} bytes, got {array.stype!r} {array.dtype} {array.shape}")
    return array.data
