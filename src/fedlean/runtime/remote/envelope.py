"""What surrounds a task or an update on its way: who asks for what, in one piece of bytes.

    magic "FdLe" · version u8 · kind u8 · 2 zero bytes · u32 length of the JSON part ·
    BLAKE2b (16 bytes) of all the rest · JSON · body

The body is a message of `fedlean.wire`, or nothing.  Everything is checked before it is used, and
nothing is allocated by a length that the message itself claims.  The digest finds damage, not
malice: that is TLS's and the nodes' keys' business.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedlean.data.labels import MAX_NAME_CHARACTERS

MAGIC = b"FdLe"
VERSION = 7
HELLO, WELCOME, TASK, UPDATE, TROUBLE, MEASURE, MOMENTS = range(1, 8)
KINDS = {HELLO: "hello", WELCOME: "welcome", TASK: "task", UPDATE: "update", TROUBLE: "trouble"}
KINDS |= {MEASURE: "measure", MOMENTS: "moments"}
MISSING = ("spec", "pattern", "frozen tensors")  # what a device may have lost
MAX_JSON_BYTES = 1 << 20  # class names take most of it
MAX_LIST = 1 << 16
_HEXADECIMAL = re.compile(r"-?0x[0-9a-f]{1,180}")
_START = struct.Struct("<4sBBHI")
_DIGEST_BYTES = 16
_HEAD_BYTES = _START.size + _DIGEST_BYTES


class EnvelopeError(ValueError):
    """The bytes are no envelope; the message says what was expected."""


@dataclass(frozen=True)
class Envelope:
    """`fields` by kind:

    HELLO    run; what it expects: input_shape, classes, value_range; refused (why, or null)
    WELCOME  client (or null), num_examples, memory_bytes (that a task may take, or null), name,
             device (who it is, across restarts: a secret of its own, and before a space what may be
             shown); what it holds: input_shape, classes, value_range
    TASK     run, method, step, committed (step whose client state counts, or null), classes, mean,
             std, deadline_seconds (for which the server waits, from sending on), memory_bytes (that
             the server takes the device to have, by which layers take their forms, or null)
    UPDATE   step, seconds, lost_state
    MEASURE  run: what do your examples add up to?
    MOMENTS  scale (the stored value that counts as 1.0), count (of values in a channel), totals and
             squares per channel (`fedlean.data.moments`, as hexadecimal numbers)
    TROUBLE  reason, missing (one of `MISSING` or null), final (asking again is of no use), gave_up
             (the time was over before the work was done), too_large (for the device's memory)
    """

    kind: int
    fields: Mapping[str, Any] = field(default_factory=dict)
    body: bytes | memoryview = b""


def seal(envelope: Envelope) -> bytes:
    """Raises EnvelopeError when the fields are too long to be read."""
    text = json.dumps(dict(envelope.fields), allow_nan=False, separators=(",", ":")).encode()
    if len(text) > MAX_JSON_BYTES:
        raise EnvelopeError(f"fields take {len(text)} bytes, the limit is {MAX_JSON_BYTES}")
    start = _START.pack(MAGIC, VERSION, envelope.kind, 0, len(text))
    return b"".join([start, _digest(start, text, envelope.body), text, envelope.body])


def unseal(data: bytes | memoryview, *, expected: tuple[int, ...]) -> Envelope:
    """The envelope in `data`; its body is a view, not a copy.  Raises EnvelopeError."""
    view = memoryview(data)
    if len(view) < _HEAD_BYTES:
        raise EnvelopeError(f"{len(view)} bytes, an envelope has at least {_HEAD_BYTES}")
    magic, version, kind, zero, length = _START.unpack(view[: _START.size])
    if magic != MAGIC:
        raise EnvelopeError(f"not a FedLean envelope: it starts with {bytes(magic)!r}")
    if version != VERSION or zero:
        raise EnvelopeError(f"envelope version {version}, this side speaks {VERSION}: update one")
    if kind not in expected:
        names = " or ".join(KINDS[one] for one in expected)
        raise EnvelopeError(f"expected {names}, got {KINDS.get(kind, f'kind {kind}')}")
    if length > MAX_JSON_BYTES or length > len(view) - _HEAD_BYTES:
        raise EnvelopeError(f"fields of {length} bytes in an envelope of {len(view)}")
    if view[_START.size : _HEAD_BYTES] != _digest(view[: _START.size], view[_HEAD_BYTES:]):
        raise EnvelopeError("damaged on the way: its digest is another")
    end = _HEAD_BYTES + length
    return Envelope(kind, _fields(bytes(view[_HEAD_BYTES:end]), kind), view[end:])


def _digest(*parts: bytes | memoryview) -> bytes:
    hashed = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for part in parts:
        hashed.update(part)
    return hashed.digest()


def _fields(text: bytes, kind: int) -> dict[str, Any]:
    try:
        fields = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise EnvelopeError(f"fields are not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise EnvelopeError(f"fields are a {type(fields).__name__}, expected an object")
    wanted = _WANTED[kind]
    if fields.keys() != wanted.keys():
        odd = sorted(fields.keys() ^ wanted.keys())
        raise EnvelopeError(f"fields of a {KINDS[kind]} lack or add {', '.join(odd)[:200]}")
    for name, is_right in wanted.items():
        if not is_right(fields[name]):
            raise EnvelopeError(f"{name} of a {KINDS[kind]} is {str(fields[name])[:80]!r}")
    return fields


def _text(limit: int) -> Any:
    return lambda value: isinstance(value, str) and len(value) <= limit


def _run(value: Any) -> bool:
    """It names a folder on the device."""
    return isinstance(value, str) and 1 <= len(value) <= 64 and value.isascii() and value.isalnum()


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _maybe(check: Any) -> Any:
    return lambda value: value is None or check(value)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _list_of(check: Any) -> Any:
    return lambda value: (
        isinstance(value, list) and len(value) <= MAX_LIST and all(map(check, value))
    )


def _whole(value: Any) -> bool:
    """Hexadecimal digits, perhaps of a negative number; no sum of float32 needs more."""
    return isinstance(value, str) and bool(_HEXADECIMAL.fullmatch(value))


def _range(value: Any) -> bool:
    return _list_of(_number)(value) and len(value) == 2 and value[0] <= value[1]


_HOLDING: dict[str, Any] = {
    "input_shape": _list_of(_count),
    "classes": _list_of(_text(MAX_NAME_CHARACTERS)),
    "value_range": _range,
}
_WANTED: dict[int, dict[str, Any]] = {
    HELLO: {"run": _run, **_HOLDING, "refused": _maybe(_text(1000))},
    WELCOME: {
        "client": _maybe(_count),
        "num_examples": _count,
        "memory_bytes": _maybe(_count),
        **_HOLDING,
        "device": _text(200),
        "name": _text(200),
    },
    TASK: {
        "run": _run,
        "method": _text(200),
        "step": _count,
        "committed": _maybe(_count),
        "classes": _list_of(_text(MAX_NAME_CHARACTERS)),
        "mean": _list_of(_number),
        "std": _list_of(_number),
        "deadline_seconds": _positive,
        "memory_bytes": _maybe(_count),
    },
    MEASURE: {"run": _run},
    MOMENTS: {
        "scale": _positive,
        "count": _count,
        "totals": _list_of(_whole),
        "squares": _list_of(_whole),
    },
    UPDATE: {"step": _count, "seconds": _number, "lost_state": lambda v: isinstance(v, bool)},
    TROUBLE: {
        "reason": _text(2000),
        "missing": lambda value: value in (None, *MISSING),
        "final": lambda value: isinstance(value, bool),
        "gave_up": lambda value: isinstance(value, bool),
        "too_large": lambda value: isinstance(value, bool),
    },
}
