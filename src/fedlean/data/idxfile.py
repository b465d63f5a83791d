"""One IDX file of unsigned bytes, plain or .gz, read with every size checked before it is used.

Big endian: magic (0, 0, 8 = unsigned byte, number of dimensions), one uint32 per dimension, data.
A .gz is inflated to the size that the header claims and not one byte further than it takes to see
that there is more; `gzip.open` would read ahead.
"""

# n examples, k rows of a block

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from fedlean.data.source import rows_at_once

UNSIGNED_BYTE = 8
CHUNK_BYTES = 1 << 16
MAX_DEFLATE_RATIO = 1032  # deflate cannot shrink further: a larger claim is false


class _Reader(Protocol):
    def read(self, count: int, /) -> bytes: ...  # up to `count` bytes; b"" only at the end


class _Inflater:
    """The plain bytes of one gzip member, inflated only as far as they are asked for.

    `read` raises ValueError when the member is damaged or ends early, or when something follows.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._zlib = zlib.decompressobj(wbits=31)  # 31: gzip framing, checksum verified
        self._input = b""

    def read(self, count: int, /) -> bytes:
        while not self._zlib.eof:
            try:
                out = self._zlib.decompress(self._input, count)
            except zlib.error as error:
                raise ValueError(f"the gzip stream is damaged ({error})") from error
            self._input = self._zlib.unconsumed_tail
            if out:
                return out
            if not self._input and not self._zlib.eof:
                self._input = self._file.read(CHUNK_BYTES)
                if not self._input:
                    raise ValueError("the gzip stream ends early")
        if self._zlib.unused_data or self._file.read(1):
            raise ValueError("something follows the gzip stream")
        return b""


def idx_shape(path: Path, *, dimensions: int, count: int | None = None) -> tuple[int, ...]:
    """What the header claims: (n,) for labels, (n, H, W) for images.

    count: how many examples it must hold, where that is known.  Raises ValueError naming the file,
    what it has and what was expected; also when a file of this size cannot hold as much.
    """
    with _opened(path) as reader:
        return _read_shape(reader, path, dimensions, count)


def idx_blocks(path: Path, *, dimensions: int, count: int | None = None) -> Iterator[np.ndarray]:
    """The data, uint8 (k, ...), a few rows at a time.  Raises ValueError as `idx_shape`."""
    with _opened(path) as reader:
        shape = _read_shape(reader, path, dimensions, count)
        row, expected = shape[1:], prod(shape)
        at_once = rows_at_once(prod(row)) * prod(row)
        for start in range(0, expected, at_once):
            data = _read_up_to(reader, min(at_once, expected - start))
            if len(data) < min(at_once, expected - start):
                raise ValueError(
                    f"got {start + len(data)} bytes of data, expected {expected} (shape {shape}):"
                    " it is truncated"
                )
            yield np.frombuffer(data, np.uint8).reshape(-1, *row)
        if reader.read(1):
            raise ValueError(f"got more than the {expected} bytes of data of shape {shape}")


def read_idx(path: Path, *, dimensions: int, count: int | None = None) -> np.ndarray:
    """All the data, uint8 of the shape that the header claims.  Raises ValueError as above."""
    return np.concatenate(list(idx_blocks(path, dimensions=dimensions, count=count)))


@contextmanager
def _opened(path: Path) -> Iterator[_Reader]:
    with path.open("rb") as file:
        try:
            yield _Inflater(file) if path.suffix == ".gz" else file
        except ValueError as error:
            raise ValueError(f"{path}: {error}; fetch the file again") from error


def _read_shape(reader: _Reader, path: Path, dimensions: int, count: int | None) -> tuple[int, ...]:
    header_bytes = 4 + 4 * dimensions
    header = _read_up_to(reader, header_bytes)
    magic = int.from_bytes(header[:4], "big")
    expected = (UNSIGNED_BYTE << 8) + dimensions
    if len(header) >= 4 and magic != expected:
        kind = "images" if dimensions == 3 else "labels"
        raise ValueError(f"got magic number {magic}, expected {expected} (IDX {kind}, bytes)")
    if len(header) < header_bytes:
        raise ValueError(f"got {len(header)} bytes, expected an IDX header of {header_bytes}")
    shape = struct.unpack(f">{dimensions}I", header[4:])
    if 0 in shape:
        raise ValueError(f"the header claims shape {shape}, expected at least 1 of each")
    if count is not None and shape[0] != count:
        raise ValueError(f"the header claims {shape[0]} images, expected {count} as in the labels")
    file_bytes = path.stat().st_size
    packed = path.suffix == ".gz"
    limit = file_bytes * MAX_DEFLATE_RATIO if packed else file_bytes - header_bytes
    if prod(shape) > limit:
        raise ValueError(
            f"the header claims shape {shape}, {prod(shape)} bytes of data, but a file of this"
            f" size holds at most {max(limit, 0)}: it is truncated"
        )
    return shape


def _read_up_to(reader: _Reader, count: int) -> bytes:
    """`count` bytes, or fewer where they end before."""
    pieces, missing = [], count
    while missing and (piece := reader.read(min(CHUNK_BYTES, missing))):
        pieces.append(piece)
        missing -= len(piece)
    return b"".join(pieces)
