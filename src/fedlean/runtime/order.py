"""Updates in cohort order, whoever answered first, with flat memory.

An update that comes before its turn waits on disk in its encoded form; at most one is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from fedlean import wire
from fedlean.core import ClientTask, ClientUpdate
from fedlean.runtime.waiting import NoRoom, Waiting, read

Lost = Callable[[int, str], None]  # a client, and why there is nothing of it after all
_WHAT = "an update that came before its turn"


def in_cohort_order(
    updates: Iterable[ClientUpdate], tasks: Sequence[ClientTask], lost: Lost | None = None
) -> Iterator[ClientUpdate]:
    """Yields each task's update in the order of `tasks`; clients that did not answer are skipped.

    A second update of the same client and one that nobody asked for are dropped.  One for which the
    disk has no room is skipped and given to `lost`; without that, NoRoom is raised.
    """
    asked = {task.client: task for task in tasks}
    turn = [task.client for task in tasks]
    position = 0
    seen: set[int] = set()
    with Waiting("fedlean-updates-") as folder:
        waiting: dict[int, Path] = {}
        for update in updates:
            client = update.client
            if client not in asked or client in seen:
                continue
            seen.add(client)
            if client != turn[position]:
                try:
                    encoded = wire.encode_update(update, asked[client])
                    waiting[client] = folder.keep(encoded, _WHAT)
                except NoRoom as error:
                    _tell(lost, client, error)
                continue
            yield update
            position += 1
            while position < len(turn) and turn[position] in waiting:
                client = turn[position]
                yield from _read(waiting.pop(client), asked[client], lost)
                position += 1
        for client in turn[position:]:
            if client in waiting:
                yield from _read(waiting[client], asked[client], lost)


def _read(path: Path, task: ClientTask, lost: Lost | None) -> Iterator[ClientUpdate]:
    """Our own bytes, so without a limit."""
    try:
        content = read(path, _WHAT)
    except NoRoom as error:
        _tell(lost, task.client, error)
    else:
        yield wire.decode_update(content, task, limit_bytes=1 << 60, packed=True)


def _tell(lost: Lost | None, client: int, error: NoRoom) -> None:
    if lost is None:
        raise error
    lost(client, str(error))
