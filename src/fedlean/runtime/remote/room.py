"""How much of a device's memory is left, given what its open sessions hold and may come to hold."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from fedlean.printable import megabytes

STATM = Path("/proc/self/statm")


class TooLarge(ValueError):
    """The task needs more memory than this device may use; the message says how much."""


class Room:
    """What of `limit_bytes` for the whole process is granted to sessions.

    A session counts with what it was granted for as long as somebody holds it, whether or not it
    has touched that yet.  What it holds already is not counted again as the process's.
    """

    def __init__(self, engine: Any, limit_bytes: int, *, emulated: bool = False):
        """emulated: the limit is of the sessions alone, not of this process."""
        self._engine = engine
        self._emulated = emulated
        self.limit_bytes = limit_bytes
        self._granted: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self._alone_bytes = 0  # the process when no session was open
        self._most_bytes = 0  # granted at once

    @property
    def granted_bytes(self) -> int:
        """Of all open sessions."""
        return sum(self._granted.values())

    def free_bytes(self, session: Any = None) -> int:
        """For sessions beside those that are open; or for `session`, which may be one of them."""
        own = 0 if session is None else self._granted.get(session, 0)
        return self.limit_bytes - self._process_bytes() - (self.granted_bytes - own)

    def check(self, needed_bytes: int, what: str, session: Any = None) -> None:
        """Raises TooLarge naming both numbers."""
        free_bytes = self.free_bytes(session)
        if needed_bytes <= free_bytes:
            return
        limit, more = f"the limit of {self.limit_bytes / 1e6:.0f} MB", "raise --memory-limit"
        if self._emulated:
            limit, more = f"its {megabytes(self.limit_bytes)}", "give the device more in --fleet"
        raise TooLarge(
            f"{what} needs {megabytes(needed_bytes)}, {megabytes(max(0, free_bytes))} are free "
            f"under {limit}: {more}, or train a smaller model, batch or density"
        )

    def grant(self, session: Any, needed_bytes: int) -> None:
        """For as long as the session lives; in place of what it had."""
        self._granted[session] = needed_bytes
        self._most_bytes = max(self._most_bytes, self.granted_bytes)

    def _process_bytes(self) -> int:
        """What the process holds beside its sessions."""
        if self._emulated:
            return 0
        resident = resident_bytes()
        if not self._granted:
            self._alone_bytes = resident
        if not STATM.is_file():  # a peak: of when most was granted
            return resident - self._most_bytes
        idle = getattr(self._engine, "idle_bytes", 0)
        held = [getattr(session, "held_bytes", None) for session in self._granted]
        if None not in held:
            return resident - idle - sum(size for size in held if size is not None)
        # An engine that does not say what it holds: no more than was granted to it, and of a
        # process that was as large as this before it was opened, nothing.
        return max(self._alone_bytes, resident - self.granted_bytes)


def resident_bytes() -> int:
    """Memory of this process now (Linux), or its peak (elsewhere).

    What was freed goes back to the system first, where the C library can do that (glibc): it keeps
    tens of megabytes, which the next session uses again.
    """
    if STATM.is_file():
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
