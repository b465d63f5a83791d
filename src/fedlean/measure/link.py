"""How fast the link to a `fedlean profile --serve` is, from this device's side."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from fedlean.measure.probe import (
    DONE,
    MAX_BYTES,
    SEND,
    TAKE,
    Header,
    ProbeError,
    discard,
    receive_header,
    send_bytes,
)

TRIAL_BYTES = 1 << 16
TRANSFER_SECONDS = 1.0  # about how long a timed transfer lasts
REPEATS = 5
IDLE_SECONDS = 30.0
Clock = Callable[[], float]


@dataclass(frozen=True)
class Link:
    """Medians.  A rate is of a whole transfer, its answer's way back included."""

    uplink_bytes_per_s: float
    downlink_bytes_per_s: float
    round_trip_seconds: float  # of an empty transfer
    uplink_bytes: int  # of one transfer
    downlink_bytes: int
    repeats: int


def measure_link(
    host: str, port: int, *, repeats: int = REPEATS, clock: Clock = time.perf_counter
) -> Link:
    """Raises ProbeError when the other side is no responder, OSError when there is none."""
    with socket.create_connection((host, port), timeout=IDLE_SECONDS) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        chunk = os.urandom(TRIAL_BYTES)

        def up(length: int) -> float:
            began = clock()
            connection.sendall(Header(TAKE, length).pack())
            send_bytes(connection, length, chunk)
            if receive_header(connection) != Header(DONE, length):
                raise ProbeError(f"{host}:{port} did not confirm {length} bytes")
            return clock() - began

        def down(length: int) -> float:
            began = clock()
            connection.sendall(Header(SEND, length).pack())
            discard(connection, length)
            return clock() - began

        round_trip = median(up(0) for _ in range(repeats))
        up_bytes, down_bytes = _size(up), _size(down)
        # In turns, so that a slow spell of the link hits both directions.
        times = [(up(up_bytes), down(down_bytes)) for _ in range(repeats)]
    return Link(
        up_bytes / median(one for one, _ in times),
        down_bytes / median(one for _, one in times),
        round_trip,
        up_bytes,
        down_bytes,
        repeats,
    )


def _size(transfer: Callable[[int], float]) -> int:
    """Bytes that take about TRANSFER_SECONDS, found with growing trials, which are not counted."""
    length = TRIAL_BYTES
    while (seconds := transfer(length)) < TRANSFER_SECONDS / 4 and length < MAX_BYTES:
        length = min(4 * length, MAX_BYTES)
    return min(MAX_BYTES, max(TRIAL_BYTES, int(length * TRANSFER_SECONDS / max(seconds, 1e-9))))
