"""SIGTERM ends a node soon, wherever it finds it.

Python runs a signal's handler between two of its own instructions, so one long step of the engine,
or whatever else does not return from native code, would hold it off.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

GRACE_SECONDS = 5.0  # systemd kills after 90


@contextmanager
def ends_soon(leave: Callable[[], None], seconds: float = GRACE_SECONDS) -> Iterator[None]:
    """In this block, a signal that has a handler of Python's ends it within `seconds`, or the
    process: `leave` is called then, in another thread, and the exit code is 0.

    For the main thread.
    """
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    one, left = threading.Lock(), threading.Event()

    def watch() -> None:
        if os.read(reads, 1) and not left.wait(seconds):
            with one:
                if not left.is_set():
                    try:
                        leave()
                    finally:
                        os._exit(0)

    before = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    thread = threading.Thread(target=watch, name="ends soon", daemon=True)
    thread.start()
    try:
        yield
    finally:
        with one:  # held for good where the other thread leaves
            left.set()
        signal.set_wakeup_fd(before)
        os.close(writes)
        thread.join()
        os.close(reads)
