"""Reading arrays of .npz and .npy files, with every size checked before it is allocated.

`np.load` believes the shape in each array's header and allocates it.  Here the header must agree
with the archive's directory, and the directory with what deflate can pack into the file; of an .npy
file it must agree with the file's size.  Objects are never unpickled.
"""

# k rows of a block

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from fedlean.data.source import rows_at_once

CHUNK_BYTES = 1 << 16
MAX_DEFLATE_RATIO = 1032  # deflate cannot shrink further: a larger claim is false
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError)


@dataclass(frozen=True)
class Member:
    """One array of the file, as its header describes it; of an .npy file `name` is the stem."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool  # stored with the first axis varying fastest

    @property
    def data_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class MemberStream:
    """The data bytes of one array, front to back.

    Its methods raise ValueError naming the array where it is damaged.
    """

    def __init__(self, file: IO[bytes], member: Member) -> None:
        self._file = file
        self._member = member
        self.position = 0  # bytes read or skipped

    def read(self, count: int) -> bytes:
        """The next `count` bytes."""
        with _named(self._member.path, self._member.name):
            data = self._file.read(count)
            self.position += len(data)
            if len(data) < count:
                raise ValueError(
                    f"got {self.position} bytes of data, expected {self._member.data_bytes}: it is"
                    " truncated"
                )
        return data

    def skip_to(self, position: int) -> None:
        """Reads on to `position`, which lies not before the present one."""
        while self.position < position:
            self.read(min(CHUNK_BYTES, position - self.position))

    def finish(self) -> None:
        """Reads what is left, at the end of which the archive compares its checksum."""
        self.skip_to(self._member.data_bytes)
        with _named(self._member.path, self._member.name):
            self._file.read(1)


def member_names(path: Path) -> frozenset[str]:
    """The names of the arrays in the file.  Raises ValueError when it is not an .npz file."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (*DAMAGED, ValueError) as error:
        raise ValueError(f"{path}: not a readable .npz file ({error}); fetch it again") from error
    return frozenset(name.removesuffix(".npy") for name in names if name.endswith(".npy"))


def describe_members(path: Path, names: Iterable[str]) -> dict[str, Member]:
    """What the headers of the arrays `names` say; others are not touched.

    Raises ValueError naming the file and the array when one is missing, damaged, claims a size that
    it cannot have, or holds Python objects.
    """
    found = {}
    with zipfile.ZipFile(path) as archive:
        for name in sorted(names):
            with _named(path, name), _opened(archive, name) as (_, member):
                found[name] = member
    return found


def describe_npy(path: Path) -> Member:
    """What the header of an .npy file says.  Raises ValueError as `describe_members`."""
    with _named(path, path.stem), _plain(path) as (_, member):
        return member


def read_member(member: Member) -> np.ndarray:
    """The whole array.  Raises ValueError naming it when it is damaged."""
    with streamed(member) as stream:
        data = stream.read(member.data_bytes)
        stream.finish()
    return np.ndarray(member.shape, member.dtype, data, order="F" if member.fortran else "C")


def member_blocks(member: Member) -> Iterator[np.ndarray]:
    """A few rows (k, ...) at a time, of an array of two or more dimensions stored in C order.

    Raises ValueError naming it when it is damaged.
    """
    row_bytes = prod(member.shape[1:]) * member.dtype.itemsize
    count, at_once = member.shape[0], rows_at_once(row_bytes)
    with streamed(member) as stream:
        for start in range(0, count, at_once):
            rows = min(at_once, count - start)
            data = stream.read(rows * row_bytes)
            yield np.frombuffer(data, member.dtype).reshape(rows, *member.shape[1:])
        stream.finish()


@contextmanager
def streamed(member: Member) -> Iterator[MemberStream]:
    """The array's data, positioned at its first byte."""
    with ExitStack() as stack:
        with _named(member.path, member.name):
            if member.path.suffix == ".npy":
                opened = _plain(member.path)
            else:
                archive = stack.enter_context(zipfile.ZipFile(member.path))
                opened = _opened(archive, member.name)
            file, now = stack.enter_context(opened)
            if now != member:
                raise ValueError("the file has changed meanwhile")
        yield MemberStream(file, member)


@contextmanager
def _named(path: Path, name: str) -> Iterator[None]:
    try:
        yield
    except (*DAMAGED, ValueError, KeyError) as error:
        raise ValueError(
            f"{path}: array {name!r} cannot be read: {error}; fetch or write it again"
        ) from error


@contextmanager
def _opened(archive: zipfile.ZipFile, name: str) -> Iterator[tuple[IO[bytes], Member]]:
    """The file of one array after its header, and what that says."""
    info = archive.getinfo(f"{name}.npy")
    path = Path(archive.filename or "")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"zip method {info.compress_type}, expected stored or deflated")
    file_bytes = path.stat().st_size  # `compress_size` is a claim as well
    if info.file_size > MAX_DEFLATE_RATIO * min(info.compress_size, file_bytes):
        raise ValueError(
            f"the directory claims {info.file_size} bytes packed into {info.compress_size} of a"
            f" file of {file_bytes}, expected at most {MAX_DEFLATE_RATIO} times as many"
        )
    with archive.open(info) as file:
        yield file, _described(file, path, name, info.file_size)


@contextmanager
def _plain(path: Path) -> Iterator[tuple[IO[bytes], Member]]:
    """The same of an .npy file."""
    with path.open("rb") as file:
        yield file, _described(file, path, path.stem, path.stat().st_size)


def _described(file: IO[bytes], path: Path, name: str, size_bytes: int) -> Member:
    """What the header says at the start of `file`, which has `size_bytes` in all."""
    shape, fortran, dtype = _read_header(file)
    member = Member(path, name, shape, dtype, fortran)
    data_bytes = size_bytes - file.tell()
    if any(side < 0 for side in shape) or member.data_bytes != data_bytes:
        raise ValueError(
            f"its header claims {dtype} {shape}, {member.data_bytes} bytes, but it holds"
            f" {data_bytes}"
        )
    return member


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = npy.read_magic(file)
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f".npy version {version}, expected (1, 0) or (2, 0)")
    try:
        shape, fortran, dtype = readers[version](file)
    except Exception as error:  # the header is a Python literal: tokenizer and parser errors too
        raise ValueError(f"its .npy header is damaged ({error})") from error
    if dtype.hasobject or dtype.itemsize == 0:
        raise ValueError(f"dtype {dtype}, expected numbers or text: objects are never unpickled")
    return shape, fortran, dtype
