"""`Post` over Flower's Grid, in its simulation and in deployment alike."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import count

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fedlean.runtime.flower.content import NotOurs, from_record, to_record
from fedlean.runtime.remote.exchange import Failed

SPARE_SECONDS = 60.0  # for which a late reply can still be told from a lost one


class GridPost:
    """Letters as messages of type "train", the one type that both kinds of node run."""

    def __init__(self, grid: Grid):
        self._grid = grid
        self._unsent = count()
        self._failed: dict[str, Failed] = {}

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

    def fetch(self, ids: Collection[str]) -> Iterable[tuple[str, bytes | Failed]]:
        asked = set(ids)
        yield from [(key, self._failed.pop(key)) for key in [*self._failed] if key in asked]
        for key in ids:
            if not key.startswith("unsent-"):
                yield from self._pulled(key)

    def _pulled(self, asked: str) -> Iterator[tuple[str, bytes | Failed]]:
        """One at a time: one reply is in memory, and what is wrong with it stays its own."""
        try:
            messages = list(self._grid.pull_messages([asked]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # of its own objects
            yield asked, Failed(f"a reply that Flower cannot read: {type(error).__name__}: {error}")
            return
        for message in messages:
            key = message.metadata.reply_to_message_id
            if message.has_error():
                error = message.error
                yield key, Failed(f"Flower error {error.code}: {error.reason or 'no reason given'}")
                continue
            try:
                yield key, from_record(message.content)
            except NotOurs as error:
                yield key, Failed(str(error))
