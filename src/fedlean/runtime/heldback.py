"""Updates that wait until all have come, where what may be used depends on all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from fedlean import wire
from fedlean.core import ClientTask, ClientUpdate
from fedlean.runtime.waiting import NoRoom, Waiting, read

_WHAT = "an update that waited for the others"


def held_back(
    updates: Iterable[ClientUpdate],
    tasks: Sequence[ClientTask],
    drop: Callable[[int], bool],
    lost: Callable[[int, str], None],
) -> Iterator[ClientUpdate]:
    """In the order of `tasks`, without those whose client `drop` names once all have come.

    They wait on disk in their encoded form; at most one is in memory.  One for which the disk has
    no room is given to `lost`.
    """
    asked = {task.client: task for task in tasks}
    with Waiting("fedlean-updates-") as folder:
        waiting: dict[int, Path] = {}
        for update in updates:
            encoded = wire.encode_update(update, asked[update.client])
            try:
                waiting[update.client] = folder.keep(encoded, _WHAT)
            except NoRoom as error:
                lost(update.client, str(error))
        for task in tasks:
            if task.client not in waiting or drop(task.client):
                continue
            try:
                content = read(waiting[task.client], _WHAT)
            except NoRoom as error:
                lost(task.client, str(error))
            else:
                yield wire.decode_update(content, task, limit_bytes=1 << 60, packed=True)
