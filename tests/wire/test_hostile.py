"""Hostile bytes give a WireError, nothing else, and no large allocation."""

import hashlib
import json
import re
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedlean.core import ClientTask, ClientUpdate, Statistic, SubModel, Work
from fedlean.layers import Linear
from fedlean.spec import sequential
from fedlean.wire import (
    Known,
    WireError,
    decode_task,
    decode_update,
    encode_task,
    encode_update,
    frozen_hashes,
    frozen_params,
    pattern_hash,
)

# Offsets in the header: magic 0, version 4, kind 5, flags 6, dtype 7, round 8, client 12, seed 20,
# examples 28, spec 36, pattern 52, JSON length 68, payload length 72; the JSON part is at 80.
SPEC_AT, PATTERN_AT, JSON_LENGTH_AT, PAYLOAD_LENGTH_AT, TEXT_AT = 36, 52, 68, 72, 80
PEAK_BYTES = 4 << 20


def patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def message(like: bytes, text: bytes, payload: bytes) -> bytes:
    """`like`'s header, with lengths that fit, before another text and payload."""
    return like[:JSON_LENGTH_AT] + struct.pack("<IQ", len(text), len(payload)) + text + payload


def split(data: bytes) -> tuple[bytes, bytes]:
    """JSON part and payload."""
    length = int.from_bytes(data[JSON_LENGTH_AT : JSON_LENGTH_AT + 4], "little")
    return data[TEXT_AT : TEXT_AT + length], data[TEXT_AT + length :]


