"""Codes of masks: sizes by hand, round trips, refusal of what is malformed."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlean.wire import WireError, pattern_hash, pattern_payload_bytes
from fedlean.wire.pattern import (
    decode_mask,
    encode_mask,
    mask_bytes,
)
from fedlean.wire.reader import Reader

LIMIT_BYTES = 1 << 26


def decoded(data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    reader = Reader(data, LIMIT_BYTES)
    mask = decode_mask(reader, shape, "w")
    reader.finish()
    return mask


def kept_at(n: int, *ids: int) -> np.ndarray:
    mask = np.zeros(n, bool)
    mask[list(ids)] = True
    return mask


@given(
    n=st.integers(0, 300),
    density=st.sampled_from([0.0, 0.005, 0.02, 0.1, 0.5, 0.99, 1.0]),
    seed=st.integers(0, 99),
)
def test_mask_round_trip(n: int, density: float, seed: int) -> None:
    mask = np.random.Generator(np.random.Philox(seed)).random((n, 7)) < density
    data = encode_mask(mask)
    got = decoded(data, mask.shape)
    assert len(data) == mask_bytes(mask)
    assert got.dtype == np.bool_ and np.array_equal(got, mask)


@given(st.lists(st.integers(0, (1 << 22) - 1), min_size=1, max_size=30))
def test_gaps_of_every_length_round_trip(ids: list[int]) -> None:
    """Gaps up to 2^22 take one to four bytes; a plain loop over LEB128 is the oracle."""
    mask = kept_at(1 << 22, *ids)
    body, before = b"", -1
    for i in sorted(set(ids)):
        gap, before = i - before - 1, i
        while gap >= 128:
            body, gap = body + bytes([gap & 127 | 128]), gap >> 7
        body += bytes([gap])
    assert encode_mask(mask) == b"\3" + len(body).to_bytes(4, "little") + body
    assert np.array_equal(decoded(encode_mask(mask), mask.shape), mask)


def test_blocks_split_inside_a_varint() -> None:
    """Gaps of 200 take 2 bytes and the first 1, so every block boundary (2^18) cuts one in two."""
    mask = np.zeros(60_000_000, bool)
    mask[3::201] = True
    data = encode_mask(mask)
    assert data[0] == 3 and len(data) == 1 + 4 + 2 * np.count_nonzero(mask) - 1
    assert np.array_equal(decoded(data, mask.shape), mask)


def test_sizes_by_hand() -> None:
    """n = 800: a bitmap is 100 bytes.

    All and none kept: the code alone, 1.
    Every other: 1 + 100, for 400 indices do not fit in 100 bytes.
    0, 10, 20, ... (80 kept): gaps 0, 9, 9, ...: one byte each, 1 + 4 + 80 = 85 < 101.
    0, 200, 400, 600: gaps 0, 199, 199, 199: 1 + 2 + 2 + 2 = 7, so 1 + 4 + 7 = 12.
    801 coordinates, every other: ceil(801 / 8) = 101, so 102.
    """
    at = np.arange(800)
    sizes = [mask_bytes(m) for m in (at >= 0, at < 0, at % 2 == 0, at % 10 == 0, at % 200 == 0)]
    assert sizes == [1, 1, 101, 85, 12]
    assert mask_bytes(np.arange(801) % 2 == 0) == 102


def test_bytes_by_hand() -> None:
    """1010 0000 01.. = a0 40.  Kept 2, 133 and 1000 of 2000: gaps 2, 130 = 82 01, 866 = e2 06."""
    assert encode_mask(kept_at(10, 0, 2, 9)) == bytes([2, 0xA0, 0x40])
    body = bytes([2, 0x82, 0x01, 0xE2, 0x06])
    assert encode_mask(kept_at(2000, 2, 133, 1000)) == b"\3\5\0\0\0" + body


@pytest.mark.parametrize(
    ("data", "n", "why"),
    [
        (b"", 8, "truncated"),
        (b"\7", 8, "unknown code 7"),
        (b"\4\1\0\0\0\0\0\0\0", 8, "unknown code 4"),
        (b"\2\xff", 16, "truncated"),
        (b"\2\xff\xff", 8, "trailing"),
        (b"\2\xff", 7, "padding"),
        (b"\3\xff\xff\xff\xff", 1 << 20, "bytes of indices"),
        (b"\3\4\0\0\0\0", 1000, "truncated"),
        (b"\3\0\0\0\0", 1000, "no index"),
        (b"\3\1\0\0\0\x80", 1000, "cut off"),
        (b"\3\2\0\0\0\1\x80", 1000, "cut off"),
        (b"\3\6\0\0\0\x80\x80\x80\x80\x80\1", 1000, "more than 5"),
        (b"\3\2\0\0\0\x81\0", 1000, "padded"),
        (b"\3\2\0\0\0\xe8\7", 1000, "index 1000 is beyond"),
        (b"\3\3\0\0\0\0\xe7\7", 1000, "index 1000 is beyond"),
        (b"\1", LIMIT_BYTES + 1, "over the limit"),
    ],
)
def test_malformed_masks(data: bytes, n: int, why: str) -> None:
    with pytest.raises(WireError, match=why):
        decoded(data, (n,))


def test_hash_names_a_pattern() -> None:
    a, b = np.array([[True, False]]), np.array([True])
    base = pattern_hash({"a": a, "b": b})
    assert base == pattern_hash({"b": b, "a": np.asfortranarray(a)})
    others = [{"a": ~a, "b": b}, {"a": a}, {"a": b, "b": a}, {"a": a.T, "b": b}, {}]
    assert len({base, *map(pattern_hash, others)}) == 6
    assert pattern_hash({}) == "0" * 32
    with pytest.raises(WireError, match="must be bool"):
        pattern_hash({"a": np.ones(3)})


def test_hash_follows_changes() -> None:
    """Only masks that nobody can change are remembered."""
    mask = np.array([True, False, True])
    before = pattern_hash({"a": mask})
    mask[1] = True
    after = pattern_hash({"a": mask})
    view = mask[:]
    view.flags.writeable = False  # the array behind it can change all the same
    assert pattern_hash({"a": view}) == after != before
    mask[1] = False
    assert pattern_hash({"a": view}) == before
    mask.flags.writeable = False
    assert [pattern_hash({"a": mask}) for _ in range(2)] == [before, before]
    assert pattern_hash({"a": mask, "b": mask}) != before


def test_pattern_payload_bytes_by_hand() -> None:
    """1 + 10 (bitmap of 80) + 1 (all kept); asked twice, the second from the cache."""
    masks = {"a": np.arange(80) % 2 == 0, "b": np.ones(9, bool)}
    assert [pattern_payload_bytes(masks), pattern_payload_bytes(masks)] == [12, 12]
    assert pattern_payload_bytes({}) == 0


@pytest.mark.parametrize("density", [0.5, 0.1, 0.01])
def test_a_large_mask_is_fast(density: float) -> None:
    """Conv-2's 6.5 M coordinates; some 30 ms on one core of 2020, so no loop over weights."""
    mask = np.random.Generator(np.random.Philox(1)).random(6_500_000) < density
    start = time.process_time()
    got = decoded(encode_mask(mask), mask.shape)
    assert time.process_time() - start < 0.5
    assert np.array_equal(got, mask)
