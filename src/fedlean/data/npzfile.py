"""Reading named arrays of an .npz file, with every size checked before it is allocated.

`np.load` believes the shape in each array's header and allocates it.  Here the header must agree
with the archive's directory, and the directory with what deflate can pack into the file.
Objects are never unpickled.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

MAX_DEFLATE_RATIO = 1032  # deflate cannot shrink further: a larger claim is false
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError)


def member_names(path: Path) -> frozenset[str]:
    """The names of the arrays in the file.  Raises ValueError when it is not an .npz file."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (*DAMAGED, ValueError) as error:
        raise ValueError(f"{path}: not a readable .npz file ({error}); fetch it again") from error
    return frozenset(name.removesuffix(".npy") for name in names if name.endswith(".npy"))


def read_members(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """The arrays `names` of the file; others are not touched.

    Raises ValueError naming the file and the array when one is missing, damaged, claims a size that
    it cannot have, or holds Python objects.
    """
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for name in sorted(names):
            try:
                arrays[name] = _read_member(archive, f"{name}.npy")
            except (*DAMAGED, ValueError, KeyError) as error:
                raise ValueError(
                    f"{path}: array {name!r} cannot be read: {error}; fetch or write it again"
                ) from error
    return arrays


def _read_member(archive: zipfile.ZipFile, member: str) -> np.ndarray:
    info = archive.getinfo(member)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"zip method {info.compress_type}, expected stored or deflated")
    file_bytes = Path(archive.filename or "").stat().st_size  # `compress_size` is a claim as well
    if info.file_size > MAX_DEFLATE_RATIO * min(info.compress_size, file_bytes):
        raise ValueError(
            f"the directory claims {info.file_size} bytes packed into {info.compress_size} of a"
            f" file of {file_bytes}, expected at most {MAX_DEFLATE_RATIO} times as many"
        )
    with archive.open(info) as file:
        shape, fortran, dtype = _read_header(file)
        expected = prod(shape) * dtype.itemsize
        data_bytes = info.file_size - file.tell()
        if any(side < 0 for side in shape) or expected != data_bytes:
            raise ValueError(
                f"its header claims {dtype} {shape}, {expected} bytes, but it holds {data_bytes}"
            )
        data = file.read()  # bounded by file_size; checks the checksum at its end
    if len(data) != expected:
        raise ValueError(f"got {len(data)} bytes of data, expected {expected}: it is truncated")
    return np.ndarray(shape, dtype, data, order="F" if fortran else "C")


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
