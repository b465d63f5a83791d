"""The link probe: two honest ends, and ends that are not."""

from __future__ import annotations

import socket
import struct
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from fedlean.measure import link, responder
from fedlean.measure.link import measure_link
from fedlean.measure.probe import DONE, MAX_BYTES, SEND, TAKE, Header, ProbeError, parse_address

HOST = "127.0.0.1"


@contextmanager
def listening(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """A server that answers with `answer` until its listener is closed; the port."""
    with responder.listen(HOST, 0) as listener:
        thread = threading.Thread(target=answer, args=[listener], daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        thread.join(timeout=10)
        assert not thread.is_alive()


@contextmanager
def responding(connections: int = 1) -> Iterator[tuple[int, list[str]]]:
    said: list[str] = []
    with listening(lambda socket: responder.serve(socket, said.append, connections)) as port:
        yield port, said


def once(reply: Callable[[socket.socket], None]) -> Callable[[socket.socket], None]:
    """A far end of one connection."""

    def answer(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            reply(connection)

    return answer


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(link, "TRANSFER_SECONDS", 0.004)


@pytest.mark.usefixtures("quick")
def test_both_directions_are_measured():
    with responding() as (port, said):
        measured = measure_link(HOST, port, repeats=3)
    assert measured.uplink_bytes_per_s > 0 and measured.downlink_bytes_per_s > 0
    assert 0 < measured.round_trip_seconds < 1
    assert link.TRIAL_BYTES <= measured.uplink_bytes <= MAX_BYTES
    assert link.TRIAL_BYTES <= measured.downlink_bytes <= MAX_BYTES
    assert measured.repeats == 3
    assert said == [f"{HOST}: measured"]


def test_rates_by_hand():
    """A clock that moves one second per look: a transfer takes one, of the first trial's size."""
    ticks = iter(range(10_000))
    with responding() as (port, _):
        measured = measure_link(HOST, port, repeats=3, clock=lambda: float(next(ticks)))
    assert measured.uplink_bytes == measured.downlink_bytes == link.TRIAL_BYTES
    assert measured.uplink_bytes_per_s == measured.downlink_bytes_per_s == link.TRIAL_BYTES
    assert measured.round_trip_seconds == 1


@pytest.mark.usefixtures("quick")
def test_one_after_the_other():
    with responding(connections=2) as (port, said):
        measure_link(HOST, port, repeats=1)
        measure_link(HOST, port, repeats=1)
    assert said == [f"{HOST}: measured"] * 2


# A hostile client


def told_by(message: bytes, close: bool = True) -> str:
    """What the responder says of a connection that sends `message`; it then serves another."""
    with responding(connections=2) as (port, said):
        with socket.create_connection((HOST, port), timeout=5) as connection:
            connection.sendall(message)
            with suppress(OSError):  # it left before all of the message was read
                if close:
                    connection.shutdown(socket.SHUT_WR)
                while connection.recv(1 << 16):
                    pass
        measure_link(HOST, port, repeats=1)
    assert len(said) == 2 and said[1] == f"{HOST}: measured"
    return said[0]


GOOD = Header(TAKE, 4).pack()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("message", "said"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "not a link probe"),
        (struct.pack(">4sBBxxQ", b"FLLP", 2, SEND, 1), "version 2"),
        (struct.pack(">4sBBHQ", b"FLLP", 1, SEND, 7, 1), "version 1"),  # padding must be zero
        (struct.pack(">4sBBxxQ", b"FLLP", 1, 9, 1), "unknown kind 9"),
        (struct.pack(">4sBBxxQ", b"FLLP", 1, SEND, MAX_BYTES + 1), "at most 16777216"),
        (struct.pack(">4sBBxxQ", b"FLLP", 1, TAKE, 2**64 - 1), "at most 16777216"),
        (Header(DONE, 1).pack(), "nothing was asked for"),
        (GOOD[:7], "within a header"),
        (GOOD + b"abc", "within a transfer"),
        (Header(TAKE, 0).pack() * (responder.MAX_TRANSFERS + 1), "more than 64 transfers"),
    ],
)
def test_a_hostile_client_is_told_of_and_the_next_one_served(message, said):
    assert said in told_by(message)


@pytest.mark.usefixtures("quick")
def test_a_silent_client_does_not_block(monkeypatch):
    monkeypatch.setattr(responder, "IDLE_SECONDS", 0.1)
    assert "timed out" in told_by(GOOD + b"abc", close=False)


def test_a_trickling_client_does_not_block(monkeypatch):
    here, there = socket.socketpair()
    stop = threading.Event()

    def trickle():
        here.sendall(Header(TAKE, 1000).pack())
        while not stop.wait(0.01):
            try:
                here.sendall(b"x")
            except OSError:
                return

    thread = threading.Thread(target=trickle, daemon=True)
    thread.start()
    try:
        with here, there, pytest.raises((ProbeError, OSError)):
            responder.answer(there, seconds=0.1)
    finally:
        stop.set()
        thread.join()


def test_nothing_is_allocated_for_what_is_announced():
    here, there = socket.socketpair()
    with here, there:
        here.sendall(Header(TAKE, MAX_BYTES).pack() + b"few")
        here.shutdown(socket.SHUT_WR)
        tracemalloc.start()
        with pytest.raises(ProbeError, match="within a transfer"):
            responder.answer(there)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < MAX_BYTES / 16


# A hostile far end


@pytest.mark.parametrize(
    "reply",
    [
        lambda connection: connection.recv(16),  # closes
        lambda connection: connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
        lambda connection: connection.sendall(Header(DONE, 1).pack()),  # of what was not sent
        lambda connection: connection.sendall(Header(SEND, 0).pack()),
        lambda connection: connection.sendall(Header(DONE, 0).pack()[:5]),
    ],
)
def test_a_far_end_that_is_no_responder(reply):
    with listening(once(reply)) as port, pytest.raises((ProbeError, ConnectionError)):
        measure_link(HOST, port)


def test_nobody_there():
    with responder.listen(HOST, 0) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(OSError):
        measure_link(HOST, port)


def test_a_silent_far_end_times_out(monkeypatch):
    monkeypatch.setattr(link, "IDLE_SECONDS", 0.05)
    release = threading.Event()
    with listening(once(lambda connection: release.wait(5))) as port:
        with pytest.raises(TimeoutError):
            measure_link(HOST, port)
        release.set()


# Addresses


@pytest.mark.parametrize(
    "text", ["", "host", "host:", ":80", "host:port", "host:-1", "host:65536", "host:８０", "[]:1"]
)
def test_bad_addresses(text):
    with pytest.raises(ValueError, match="expected HOST:PORT"):
        parse_address(text)
