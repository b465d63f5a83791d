"""Envelopes: there and back, and everything else is an EnvelopeError."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlean.runtime.remote import envelope as env
from fedlean.runtime.remote.envelope import Envelope, EnvelopeError, seal, unseal

HOLDING = {"input_shape": [1, 8, 8], "classes": ["a", "b"], "value_range": [0.0, 1.0]}
HELLO = {"run": "a1", **HOLDING, "refused": None}
RIGHT = {
    env.HELLO: HELLO,
    env.WELCOME: {
        "client": None,
        "num_examples": 7,
        "memory_bytes": 3,
        **HOLDING,
        "device": "f00d",
        "name": "board",
    },
    env.TASK: {
        "run": "a1",
        "method": "fedavg",
        "step": 3,
        "committed": None,
        "classes": ["a", "b"],
        "mean": [0.5],
        "std": [0.25],
        "deadline_seconds": 600.0,
        "memory_bytes": None,
    },
    env.UPDATE: {"step": 3, "seconds": 0.5, "lost_state": False},
    env.MEASURE: {"run": "a1"},
    env.MOMENTS: {"scale": 255.0, "count": 7, "totals": ["-0x1f"], "squares": ["0x0"]},
    env.TROUBLE: {
        "reason": "no disk",
        "missing": "spec",
        "final": False,
        "gave_up": False,
        "too_large": False,
    },
}


@pytest.mark.parametrize("kind", RIGHT)
@given(body=st.binary(max_size=64))
def test_there_and_back(kind, body):
    sealed = seal(Envelope(kind, RIGHT[kind], body))
    got = unseal(sealed, expected=(kind,))
    assert (got.kind, dict(got.fields), bytes(got.body)) == (kind, RIGHT[kind], body)


def test_size_by_hand():
    """12 bytes, a digest of 16, the JSON without spaces, the body."""
    fields = {"step": 3, "seconds": 0.5, "lost_state": False}
    sealed = seal(Envelope(env.UPDATE, fields, b"xyz"))
    assert len(sealed) == 12 + 16 + len('{"step":3,"seconds":0.5,"lost_state":false}') + 3
    assert sealed[:8] == b"FdLe\x07\x04\x00\x00"


@given(st.binary(max_size=80))
def test_noise_is_refused(data):
    with pytest.raises(EnvelopeError):
        unseal(data, expected=tuple(RIGHT))


@pytest.mark.parametrize("at", range(0, 60, 3))
def test_a_flipped_bit_is_found(at):
    sealed = bytearray(seal(Envelope(env.TASK, RIGHT[env.TASK], b"body" * 8)))
    sealed[at] ^= 4
    with pytest.raises(EnvelopeError):
        unseal(bytes(sealed), expected=(env.TASK,))


def test_a_truncated_one_is_found():
    sealed = seal(Envelope(env.TASK, RIGHT[env.TASK], b"body"))
    for end in range(len(sealed)):
        with pytest.raises(EnvelopeError):
            unseal(sealed[:end], expected=(env.TASK,))


def test_another_kind_is_named():
    with pytest.raises(EnvelopeError, match="expected task, got hello"):
        unseal(seal(Envelope(env.HELLO, HELLO)), expected=(env.TASK,))


def test_another_version_is_named():
    sealed = bytearray(seal(Envelope(env.HELLO, HELLO)))
    sealed[4] = 9
    with pytest.raises(EnvelopeError, match="envelope version 9, this side speaks 7"):
        unseal(bytes(sealed), expected=(env.HELLO,))


WRONG = [
    (env.HELLO, "run", "../../etc"),
    (env.HELLO, "run", ""),
    (env.HELLO, "run", "x" * 65),
    (env.HELLO, "run", "ä"),
    (env.WELCOME, "client", -1),
    (env.WELCOME, "client", True),
    (env.WELCOME, "num_examples", 1.5),
    (env.WELCOME, "memory_bytes", -1),
    (env.WELCOME, "input_shape", [1] * ((1 << 16) + 1)),
    (env.WELCOME, "name", "x" * 201),
    (env.WELCOME, "device", "x" * 201),
    (env.WELCOME, "classes", 3),
    (env.WELCOME, "classes", [3]),
    (env.WELCOME, "classes", ["x" * 201]),
    (env.WELCOME, "value_range", [0.0]),
    (env.WELCOME, "value_range", [1.0, 0.0]),
    (env.HELLO, "value_range", [0.0, 1e31]),
    (env.HELLO, "refused", "x" * 1001),
    (env.TASK, "classes", [None]),
    (env.TASK, "method", 5),
    (env.TASK, "step", 1 << 62),
    (env.TASK, "mean", ["0"]),
    (env.TASK, "std", [1e31]),
    (env.TASK, "deadline_seconds", 0),
    (env.TASK, "deadline_seconds", True),
    (env.TASK, "memory_bytes", -1),
    (env.UPDATE, "seconds", "1"),
    (env.UPDATE, "lost_state", 0),
    (env.TROUBLE, "missing", "everything"),
    (env.TROUBLE, "final", 1),
    (env.TROUBLE, "gave_up", None),
    (env.TROUBLE, "too_large", 1),
    (env.TROUBLE, "reason", None),
]


@pytest.mark.parametrize(("kind", "name", "value"), WRONG)
def test_fields_are_checked_by_name(kind, name, value):
    sealed = seal(Envelope(kind, {**RIGHT[kind], name: value}))
    with pytest.raises(EnvelopeError, match=name):
        unseal(sealed, expected=(kind,))


@pytest.mark.parametrize("kind", RIGHT)
def test_missing_and_added_fields_are_named(kind):
    name = next(iter(RIGHT[kind]))
    fewer = {key: value for key, value in RIGHT[kind].items() if key != name}
    for fields in (fewer, {**RIGHT[kind], "more": 1}):
        with pytest.raises(EnvelopeError, match=f"lack or add .*({name}|more)"):
            unseal(seal(Envelope(kind, fields)), expected=(kind,))


@pytest.mark.parametrize("text", [b"[1]", b"{", b"\xff\xfe", b'{"run": NaN}', b"null", b"[" * 5000])
def test_what_is_no_json_object_is_refused(text):
    start = struct.pack("<4sBBHI", b"FdLe", env.VERSION, env.HELLO, 0, len(text))
    sealed = start + env._digest(start, text) + text
    with pytest.raises(EnvelopeError):
        unseal(sealed, expected=(env.HELLO,))


def test_fields_that_are_too_long_are_not_sealed():
    with pytest.raises(EnvelopeError, match=f"limit is {1 << 20}"):
        seal(Envelope(env.TROUBLE, {"reason": "x" * (1 << 20), "missing": None, "final": True}))
    assert json.loads(json.dumps(RIGHT[env.TASK])) == RIGHT[env.TASK]
