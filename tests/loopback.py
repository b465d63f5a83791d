"""Devices in this process behind a `Post`: real envelopes, real disks, faults on demand."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import count
from pathlib import Path

import numpy as np
from federation import CLIENTS, ENGINE, client_data, dataset

from fedlean.runtime.remote import attendance, budget, dispatch, exchange, roster, unwilling
from fedlean.runtime.remote import envelope as env
from fedlean.runtime.remote.dispatch import RemoteDispatch, Terms
from fedlean.runtime.remote.envelope import unseal
from fedlean.runtime.remote.exchange import Failed
from fedlean.runtime.remote.worker import Worker

QUICK = Terms(deadline_seconds=0.3, join_seconds=0.3, poll_seconds=0.005)
Fault = Callable[[int, bytes], "bytes | Failed | None"]  # node, content -> what arrives, if any


def nothing(node: int, content: bytes) -> bytes:
    return content


def kind_of(content: bytes) -> int:
    return unseal(content, expected=tuple(env.KINDS)).kind


class Clock:
    """Stands in for the module `time`: nothing but sleeping takes time.

    Deadlines are then of polls, not of how busy the machine is that runs the tests.
    """

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def stand_in(monkeypatch) -> Clock:
    """The clock of all that waits for devices, and of the devices."""
    clock = Clock()
    for module in (attendance, budget, dispatch, exchange, roster, unwilling):
        monkeypatch.setattr(module, "time", clock)
    return clock


class Loopback:
    """Nodes 100, 101, ... hold clients 0, 1, ...; a message is answered when it is sent."""

    def __init__(self, folder: Path, clients: int = CLIENTS, **worker):
        self.folder = folder
        self.worker_settings = worker
        self.workers = {100 + client: self.new_worker(client) for client in range(clients)}
        self.there = set(self.workers)
        self.on_the_way_down: Fault = nothing
        self.on_the_way_up: Fault = nothing
        self.sent: list[tuple[int, bytes]] = []
        self.waiting: list[tuple[str, bytes | Failed]] = []
        self._ids = count()

    def new_worker(self, client: int) -> Worker:
        """As after a restart: what it held in memory is gone, its folder is not."""
        settings = {"client": client, "engine": ENGINE.name, **self.worker_settings}
        return Worker(self.folder / str(client), client_data()[client], **settings)

    def restart(self, client: int) -> None:
        self.workers[100 + client] = self.new_worker(client)

    def nodes(self) -> Collection[int]:
        return set(self.there)

    def send(self, letters: Sequence[tuple[int, bytes]], *, seconds: float) -> list[str]:
        assert seconds > 0
        keys = []
        for node, content in letters:
            keys.append(f"m{next(self._ids)}")
            self.sent.append((node, content))
            arrived = self.on_the_way_down(node, content)
            if not isinstance(arrived, bytes):
                continue
            reply = self.on_the_way_up(node, self.workers[node].answer(arrived))
            if reply is not None:
                self.waiting.append((keys[-1], reply))
        return keys

    def fetch(
        self, ids: Collection[str], *, seconds: float
    ) -> Iterable[tuple[str, bytes | Failed]]:
        asked = set(ids)
        ready = [one for one in self.waiting if one[0] in asked]
        self.waiting = [one for one in self.waiting if one[0] not in asked]
        return ready


def remote(post: Loopback, method: str = "fedavg", **terms) -> tuple[RemoteDispatch, list[str]]:
    """A dispatch over `post` and the lines that it says."""
    lines: list[str] = []
    quick = {name: getattr(QUICK, name) for name in ("deadline_seconds", "join_seconds")}
    chosen = Terms(**{**quick, "poll_seconds": 0.005, "min_clients": CLIENTS, **terms})
    over_post = RemoteDispatch(
        post, method=method, dataset=dataset(), clients=CLIENTS, terms=chosen, say=lines.append
    )
    return over_post, lines


def flipped(content: bytes, seed: int) -> bytes:
    """One random byte changed."""
    rng = np.random.default_rng(seed)
    out = bytearray(content)
    out[int(rng.integers(len(out)))] ^= int(rng.integers(1, 256))
    return bytes(out)
