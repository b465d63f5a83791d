"""Keeps a node alive in the SuperLink's eyes while it trains; and one voice for both threads."""

from __future__ import annotations

import threading
from collections.abc import Callable

from fedlean.runtime.flower.channel import LinkError, delays, plain

# flwr's: a SuperLink takes a node for dead after two intervals without a heartbeat.
INTERVAL_SECONDS = 30.0
CALL_SECONDS = 5.0
_MOST_SECONDS = 20.0  # between two tries


class Presence:
    """Says once that the SuperLink went away, and once that it is back, whoever notices first."""

    def __init__(self, where: str, say: Callable[[str], None]) -> None:
        self._where, self._say = where, say
        self._away = False
        self._lock = threading.Lock()

    def lost(self, why: object) -> None:
        with self._lock:
            news, self._away = not self._away, True
        if news:
            self._say(f"SuperLink {self._where} is away ({plain(why)}); trying until it is back")

    def found(self) -> None:
        with self._lock:
            news, self._away = self._away, False
        if news:
            self._say(f"SuperLink {self._where} is back")


class Heartbeat:
    """Calls `beat` in a daemon thread until `stop`.  `unknown` is set where it returned False.

    beat: one heartbeat, with a timeout of its own; raises LinkError.  interrupt: ends a `beat` that
    is under way, from the stopping thread.
    """

    def __init__(
        self, beat: Callable[[], bool], interrupt: Callable[[], None], presence: Presence
    ) -> None:
        self._beat, self._interrupt, self._presence = beat, interrupt, presence
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self.unknown = threading.Event()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """No heartbeat is sent after this: one would bring a deactivated node back to life."""
        self._stopped.set()
        self._interrupt()
        self._thread.join(2 * CALL_SECONDS)

    def _run(self) -> None:
        regular = delays(INTERVAL_SECONDS - CALL_SECONDS, INTERVAL_SECONDS - CALL_SECONDS)
        again = delays(last=_MOST_SECONDS)
        seconds = next(regular)
        while not self._stopped.wait(seconds):
            try:
                known = self._beat()
            except LinkError as error:
                if error.retry:
                    if not self._stopped.is_set():
                        self._presence.lost(error)
                    seconds = next(again)
                    continue
                known = False
            self._presence.found()
            if not known:
                self.unknown.set()
            again, seconds = delays(last=_MOST_SECONDS), next(regular)
