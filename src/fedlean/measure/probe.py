"""The link probe's messages: 16 bytes each way, then as many bytes as they announce.

A connection carries several transfers.  The client asks to be sent bytes (SEND) or announces bytes
(TAKE); the responder answers a SEND with the bytes, a TAKE with a DONE that repeats the length.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass

MAX_BYTES = 1 << 24  # of one transfer: 16 MiB
SEND, TAKE, DONE = 1, 2, 3

_MAGIC, _VERSION = b"FLLP", 1
_LAYOUT = struct.Struct(">4sBBxxQ")  # magic, version, kind, bytes
_CHUNK = 1 << 16


class ProbeError(ValueError):
    """The other side does not speak this protocol, or asks for what it may not."""


@dataclass(frozen=True)
class Header:
    kind: int
    length: int

    def pack(self) -> bytes:
        return _LAYOUT.pack(_MAGIC, _VERSION, self.kind, self.length)


def unpack(raw: bytes) -> Header:
    """Raises ProbeError naming what is wrong, before anything of that size is allocated."""
    magic, version, kind, length = _LAYOUT.unpack(raw)
    if magic != _MAGIC:
        raise ProbeError(f"not a link probe: it starts with {magic!r}")
    if version != _VERSION or raw != Header(kind, length).pack():
        raise ProbeError(f"link probe of version {version}, this side speaks {_VERSION}")
    if kind not in (SEND, TAKE, DONE):
        raise ProbeError(f"unknown kind {kind} of message")
    if length > MAX_BYTES:
        raise ProbeError(f"a transfer of {length} bytes, at most {MAX_BYTES} are allowed")
    return Header(kind, length)


def receive_header(connection: socket.socket) -> Header | None:
    """None when the other side closed the connection between two messages."""
    raw = b""
    while len(raw) < _LAYOUT.size:
        part = connection.recv(_LAYOUT.size - len(raw))
        if not part:
            if raw:
                raise ProbeError("the connection ended within a header")
            return None
        raw += part
    return unpack(raw)


def send_bytes(connection: socket.socket, length: int, chunk: bytes) -> None:
    """`length` bytes made of `chunk` over and over."""
    whole, rest = divmod(length, len(chunk))
    for _ in range(whole):
        connection.sendall(chunk)
    connection.sendall(chunk[:rest])


def discard(connection: socket.socket, length: int) -> None:
    """Receives `length` bytes into one small buffer."""
    buffer = memoryview(bytearray(_CHUNK))
    while length:
        count = connection.recv_into(buffer[: min(length, _CHUNK)])
        if not count:
            raise ProbeError("the connection ended within a transfer")
        length -= count


def parse_address(text: str) -> tuple[str, int]:
    """HOST:PORT, an IPv6 host in brackets.  Raises ValueError.

    >>> parse_address("[::1]:9000"), parse_address("board.local:80")
    (('::1', 9000), ('board.local', 80))
    """
    host, colon, port = text.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ValueError(f"expected HOST:PORT, e.g. 192.168.1.2:9000, got {text!r}")
    return host, int(port)
