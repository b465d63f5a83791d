"""Pulling one reply without waiting for it longer than wished.

A reply whose node died while it sent its objects is waited for, for minutes: longer than a round's
deadline, and all other replies would wait behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from threading import Event, Thread

from flwr.app import Message
from flwr.serverapp import Grid

from fedlean.runtime.flower.collecting import Reply, failed
from fedlean.runtime.flower.content import NotOurs, from_record
from fedlean.runtime.remote.exchange import Failed, too_large

Stop = Callable[[], bool]  # whether nobody waits any more


class Pull:
    """What `source` gives for one message id, in a thread of its own."""

    def __init__(self, asked: str, source: Callable[[Stop], Iterable[Reply]]):
        self._asked, self._source = asked, source
        self._replies: list[Reply] = []
        self._error: Exception | None = None
        self._abandoned = Event()
        # a daemon: the app may end while Flower still tries
        self._thread = Thread(target=self._pull, name=f"pull {asked[:8]}", daemon=True)
        self._thread.start()

    def done(self, seconds: float) -> bool:
        """Whether it has ended, after waiting at most `seconds` for that."""
        self._thread.join(max(0.0, seconds))
        return not self._thread.is_alive()

    def abandon(self) -> None:
        """Nobody waits for it any more."""
        self._abandoned.set()

    def replies(self) -> Iterator[Reply]:
        """What came, once it is done: nothing where there is no reply yet.

        Raises what the source raised, except for what is wrong with the reply alone.
        """
        while self._replies:  # each is let go of once it is read
            yield self._replies.pop()
        if isinstance(self._error, ValueError | KeyError | TypeError | AttributeError):
            what = f"{type(self._error).__name__}: {self._error}"
            yield self._asked, Failed(f"a reply that Flower cannot read: {what}")
        elif self._error is not None:
            raise self._error

    def _pull(self) -> None:
        try:
            self._replies = list(self._source(self._abandoned.is_set))
        except Exception as error:  # for the thread that asks
            self._error = error


def from_memory(grid: Grid, asked: str, limit_bytes: int) -> Iterator[Reply]:
    """From a Grid whose messages are in this process already, as in Flower's simulation."""
    for message in grid.pull_messages([asked]):
        yield message.metadata.reply_to_message_id, _content(message, limit_bytes)


def _content(message: Message, limit_bytes: int) -> bytes | Failed:
    if message.has_error():
        return failed(message.error)
    try:
        content = from_record(message.content)
    except NotOurs as error:
        return Failed(str(error))
    if len(content) > limit_bytes:
        return Failed(too_large(len(content), limit_bytes))
    return content
