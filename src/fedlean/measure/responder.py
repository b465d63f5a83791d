"""The link probe's far end: `fedlean profile --serve HOST:PORT`.

It sends and takes bounded amounts of meaningless bytes, one connection at a time, since two would
share the link that each of them measures.  It knows no file and keeps nothing.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from itertools import count

from fedlean.measure.probe import (
    DONE,
    SEND,
    TAKE,
    Header,
    ProbeError,
    discard,
    receive_header,
    send_bytes,
)

IDLE_SECONDS = 10.0  # without a byte, after which a connection is closed
CONNECTION_SECONDS = 300.0  # after which a connection is closed, whatever it does
MAX_TRANSFERS = 64
_CHUNK_BYTES = 1 << 16


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any that is free."""
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    return socket.create_server((host, port), family=family, backlog=4)


def serve(
    listener: socket.socket, say: Callable[[str], None], connections: int | None = None
) -> None:
    """Answers so many connections (None: until it is interrupted) and says how each ended."""
    for _ in count() if connections is None else range(connections):
        host = "?"
        try:
            connection, (host, *_rest) = listener.accept()
            with connection:
                answer(connection)
            say(f"{host}: measured")
        except (ProbeError, OSError) as error:
            say(f"{host}: {error}")


def answer(connection: socket.socket, *, seconds: float = CONNECTION_SECONDS) -> None:
    """One probe, until the other side closes.  Raises ProbeError or OSError (timeouts too)."""
    connection.settimeout(IDLE_SECONDS)
    end = threading.Timer(seconds, _hang_up, [connection])  # a trickle of bytes is never idle
    end.daemon = True
    end.start()
    try:
        _transfers(connection, os.urandom(_CHUNK_BYTES))  # nothing on the way can compress it
    finally:
        end.cancel()


def _hang_up(connection: socket.socket) -> None:
    with suppress(OSError):  # it has ended by itself
        connection.shutdown(socket.SHUT_RDWR)


def _transfers(connection: socket.socket, chunk: bytes) -> None:
    for _ in range(MAX_TRANSFERS):
        header = receive_header(connection)
        if header is None:
            return
        if header.kind == SEND:
            send_bytes(connection, header.length, chunk)
        elif header.kind == TAKE:
            discard(connection, header.length)
            connection.sendall(Header(DONE, header.length).pack())
        else:
            raise ProbeError("a DONE that nothing was asked for")
    raise ProbeError(f"more than {MAX_TRANSFERS} transfers")
