"""Values of frozen tensors travel once, and whatever stands in their place is checked."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from fedlean.core import ClientTask, ClientUpdate, SubModel
from fedlean.layers import Linear
from fedlean.spec import sequential
from fedlean.tree import apply_mask, pack, read_only
from fedlean.wire import (
    NO_FROZEN,
    Known,
    UnknownFrozen,
    WireError,
    decode_task,
    decode_update,
    encode_task,
    encode_update,
    frozen,
    frozen_hash,
    frozen_hashes,
    frozen_params,
    pattern_hash,
    task_bytes,
    update_bytes,
)

FLAGS_AT, FROZEN, VALUES = 6, 4, 32
NAMES = frozenset({"conv.weight", "conv.bias", "norm.running_var"})


@pytest.fixture
def frozen_task(task: ClientTask) -> ClientTask:
    """18 kept weights of conv.weight, 4 values each of the others: 26."""
    params = apply_mask(task.params, task.sub_model.masks)
    return replace(task, params=params, sub_model=replace(task.sub_model, frozen=NAMES))


def key_of(task: ClientTask) -> str:
    return frozen_hash(frozen_params(task), task.sub_model.masks)


def known(task: ClientTask, *, frozen: bool = True, but: frozenset[str] = frozenset()) -> Known:
    patterns = frozenset({pattern_hash(task.sub_model.masks)})
    hashes = frozen_hashes(frozen_params(task), task.sub_model.masks) if frozen else {}
    held = frozenset(one for name, one in hashes.items() if name not in but)
    return Known(frozenset({task.spec.hash}), patterns, held)


def decoded(data: bytes, task: ClientTask, held: dict | None = None, **settings) -> ClientTask:
    masks = task.sub_model.masks
    patterns = {pattern_hash(masks): masks}
    return decode_task(data, {task.spec.hash: task.spec}, patterns, held or {}, **settings)


@pytest.mark.parametrize("value_dtype", ["fp32", "fp16", "int8"])
def test_the_second_message_lacks_their_bytes_exactly(frozen_task, value_dtype):
    """And they are exact whatever the others are rounded to."""
    sizes = []
    for holds in (False, True):
        one = known(frozen_task, frozen=holds)
        data = encode_task(frozen_task, one, value_dtype=value_dtype)
        assert len(data) == task_bytes(frozen_task, one, value_dtype=value_dtype)
        sizes.append(len(data))
        held = frozen_params(frozen_task) if holds else {}
        got = decoded(data, frozen_task, held)
        assert got.sub_model.frozen == NAMES
        for name in NAMES:
            assert got.params[name].tobytes() == frozen_task.params[name].tobytes()
    assert sizes[0] - sizes[1] == 1 + 4 * 26


def test_packed_and_dense_values_have_one_hash_and_one_message(frozen_task):
    masks = frozen_task.sub_model.masks
    packed = replace(frozen_task, params=pack(frozen_task.params, masks))
    assert key_of(packed) == key_of(frozen_task)
    assert encode_task(packed) == encode_task(frozen_task)
    data = encode_task(packed, known(packed))
    for held in (frozen_params(packed), frozen_params(frozen_task)):
        got = decoded(data, packed, held)
        assert got.params["conv.weight"].tobytes() == frozen_task.params["conv.weight"].tobytes()
        assert got.params["conv.weight"].shape == (4, 1, 3, 3)
    got = decoded(data, packed, frozen_params(packed), packed=True)
    assert got.params["conv.weight"].shape == (18,)


def test_the_hash_tells_names_values_and_masks_apart():
    a, b, mask = np.arange(4, dtype=np.float32), np.zeros(4, np.float32), np.arange(4) > 1
    turned = {"w": mask[::-1].copy()}
    hashes = [
        frozen_hash({}, {}),
        frozen_hash({"w": a}, {}),
        frozen_hash({"v": a}, {}),
        frozen_hash({"w": a.reshape(2, 2)}, {}),
        frozen_hash({"w": b}, {}),
        frozen_hash({"w": -b}, {}),  # -0 is not 0
        frozen_hash({"w": b}, {"w": mask}),
        frozen_hash({"w": b}, turned),
        frozen_hash({"w": a, "v": b}, {}),
    ]
    assert len(set(hashes)) == len(hashes) and hashes[0] == NO_FROZEN
    assert frozen_hash({"w": a, "v": b}, {"u": mask}) == frozen_hash({"v": b, "w": a}, {})


def test_changed_values_another_mask_and_other_names_travel(frozen_task):
    held, params = known(frozen_task), dict(frozen_task.params)
    once = task_bytes(frozen_task, held)
    params["conv.bias"] = params["conv.bias"] + np.float32(1)
    assert task_bytes(replace(frozen_task, params=params), held) == once + 1 + 4 * 4
    other = {"conv.weight": np.roll(frozen_task.sub_model.masks["conv.weight"], 1)}
    masks = {**frozen_task.sub_model.masks, **other}
    turned = replace(
        frozen_task,
        params=apply_mask(frozen_task.params, masks),
        sub_model=replace(frozen_task.sub_model, masks=masks),
    )
    patterns = held.patterns | {pattern_hash(masks)}
    assert task_bytes(turned, replace(held, patterns=patterns)) == once + 1 + 4 * 18
    fewer = replace(frozen_task.sub_model, frozen=NAMES - {"conv.bias"})
    # four values of conv.bias are no longer frozen, and travel as the others do
    assert task_bytes(replace(frozen_task, sub_model=fewer), held) == once + 4 * 4


@pytest.mark.parametrize("name", sorted(NAMES))
def test_what_is_lacked_travels_alone_and_joins_what_is_held(frozen_task, name):
    """A second stage's message has the values that the first one's had not."""
    one = known(frozen_task, but=frozenset({name}))
    data = encode_task(frozen_task, one)
    values = 18 if name == "conv.weight" else 4
    assert len(data) == task_bytes(frozen_task, one)
    assert len(data) == task_bytes(frozen_task, known(frozen_task)) + 1 + 4 * values
    held = {key: v for key, v in frozen_params(frozen_task).items() if key != name}
    got = decoded(data, frozen_task, held)
    for each in NAMES:
        assert got.params[each].tobytes() == frozen_task.params[each].tobytes()
    for wrong in ({}, {**held, min(held): held[min(held)] + np.float32(1)}):
        with pytest.raises(UnknownFrozen, match=key_of(frozen_task)):
            decoded(data, frozen_task, wrong)


def test_a_read_only_array_is_hashed_once(monkeypatch):
    """A writeable one may have changed; another name or mask is another hash."""
    count = []
    plain = frozen.packed_hash
    monkeypatch.setattr(frozen, "packed_hash", lambda *given: count.append(1) or plain(*given))
    value, mask = np.arange(4, dtype=np.float32), np.arange(4) > 1
    first = [frozen_hashes({"w": value}, {}) for _ in range(3)]
    assert len(count) == 3
    read_only({"w": value})
    assert [frozen_hashes({"w": value}, {}) for _ in range(3)] == first and len(count) == 4
    different = [frozen_hashes({"v": value}, {}), frozen_hashes({"w": value}, {"w": mask})]
    assert len(count) == 6 and len({str(one) for one in (*different, first[0])}) == 3
    assert frozen_hashes({"w": value.copy()}, {}) == first[0]
    again = [frozen_hashes({name: value}, {}) for name in "wvwv"]
    assert again == [first[0], different[0]] * 2 and len(count) == 7  # of the copy, and no other
    before = len(frozen._hashed)
    del value
    assert len(frozen._hashed) == before - 3


def test_frozen_tensors_without_values_need_none(frozen_task):
    bare = replace(frozen_task, params={})
    got = decoded(encode_task(bare, known(frozen_task)), bare)
    assert got.sub_model.frozen == NAMES and got.params == {}


def test_what_is_not_held_can_be_asked_for(frozen_task):
    data = encode_task(frozen_task, known(frozen_task))
    with pytest.raises(UnknownFrozen, match="frozen tensors with the hash") as caught:
        decoded(data, frozen_task)
    assert caught.value.hash == key_of(frozen_task)


def test_an_answer_has_nothing_frozen_in_it(frozen_task):
    update = ClientUpdate(5, 1, frozen_task.params, frozen_task.sub_model)
    trained = {n: v for n, v in frozen_task.params.items() if n not in NAMES}
    sent = encode_update(update, frozen_task)
    assert sent == encode_update(replace(update, params=trained), frozen_task)
    assert len(sent) == update_bytes(update, frozen_task)
    assert decode_update(sent, frozen_task).params.keys() == trained.keys()
    thawed = replace(frozen_task, sub_model=replace(frozen_task.sub_model, frozen=frozenset()))
    rogue = encode_update(replace(update, sub_model=thawed.sub_model), thawed)
    with pytest.raises(WireError, match=r"'conv\.bias' is frozen"):
        decode_update(rogue, frozen_task)


@pytest.mark.parametrize("changed", [np.zeros(3, np.float32), np.zeros(4), np.zeros(4, np.float32)])
def test_held_values_of_another_model_are_asked_for(frozen_task, changed):
    """Of another shape or kind, or other values under the same name."""
    data = encode_task(frozen_task, known(frozen_task))
    with pytest.raises(UnknownFrozen):
        decoded(data, frozen_task, {**frozen_params(frozen_task), "conv.bias": changed})


def test_held_values_are_not_read_beyond_the_limit():
    class Guarded(dict):
        def __getitem__(self, key):
            pytest.fail("read before there was room")

    spec = sequential((40,), [("fc", Linear(30, bias=False))])
    params = {"fc.weight": np.ones((30, 40), np.float32)}
    large = ClientTask(0, "", 0, 0, spec, params, SubModel(frozen=frozenset(params)), {})
    data, specs = encode_task(large, known(large)), {spec.hash: spec}
    with pytest.raises(WireError, match="would decode into 4800 bytes, over the limit"):
        decode_task(data, specs, {}, Guarded(params), limit_bytes=4799)
    got = decode_task(data, specs, {}, params, limit_bytes=4800)
    assert got.params["fc.weight"] is params["fc.weight"]


SPEC = sequential((4,), [("fc", Linear(3))])
SMALL = ClientTask(0, "", 0, 0, SPEC, {"fc.bias": np.array([1, 2, 3], np.float32)},
                   SubModel(frozen=frozenset({"fc.bias"})), {})  # fmt: skip
KNOWN_SPEC = Known(frozenset({SPEC.hash}))
# 80 of header, {} of JSON; names of the frozen, of those with values, 16 of hash; names that are
# sent, 12; names
HASH_AT, NAMES_AT = 84, 100


@pytest.mark.parametrize(
    ("at", "new", "why"),
    [
        (FLAGS_AT, bytes([VALUES]), "without that of frozen tensors"),
        (82, b"\0", "no tensor is named"),
        (82, b"\1", "padding bits"),
        (82, b"\x80", "values of tensors that are not frozen"),
        (83, b"\xc0", "values of tensors that are not frozen"),
        (83, b"\0", "frozen: 0 tensors with values have the hash"),
        (83, b"\x41", "padding bits"),
        (HASH_AT, b"\0" * 16, "frozen: 1 tensors with values have the hash 00"),
        (HASH_AT, b"\1" * 16, "the message says 01"),
        (NAMES_AT, b"\0", "none, or of tensors"),
        (NAMES_AT, b"\xc0", "none, or of tensors that are not frozen"),
        (NAMES_AT + 1, b"\0\0\0\0", "the values of the frozen have hash"),
        (NAMES_AT + 1, b"\0\0\xc0\x7f", "not finite"),
        (113, b"\x40", "'fc.bias' is frozen, its values have a section of their own"),
    ],
)
def test_hostile_frozen_sections(at, new, why):
    data = encode_task(SMALL, KNOWN_SPEC)
    assert decode_task(data, {SPEC.hash: SPEC}, {}).params["fc.bias"].tolist() == [1, 2, 3]
    assert data[FLAGS_AT] == FROZEN | VALUES and len(data) == 114
    with pytest.raises(WireError, match=re.escape(why)):
        decode_task(data[:at] + new + data[at + len(new) :], {SPEC.hash: SPEC}, {})
