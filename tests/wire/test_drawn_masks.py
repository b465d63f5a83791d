"""Random masks travel as seed and counts, and arrive bit for bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedlean.core import ClientTask, SubModel
from fedlean.layers import Conv2d, Flatten, Linear
from fedlean.models.lenet300 import lenet300
from fedlean.patterns.shuffled import shuffled_masks
from fedlean.spec import sequential
from fedlean.wire import Known, WireError, decode_task, encode_task, pattern_hash, task_bytes
from fedlean.wire.header import DRAWN, HEADER_BYTES

SPEC = lenet300((1, 28, 28), 10)
CNN = sequential(
    (1, 9, 9),
    [("conv", Conv2d(16, 3)), ("flat", Flatten()), ("fc", Linear(64)), ("out", Linear(9))],
)
COUNTS = {"fc1.weight": 20_000, "fc3.weight": 300}
FLAGS_AT = 6


def task(spec=SPEC, counts=COUNTS, seed: int = 7) -> ClientTask:
    sub_model = SubModel(masks=shuffled_masks(spec, counts, seed), mask_seed=seed)
    return ClientTask(1, "train", 0, 5, spec, {}, sub_model, {})


def plain(one: ClientTask) -> ClientTask:
    return replace(one, sub_model=replace(one.sub_model, mask_seed=None))


@pytest.mark.parametrize(
    ("spec", "counts"),
    [(SPEC, COUNTS), (CNN, {"conv.weight": 40, "fc.weight": 5000, "out.weight": 100})],
)
def test_seed_and_counts_arrive_as_the_masks(spec, counts):
    sent = task(spec, counts)
    known = Known(specs=frozenset({spec.hash}))
    data = encode_task(sent, known)
    assert len(data) == task_bytes(sent, known)
    got = decode_task(data, {spec.hash: spec}, {})
    assert pattern_hash(got.sub_model.masks) == pattern_hash(sent.sub_model.masks)
    # a byte of names, the seed and four bytes per tensor in place of a bit and more per weight
    assert len(data) < HEADER_BYTES + 40
    assert len(data) < len(encode_task(plain(sent), known)) / 2


def test_a_held_pattern_does_not_travel_at_all():
    sent = task()
    pattern = pattern_hash(sent.sub_model.masks)
    known = Known(frozenset({SPEC.hash}), frozenset({pattern}))
    assert len(encode_task(sent, known)) == len(encode_task(plain(sent), known))


def test_masks_that_are_shorter_than_their_recipe_go_as_they_are():
    spec = sequential((3,), [("fc", Linear(2)), ("out", Linear(2))])
    sent = task(spec, {"fc.weight": 3, "out.weight": 2})
    data = encode_task(sent)
    assert not data[FLAGS_AT] & DRAWN
    assert len(data) == task_bytes(sent)


def test_large_tensors_are_not_left_to_a_small_device_to_draw():
    spec = sequential((1025,), [("fc", Linear(1024)), ("out", Linear(2))])
    sent = task(spec, {"fc.weight": 9000, "out.weight": 100})
    assert not encode_task(sent)[FLAGS_AT] & DRAWN


def test_a_seed_that_does_not_make_the_masks_is_found():
    wrong = replace(task(), sub_model=replace(task().sub_model, mask_seed=8))
    with pytest.raises(WireError, match="the pattern received has hash"):
        decode_task(encode_task(wrong), {}, {})


def test_bad_seeds_counts_and_sizes_are_refused():
    with pytest.raises(WireError, match=r"mask_seed must be in \[0, 2\^64\), got -1"):
        encode_task(replace(task(), sub_model=replace(task().sub_model, mask_seed=-1)))
    data = encode_task(task(), Known(specs=frozenset({SPEC.hash})))
    held = {SPEC.hash: SPEC}
    with pytest.raises(WireError, match="seed and counts would decode into"):
        decode_task(data, held, {}, limit_bytes=1 << 20)
    at = data.index((20_000).to_bytes(4, "little"))
    broken = data[:at] + (1 << 31).to_bytes(4, "little") + data[at + 4 :]
    with pytest.raises(WireError, match="random masks: counts"):
        decode_task(broken, held, {})
    flagged = bytearray(encode_task(plain(task()), Known(frozenset({SPEC.hash}), ALL)))
    flagged[FLAGS_AT] |= DRAWN
    with pytest.raises(WireError, match="without that of a pattern"):
        decode_task(bytes(flagged), held, {})


ALL = frozenset({pattern_hash(task().sub_model.masks)})


def test_a_thousand_damaged_messages():
    """Each is refused, or the damage is in what no hash covers (round, client, seed)."""
    data = encode_task(task(CNN, {"conv.weight": 40, "fc.weight": 5000}))
    rng, refused = np.random.default_rng(0), 0
    for _ in range(1000):
        damaged = bytearray(data)
        damaged[int(rng.integers(len(data)))] ^= int(rng.integers(1, 256))
        try:
            got = decode_task(bytes(damaged), {}, {})
        except WireError:
            refused += 1
        else:
            assert pattern_hash(got.sub_model.masks) == pattern_hash(
                task(CNN, {"conv.weight": 40, "fc.weight": 5000}).sub_model.masks
            )
    assert refused > 900