def peak_bytes(decode: Callable[[], Any]) -> int:
    tracemalloc.start()
    try:
        decode()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def mutants(data: bytes, count: int, seed: int) -> list[bytes]:
    """Flipped, overwritten, cut, extended, and spliced with lengths made to fit."""
    rng = np.random.Generator(np.random.Philox(seed))
    out = [data[:n] for n in range(0, len(data), max(len(data) // 100, 1))]
    while len(out) < count:
        changed = bytearray(data)
        # Half of the changes before the arrays, where the structure is.
        reach = len(data) if rng.random() < 0.5 else min(len(data), 300)
        for at in rng.integers(0, reach, rng.integers(1, 4)):
            changed[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.integers(256), changed[at] ^ 1])
        if rng.random() < 0.2:
            changed += rng.bytes(int(rng.integers(1, 20)))
        if rng.random() < 0.2:
            at = int(rng.integers(TEXT_AT, len(changed)))
            del changed[at : at + int(rng.integers(1, 9))]
        mutant = bytes(changed)
        if rng.random() < 0.5:
            end = TEXT_AT + len(split(data)[0])
            mutant = message(mutant, mutant[TEXT_AT:end], mutant[end:])
        out.append(mutant)
    return out


def survivors(decode: Callable[[bytes], Any], hostile: list[bytes]) -> int:
    """How many decode; everything else must be a WireError, with a text that fits a log."""
    alive = 0
    for data in hostile:
        try:
            decode(data)
            alive += 1
        except WireError as error:
            assert len(str(error)) < 600
    return alive


def test_mutated_messages(task: ClientTask, update: ClientUpdate) -> None:
    """Thousands of mutants; flipped values and counts may pass, broken structure may not."""
    held = {task.spec.hash: task.spec}, {pattern_hash(task.sub_model.masks): task.sub_model.masks}
    known = Known(frozenset(held[0]), frozenset(held[1]))
    frozen = frozen_params(task)
    hashes = frozen_hashes(frozen, task.sub_model.masks)
    all_known = replace(known, frozen=frozenset(hashes.values()))
    cases: list[tuple[bytes, Callable[[bytes], Any]]] = [
        (encode_task(task), lambda data: decode_task(data, {}, {})),
        (encode_task(task, known), lambda data: decode_task(data, *held)),
        (encode_update(update, task), lambda data: decode_update(data, task)),
        (encode_task(task, all_known), lambda data: decode_task(data, *held, frozen)),
        (encode_task(task, known, value_dtype="int8"), lambda data: decode_task(data, *held)),
    ]
    for seed, (data, decode) in enumerate(cases):
        hostile = mutants(data, 1500, seed)

        def run(decode: Any = decode, hostile: Any = hostile) -> None:
            assert 0 < survivors(decode, hostile) < len(hostile)

        decode(data)
        assert peak_bytes(run) < PEAK_BYTES


def test_random_bytes(task: ClientTask) -> None:
    rng = np.random.Generator(np.random.Philox(3))
    good = encode_task(task)
    noise = [rng.bytes(int(rng.integers(0, 400))) for _ in range(1000)]
    after_header = [message(good, b"{}", rng.bytes(int(rng.integers(0, 400)))) for _ in range(1000)]
    assert survivors(lambda data: decode_task(data, {}, {}), noise + after_header) == 0


@pytest.mark.parametrize(
    ("at", "new", "why"),
    [
        (0, b"GET ", "starts with b'GET '"),
        (4, b"\1", "version 1, this side speaks 3"),
        (5, b"\2", "expected task, got update"),
        (5, b"\x09", "expected task, got kind 9"),
        (6, b"\xff", "unknown flags 0xff"),
        (7, b"\x03", "unknown value dtype 3"),
        (28, b"\1", "a task has no examples"),
        (SPEC_AT, b"\0" * 16, "the spec received has hash"),
        (PATTERN_AT, b"\0" * 16, "the pattern received has hash"),
        (JSON_LENGTH_AT, b"\xff" * 4, "truncated: the header announces"),
        (PAYLOAD_LENGTH_AT, b"\xff" * 8, "truncated: the header announces"),
        (PAYLOAD_LENGTH_AT, b"\0" * 8, "trailing bytes"),
    ],
)
def test_hostile_headers(task: ClientTask, at: int, new: bytes, why: str) -> None:
    data = patched(encode_task(task), at, new)

    def decode() -> None:
        with pytest.raises(WireError, match=re.escape(why)):
            decode_task(data, {}, {})

    assert peak_bytes(decode) < PEAK_BYTES


def test_limits(task: ClientTask) -> None:
    data = encode_task(task)
    with pytest.raises(WireError, match=f"{len(data)} bytes, the limit is 100"):
        decode_task(data, {}, {}, limit_bytes=100)
    # The parameters alone are 6024 bytes once decoded, the message is shorter.
    assert len(data) < 4000
    with pytest.raises(WireError, match="over the limit"):
        decode_task(data, {}, {}, limit_bytes=4000)
    oversized = message(data, b" " * (1 << 20) + b"{}", b"")
    with pytest.raises(WireError, match="the limit is 1048576"):
        decode_task(oversized, {}, {})


def test_one_byte_may_not_stand_for_gigabytes() -> None:
    """A layer of 2^31 weights, none kept: 4 bytes of pattern for 2 GiB of mask, 8 of zeros."""
    spec = sequential((1 << 16,), [("fc", Linear(1 << 15, bias=False))])
    text = spec.to_json().encode()
    small = encode_task(ClientTask(0, "", 0, 0, spec, {}, SubModel(), {}))
    for code in b"\0\1":
        payload = len(text).to_bytes(4, "little") + text + bytes([0x80, code, 0x80])
        data = patched(message(small, b"{}", payload), 6, b"\3")

        def decode(data: bytes = data) -> None:
            with pytest.raises(WireError, match="over the limit"):
                decode_task(data, {}, {})

        assert peak_bytes(decode) < PEAK_BYTES


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "nul",
        '{"a":1}',
        '{"phase":1}',
        '{"phase":null}',
        '{"hparams":[]}',
        '{"hparams":{"a":null}}',
        '{"hparams":{"a":[1]}}',
        '{"hparams":{"a":NaN}}',
        '{"hparams":{"a":-Infinity}}',
        '{"hparams":{"a":1e999}}',
        '{"hparams":{"a":1.0e0}}',
        '{"hparams":{"a":1,"a":1}}',
        '{"hparams": {}}',
        '{"hparams":{"a":9223372036854775808}}',
        '{"hparams":{"a":' + "9" * 5000 + "}}",
        '{"phase":"\\ud800"}',
        '{"phase":"\x00"}',
        '{"phase":' + "[" * 100_000 + "]" * 100_000 + "}",
        "[" * 500_000,
    ],
)
def test_hostile_json(task: ClientTask, text: str) -> None:
    plain = replace(task, sub_model=SubModel(), params={})
    good = encode_task(plain)
    decode_task(message(good, b"{}", split(good)[1]), {}, {})
    with pytest.raises(WireError):
        decode_task(message(good, text.encode(), split(good)[1]), {}, {})


