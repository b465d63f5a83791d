"""Masks as bytes: per tensor the smallest of four codes, and a hash by which both sides name them.

    code  0 ALL     nothing follows
          1 NONE    nothing follows
          2 BITMAP  ceil(n / 8) bytes, the first coordinate in the highest bit, padding zero
          3 DELTA   u32 length, then that many bytes of varints: the pruned coordinates before each
                    kept one, 7 bits a byte, lowest first, high bit = more follows

n is the number of coordinates, known from the tensor's shape.  Nothing here loops over weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np

from fedlean import tree
from fedlean.core import Masks
from fedlean.layers import Shape
from fedlean.tree import NO_PATTERN as NO_PATTERN
from fedlean.wire.errors import WireError
from fedlean.wire.reader import Reader

ALL, NONE, BITMAP, DELTA = range(4)
_MAX_VARINT_BYTES = 5  # 35 bits hold any gap in a tensor of at most 2^31 elements
_BLOCK_BYTES = 1 << 18
_MAX_SIZES = 256

# Pattern hash -> bytes.  A pure function's results, so the cache is never wrong; it is here because
# a simulation asks for the size of the same pattern once per client and round.
_sizes: dict[str, int] = {}


def pattern_hash(masks: Masks) -> str:
    """`fedlean.tree.pattern_hash`, the name under which both sides hold a pattern."""
    try:
        return tree.pattern_hash(masks)
    except ValueError as error:
        raise WireError(str(error)) from None


def pattern_payload_bytes(masks: Masks) -> int:
    """Bytes of the patterns alone: per tensor its code and body.

    Which tensors are masked takes another bit per tensor of the spec in the message.

    >>> pattern_payload_bytes({"a": np.arange(80) % 2 == 0, "b": np.ones(9, bool)})
    12
    """
    if not masks:
        return 0
    key = pattern_hash(masks)
    size = _sizes.get(key)
    if size is None:
        size = sum(map(mask_bytes, masks.values()))
        if len(_sizes) >= _MAX_SIZES:
            _sizes.clear()
        _sizes[key] = size
    return size


def check_masks(masks: Masks, shapes: Mapping[str, Shape]) -> None:
    """Raises WireError where a mask is no bool array of the shape that its tensor travels in."""
    for name, mask in masks.items():
        if name not in shapes:
            raise WireError(f"mask {name!r} names no tensor of the spec")
        if mask.dtype != np.bool_ or mask.shape != shapes[name]:
            raise WireError(
                f"mask {name!r} must be bool of shape {shapes[name]}, got {mask.dtype} of shape "
                f"{mask.shape}"
            )


def mask_bytes(mask: np.ndarray) -> int:
    """len(encode_mask(mask)), without building it."""
    code, gaps = _choose(mask)
    if code == BITMAP:
        return 1 + _bitmap_bytes(mask.size)
    return 1 + (4 + _varint_bytes(gaps) if gaps is not None else 0)


def encode_mask(mask: np.ndarray) -> bytes:
    """Code and body of one bool array of any shape, in C order."""
    code, gaps = _choose(mask)
    if code == BITMAP:
        return bytes([code]) + np.packbits(mask).tobytes()
    if gaps is None:
        return bytes([code])
    body = _encode_varints(gaps)
    return bytes([code]) + len(body).to_bytes(4, "little") + body


def decode_mask(reader: Reader, shape: Shape, name: str) -> np.ndarray:
    """The bool array of `shape` at the front of `reader`.  Raises WireError if malformed."""
    return _decode_body(reader, reader.byte(f"the pattern of {name!r}"), prod(shape), name).reshape(
        shape
    )


def _bitmap_bytes(n: int) -> int:
    return (n + 7) // 8


def _choose(mask: np.ndarray) -> tuple[int, np.ndarray | None]:
    """The code of the smallest form (ties: the earlier), and the gaps if it is DELTA."""
    n, kept = mask.size, tree.kept_count(mask)
    if kept == n:
        return ALL, None
    if kept == 0:
        return NONE, None
    # A varint takes at least a byte, so a denser mask need not be tried.
    if 4 + kept < _bitmap_bytes(n):
        gaps = _gaps(mask)
        if 4 + _varint_bytes(gaps) < _bitmap_bytes(n):
            return DELTA, gaps
    return BITMAP, None


def _gaps(mask: np.ndarray) -> np.ndarray:
    """Pruned coordinates before each kept one, int64 (K,)."""
    return np.diff(np.flatnonzero(mask), prepend=-1) - 1


def _varint_lengths(gaps: np.ndarray) -> np.ndarray:
    lengths = np.ones(gaps.size, np.int64)
    for k in range(1, _MAX_VARINT_BYTES):
        lengths += gaps >= 1 << (7 * k)
    return lengths


def _varint_bytes(gaps: np.ndarray) -> int:
    return int(_varint_lengths(gaps).sum())


def _encode_varints(gaps: np.ndarray) -> bytes:
    lengths = _varint_lengths(gaps)
    starts = np.cumsum(lengths) - lengths
    out = np.empty(int(lengths.sum()), np.uint8)
    for k in range(int(lengths.max())):
        has = lengths > k
        more = lengths[has] > k + 1
        out[starts[has] + k] = (gaps[has] >> (7 * k)) & 0x7F | more.astype(np.int64) << 7
    return out.tobytes()


def _decode_varints(raw: np.ndarray, n: int, what: str) -> np.ndarray:
    """bool (n,), True where the varints `raw`, uint8 (L,), say so.

    In blocks, because the arrays needed along the way are many times as long as `raw`.
    """
    mask = np.zeros(n, bool)
    at, last = 0, -1
    while at < raw.size:
        gaps, used = _decode_block(raw[at : at + _BLOCK_BYTES], what)
        kept = np.cumsum(gaps + 1) + last  # 2^18 gaps of 35 bits: no overflow
        last = int(kept[-1])
        if last >= n:
            raise WireError(f"{what}: index {last} is beyond {n} coordinates")
        mask[kept] = True
        at += used
    return mask


def _decode_block(raw: np.ndarray, what: str) -> tuple[np.ndarray, int]:
    """The gaps that end in `raw`, int64 (K,), and how many bytes they take."""
    ends = np.flatnonzero(raw < 0x80)
    lengths = np.diff(ends, prepend=-1)
    if not ends.size or lengths.max() > _MAX_VARINT_BYTES:
        raise WireError(f"{what}: an index is cut off or has more than {_MAX_VARINT_BYTES} bytes")
    if np.any((raw[ends] == 0) & (lengths > 1)):
        raise WireError(f"{what}: an index is padded")
    gaps = np.zeros(ends.size, np.int64)
    # From the last byte, which is the highest, to the first.
    for back in range(int(lengths.max())):
        has = lengths > back
        shifts = 7 * (lengths[has] - 1 - back)
        gaps[has] |= (raw[ends[has] - back].astype(np.int64) & 0x7F) << shifts
    return gaps, int(ends[-1]) + 1


def _decode_body(reader: Reader, code: int, n: int, name: str) -> np.ndarray:
    """bool (n,).  Bits and gaps are checked against n before the array is made."""
    what = f"the pattern of {name!r}"
    if code in (ALL, NONE):
        reader.reserve(n, what)
        return np.full(n, code == ALL)
    if code == BITMAP:
        raw = np.frombuffer(reader.take(_bitmap_bytes(n), what), np.uint8)
        if n % 8 and raw[-1] & (0xFF >> n % 8):
            raise WireError(f"{what}: padding bits are set")
        reader.reserve(n, what)
        return np.unpackbits(raw, count=n).view(np.bool_)
    if code == DELTA:
        length = reader.u32(what)
        if length > _bitmap_bytes(n):
            raise WireError(f"{what}: {length} bytes of indices for {n} coordinates")
        raw = np.frombuffer(reader.take(length, what), np.uint8)
        if not length:
            raise WireError(f"{what}: no index, which has a code of its own")
        reader.reserve(n, what)
        return _decode_varints(raw, n, what)
    raise WireError(f"{what}: unknown code {code}")
