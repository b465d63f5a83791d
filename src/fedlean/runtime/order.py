"""Updates in cohort order, whoever answered first, with flat memory.

An update that comes before its turn waits on disk in its encoded form; at most one is in memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from fedlean import wire
from fedlean.core import ClientTask, ClientUpdate


def in_cohort_order(
    updates: Iterable[ClientUpdate], tasks: Sequence[ClientTask]
) -> Iterator[ClientUpdate]:
    """Yields each task's update in the order of `tasks`; clients that did not answer are skipped.

    A second update of the same client and one that nobody asked for are dropped.
    """
    asked = {task.client: task for task in tasks}
    turn = [task.client for task in tasks]
    position = 0
    seen: set[int] = set()
    with tempfile.TemporaryDirectory(prefix="fedlean-updates-") as name:
        waiting: dict[int, Path] = {}
        for update in updates:
            client = update.client
            if client not in asked or client in seen:
                continue
            seen.add(client)
            if client == turn[position]:
                yield update
                position += 1
            else:
                waiting[client] = Path(name) / str(client)
                waiting[client].write_bytes(wire.encode_update(update, asked[client]))
                continue
            while position < len(turn) and turn[position] in waiting:
                client = turn[position]
                yield _read(waiting.pop(client), asked[client])
                position += 1
        for client in turn[position:]:
            if client in waiting:
                yield _read(waiting[client], asked[client])


def _read(path: Path, task: ClientTask) -> ClientUpdate:
    """Our own bytes, so without a limit."""
    return wire.decode_update(path.read_bytes(), task, limit_bytes=1 << 60, packed=True)
