"""The fixed header: 80 bytes, little endian, the same for tasks and updates."""

from __future__ import annotations

import struct
from dataclasses import astuple, dataclass

from fedlean.wire.errors import WireError
from fedlean.wire.reader import Reader

MAGIC = b"FdLn"
VERSION = 3
TASK, UPDATE = 1, 2
SPEC, PATTERN, FROZEN = 1, 2, 4  # flags: which optional sections the payload opens with
BARE = 8  # flag: no parameters, not even the bits that say which
VALUES = 32  # flag, beside FROZEN: their values travel, whose receiver does not hold them
DRAWN = 16  # flag, beside PATTERN: seed and counts of random masks in their place

# magic, version, kind, flags, value dtype, round, client, seed, examples, spec, pattern, lengths
_LAYOUT = struct.Struct("<4sBBBBIQQQ16s16sIQ")
HEADER_BYTES = _LAYOUT.size
_KINDS = {TASK: "task", UPDATE: "update"}
_FLAGS = {TASK: SPEC | PATTERN | FROZEN | DRAWN | VALUES, UPDATE: PATTERN | BARE}


@dataclass(frozen=True)
class Header:
    """What is true of the whole message; the hashes are 16 bytes, all zero for "no pattern"."""

    kind: int
    flags: int
    value_dtype: int
    round: int
    client: int
    seed: int
    num_examples: int
    spec: bytes
    pattern: bytes
    json_bytes: int
    payload_bytes: int

    def pack(self) -> bytes:
        """Raises WireError where a number is negative or too large for its field."""
        try:
            return _LAYOUT.pack(MAGIC, VERSION, *astuple(self))
        except struct.error as error:
            raise WireError(
                f"round {self.round!r}, client {self.client!r}, seed {self.seed!r} and "
                f"num_examples {self.num_examples!r} must be unsigned integers (round 32 bits, "
                f"the others 64): {error}"
            ) from None


def read_header(reader: Reader, kind: int) -> Header:
    """The header of a message of `kind`, after which exactly the announced bytes follow."""
    magic, version, *rest = _LAYOUT.unpack(reader.take(HEADER_BYTES, "the header"))
    if magic != MAGIC:
        raise WireError(f"not a FedLean message: it starts with {magic!r}, expected {MAGIC!r}")
    if version != VERSION:
        raise WireError(f"the message has wire version {version}, this side speaks {VERSION}")
    header = Header(*rest)
    if header.kind != kind:
        got = _KINDS.get(header.kind, f"kind {header.kind}")
        raise WireError(f"expected {_KINDS[kind]}, got {got}")
    if header.flags & ~_FLAGS[kind]:
        raise WireError(f"unknown flags {header.flags:#04x} for {_KINDS[kind]}")
    announced = header.json_bytes + header.payload_bytes
    if announced != reader.remaining:
        fault = "truncated" if announced > reader.remaining else "trailing bytes"
        raise WireError(
            f"{fault}: the header announces {announced} bytes after it, got {reader.remaining}"
        )
    return header