def test_json_must_be_utf8(task: ClientTask) -> None:
    good = encode_task(task)
    with pytest.raises(WireError):
        decode_task(message(good, b'{"phase":"\xff"}', split(good)[1]), {}, {})


@pytest.mark.parametrize(
    "document",
    [
        {"statistics": {"s": "mean"}},
        {"statistics": {"s": ["keep", {}]}},
        {"statistics": {"s": [["mean"], {}]}},
        {"statistics": {"s": ["mean", {"no.such": None}]}},
        {"statistics": {"s": ["mean", {"x": ["f2", [1]]}]}},
        {"statistics": {"s": ["mean", {"x": ["O", [1]]}]}},
        {"statistics": {"s": ["mean", {"x": ["f4", [1, -1]]}]}},
        {"work": [[1]] * 257},
        {"statistics": {"s": ["mean", {"x": ["f4", [True]]}]}},
        {"statistics": {"s": ["mean", {"x": ["f4", [1.5]]}]}},
        {"statistics": {"s": ["mean", {"x": ["f4", [1 << 40]]}]}},
        {"statistics": {"s": ["mean", {"x": ["f4", [1 << 30]]}]}},
        {"statistics": {"s": ["mean", {"x": ["b1", [1 << 30]]}]}},
        {"statistics": {"s": ["mean", {"x": ["f4", [0, 1 << 62, 1 << 62]]}]}},
        {"statistics": {"s": ["mean", {"x": ["f4", [1] * 100]}]}},
        {"metrics": {"loss": "low"}},
        {"metrics": {"loss": True}},
        {"metrics": {"loss": 1 << 70}},
        {"work": {}},
        {"work": [{}]},
        {"work": [[-1]]},
        {"work": [[1.0]]},
        {"work": [[1] * 9]},
        {"work": [[1, {}, 1]]},
        {"work": [[1, {"no.such": 1}]]},
        {"work": [[1, {"fc.weight": 1 << 70}]]},
        {"work": [[1, ["", ""]]]},
        {"work": [[1, ["conv"]]]},
        {"work": [[1, ["conv", 1]]]},
        {"work": [[1, ["conv", "fc", "no such"]]]},
        {"work": [[1, ["conv", "fc", ""]]]},
        {"work": [[1, ["", "", 1]]]},
        {"work": [[1, ["no such", ""]]]},
        {"work": [[1, ["conv", ""], 2]]},
        {"work": [[1, {}, ["conv", ""]]]},
        {"work": [[1, ["conv", ""], ["conv", ""]]]},
        {"phase": "train"},
    ],
)
def test_hostile_update_fields(task: ClientTask, document: dict[str, Any]) -> None:
    good = encode_update(ClientUpdate(5, 1, {}, task.sub_model), task)
    text = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()

    def decode() -> None:
        with pytest.raises(WireError):
            # "None kept", for the boolean statistic; the others find too few bytes.
            decode_update(message(good, text, b"\0\1"), task)

    assert peak_bytes(decode) < PEAK_BYTES


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d | {"input_shape": [1] * 9},
        lambda d: d | {"input_shape": "abc"},
        lambda d: d | {"input_shape": [0]},
        lambda d: d | {"nodes": {}},
        lambda d: d | {"nodes": [7]},
        lambda d: d | {"extra": 1},
        lambda d: with_layer(d, layer="Pickle"),
        lambda d: with_layer(d, layer=["Linear"]),
        lambda d: with_layer(d, out_features=1 << 40),
        lambda d: with_layer(d, out_features=10**4000),
        lambda d: with_layer(d, out_features=2.5),
        lambda d: with_layer(d, name="\ud800"),
        lambda d: with_layer(d, inputs=None),
        lambda d: with_pool(d, kernel_size=2, stride=0.5, padding=0),
        lambda d: with_pool(d, kernel_size=2, stride=1e308, padding=0),
        lambda d: with_pool(d, kernel_size=2, stride=10**400, padding=0.25),
        lambda d: with_pool(d, kernel_size=2, stride=float("nan"), padding=0),
        lambda d: with_pool(d, kernel_size=10**30, stride=1, padding=float("inf")),
    ],
)
def test_hostile_specs(change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Each with the hash that its own text has, so that only its content speaks against it."""
    spec = sequential((4,), [("fc", Linear(3))])
    good = encode_task(ClientTask(0, "", 0, 0, spec, {}, SubModel(), {}))
    document = change(json.loads(spec.to_json()))
    text = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    payload = len(text).to_bytes(4, "little") + text + b"\0"
    claimed = hashlib.blake2b(text, digest_size=16).digest()
    data = patched(message(good, b"{}", payload), SPEC_AT, claimed)

    def decode() -> None:
        with pytest.raises(WireError):
            decode_task(data, {}, {})

    assert peak_bytes(decode) < PEAK_BYTES


def with_layer(document: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return document | {"nodes": [document["nodes"][0] | changes]}


def with_pool(document: dict[str, Any], **attributes: Any) -> dict[str, Any]:
    node = {"name": "p", "layer": "MaxPool2d", "inputs": ["input"], "block": "", "prunable": True}
    return {"input_shape": [1, 8, 8], "nodes": [node | attributes]}


def test_nonfinite_values(task: ClientTask) -> None:
    for bad in (np.nan, np.inf):
        params = {"fc.bias": np.full(10, bad, np.float32)}
        data = encode_task(replace(task, params=params))
        with pytest.raises(WireError, match=r"'fc\.bias' holds values that are not finite"):
            decode_task(data, {}, {})
        got = decode_task(data, {}, {}, allow_nonfinite=True)
        assert np.array_equal(got.params["fc.bias"], params["fc.bias"], equal_nan=True)
    statistic = {"s": Statistic({"x": np.array([np.nan])}, "sum")}
    data = encode_update(ClientUpdate(5, 1, {}, task.sub_model, statistic), task)
    with pytest.raises(WireError, match="not finite"):
        decode_update(data, task)


@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0, 3e38])
def test_int8_scales(task: ClientTask, scale: float) -> None:
    """3e38 is a number, 127 times that is none."""
    only = replace(task, params={"conv.bias": np.ones(4, np.float32)}, sub_model=SubModel())
    data = encode_task(only, value_dtype="int8")
    data = data[:-8] + struct.pack("<f", scale) + data[-4:]
    with pytest.raises(WireError, match=r"scale|finite"):
        decode_task(data, {}, {})


def test_padding_of_names() -> None:
    """fc.weight and fc.bias take two of the eight bits."""
    spec = sequential((4,), [("fc", Linear(3))])
    data = encode_task(ClientTask(0, "", 0, 0, spec, {}, SubModel(), {}))
    with pytest.raises(WireError, match="padding bits"):
        decode_task(data[:-1] + b"\x01", {}, {})


@pytest.mark.parametrize("field", ["round", "client", "seed", "spec"])
def test_an_update_answers_its_own_task(task: ClientTask, field: str) -> None:
    data = encode_update(ClientUpdate(5, 1, {}, task.sub_model), task)
    other = sequential((4,), [("fc", Linear(3))]) if field == "spec" else 99
    with pytest.raises(WireError, match=f"answers {field}"):
        decode_update(data, replace(task, **{field: other}))


def test_held_pattern_of_another_model(task: ClientTask) -> None:
    """Held under the hash that is asked for, but its shapes do not fit the model."""
    key = pattern_hash(task.sub_model.masks)
    data = encode_task(task, Known(patterns=frozenset({key})))
    with pytest.raises(WireError, match="must be bool of shape"):
        decode_task(data, {}, {key: {"fc.weight": np.ones(3, bool)}})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"params": {"no.such": np.ones(1, np.float32)}}, "no tensor"),
        ({"params": {"fc.bias": np.ones(10)}}, "must be float32"),
        ({"params": {"fc.bias": np.ones(9, np.float32)}}, "shape"),
        ({"sub_model": SubModel({"fc.bias": np.ones(9, bool)})}, "must be bool of shape"),
        ({"sub_model": SubModel({"fc.bias": np.ones(10)})}, "must be bool"),
        ({"sub_model": SubModel({"no.such": np.ones(9, bool)})}, "no tensor"),
        ({"sub_model": SubModel(frozen=frozenset({"no.such"}))}, "no tensor"),
        ({"hparams": {"lr": float("nan")}}, "must be finite"),
        ({"hparams": {"lr": np.float32(1)}}, "must be a number"),
        ({"hparams": {"lr": None}}, "must be a number"),
        ({"phase": "\ud800"}, "surrogates"),
        ({"phase": "x" * (1 << 20)}, "the limit is"),
        ({"round": -1}, "unsigned"),
        ({"seed": 1 << 64}, "unsigned"),
    ],
)
def test_what_cannot_travel_is_refused_by_name(
    task: ClientTask, change: dict[str, Any], why: str
) -> None:
    base = {"params": {}, "sub_model": SubModel()}
    with pytest.raises(WireError, match=why):
        encode_task(replace(task, **(base | change)))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"client": 6}, "cannot answer"),
        ({"num_examples": -1}, "unsigned"),
        ({"metrics": {"loss": float("inf")}}, "must be finite"),
        ({"statistics": {"s": Statistic({"x": np.ones(2, np.complex64)}, "sum")}}, "complex64"),
        ({"statistics": {"s": Statistic({}, "keep")}}, "unknown reduction"),  # type: ignore[arg-type]
        ({"work": (Work(steps=-1),)}, "work.steps must be a count"),
        ({"work": (Work(kept={"no.such": 1}),)}, "no tensor"),
        ({"work": (Work(begin="no such"),)}, "work.begin: 'no such' names no layer"),
        ({"work": (Work(end="no such"),)}, "work.end: 'no such' names no layer"),
        ({"work": (Work(taps=("no such",)),)}, "work.taps: 'no such' names no layer"),
        ({"work": (Work(beside=-1),)}, "work.beside must be a count"),
        ({"work": (Work(width=1.5),)}, "work.width must be between 0 and 1, got 1.5"),
        ({"work": (Work(width=-0.5),)}, "work.width must be between 0 and 1, got -0.5"),
    ],
)
def test_what_cannot_be_answered(task: ClientTask, change: dict[str, Any], why: str) -> None:
    update = replace(ClientUpdate(5, 1, {}, task.sub_model), **change)
    with pytest.raises(WireError, match=why):
        encode_update(update, task)


def test_unknown_value_dtype(task: ClientTask) -> None:
    with pytest.raises(WireError, match="unknown value_dtype 'bf16'"):
        encode_task(task, value_dtype="bf16")  # type: ignore[arg-type]
