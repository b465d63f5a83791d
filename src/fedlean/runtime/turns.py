"""Several runs in one process, a step of each in turn.

On a machine that does other work too, two runs made one after the other meet another machine each;
made in turns they meet the same, and their measured seconds can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Condition

Pass = Callable[[], None]  # called after a step: the others have theirs first


class _Ended(Exception):
    """Another run failed or was interrupted: this one goes no further."""


class _Turns:
    """Who is next.  One thread at a time is between `take` and the next `take` or `leave`."""

    def __init__(self, count: int):
        self._order = list(range(count))
        self._ended = False
        self._changed = Condition()

    def take(self, index: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._order[0] == index)
            if self._ended:
                raise _Ended

    def hand_on(self, index: int) -> None:
        with self._changed:
            if not self._ended:
                self._order.append(self._order.pop(0))
                self._changed.notify_all()
        self.take(index)

    def leave(self, index: int) -> None:
        with self._changed:
            self._order.remove(index)
            self._changed.notify_all()

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()


def in_turns(runs: Sequence[Callable[[Pass], None]]) -> None:
    """Calls every run with what it is to call after each of its steps; returns when all are done.

    Raises what a run raised, or KeyboardInterrupt, after the others have stopped at their next
    step.
    """
    turns = _Turns(len(runs))

    def go(index: int) -> None:
        try:
            turns.take(index)
            runs[index](lambda: turns.hand_on(index))
        except _Ended:
            pass
        except BaseException:
            turns.end()
            raise
        finally:
            turns.leave(index)

    with ThreadPoolExecutor(max_workers=len(runs)) as pool:
        futures = [pool.submit(go, index) for index in range(len(runs))]
        try:
            for future in futures:
                future.result()
        except BaseException:
            turns.end()
            raise
