"""`Post` over Flower's Grid, in its simulation and in deployment alike."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fedlean.runtime.flower.collecting import Reply, collector_of
from fedlean.runtime.flower.content import to_record
from fedlean.runtime.flower.pull import Pull, Stop, from_memory
from fedlean.runtime.remote.exchange import Failed

SPARE_SECONDS = 60.0  # for which a late reply can still be told from a lost one
PULL_SECONDS = 5.0  # after which others are pulled beside a reply that does not come through


class GridPost:
    """Letters as messages of type "train", the one type that both kinds of node run."""

    def __init__(self, grid: Grid):
        self._grid = grid
        self._collector = collector_of(grid)
        self._unsent = count()
        self._failed: dict[str, Failed] = {}
        self._pulls: dict[str, Pull] = {}  # under way, by message id

    def nodes(self) -> Collection[int]:
        return list(self._grid.get_node_ids())

    def send(self, letters: Sequence[tuple[int, bytes]], *, seconds: float) -> list[str]:
        """One push per letter: a push holds copies of all that it carries."""
        return [self._send(node, content, seconds) for node, content in letters]

    def _send(self, node: int, content: bytes, seconds: float) -> str:
        message = Message(
            content=to_record(content),
            dst_node_id=node,
            message_type=MessageType.TRAIN,
            ttl=seconds + SPARE_SECONDS,
        )
        ids = list(self._grid.push_messages([message]))
        if ids and ids[0]:
            return ids[0]
        key = f"unsent-{next(self._unsent)}"
        self._failed[key] = Failed(
            f"Flower did not take a message of {len(content)} bytes for node {node}"
        )
        return key

    def fetch(self, ids: Mapping[str, int], *, seconds: float) -> Iterable[Reply]:
        ends = time.monotonic() + seconds
        for key in self._pulls.keys() - ids.keys():
            self._pulls.pop(key).abandon()
        yield from [(key, self._failed.pop(key)) for key in [*self._failed] if key in ids]
        for key, limit_bytes in ids.items():
            if not key.startswith("unsent-"):
                yield from self._pulled(key, limit_bytes, ends - time.monotonic())

    def _pulled(self, key: str, limit_bytes: int, seconds: float) -> Iterator[Reply]:
        """One at a time: one reply is in memory, and what is wrong with it stays its own."""
        if key in self._pulls:  # it was waited for
            seconds = 0.0
        pull = self._pulls.pop(key, None) or Pull(key, partial(self._source, key, limit_bytes))
        if pull.done(min(PULL_SECONDS, seconds)):
            yield from pull.replies()
        else:
            self._pulls[key] = pull

    def _source(self, key: str, limit_bytes: int, stop: Stop) -> Iterable[Reply]:
        if self._collector is None:
            return from_memory(self._grid, key, limit_bytes)
        return self._collector.collect(key, limit_bytes, stop)
