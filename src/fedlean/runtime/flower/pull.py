"""Pulling one reply from the Grid without waiting for it longer than wished.

Flower's `pull_messages` tries for minutes to fetch the objects of a reply whose node died while it
sent them: longer than a round's deadline, and all other replies would wait behind it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from inspect import signature
from threading import Thread

from flwr.app import Message
from flwr.serverapp import Grid

from fedlean.runtime.flower.content import NotOurs, from_record
from fedlean.runtime.remote.exchange import Failed

Reply = tuple[str, bytes | Failed]

# The first and the longest wait for an object of a reply that is still being uploaded.
_EAGER = {"initial_backoff": 0.25, "backoff_cap": 1.0, "max_tries_per_object": None}


def pull_eagerly(grid: Grid) -> None:
    """Lets `grid` ask again soon for the objects of a reply that is still being uploaded.

    Flower waits 1, 2, 4 .. 10 s, and a reply is announced before it is uploaded: most of an empty
    round could be such a wait.  Its Grid has no setting for it, so the function that it calls gets
    other defaults; where a Flower calls another one, rounds are only slower.
    """
    module = sys.modules[type(grid).__module__]
    pull = getattr(module, "pull_objects", None)
    if callable(pull) and signature(pull).parameters.keys() >= _EAGER.keys():
        setattr(module, "pull_objects", partial(pull, **_EAGER))  # noqa: B010  not in its interface


class Pull:
    """One call of `pull_messages` for one message id, in a thread of its own."""

    def __init__(self, grid: Grid, asked: str):
        self._grid, self._asked = grid, asked
        self._messages: list[Message] = []
        self._error: Exception | None = None
        # a daemon: the app may end while Flower still tries
        self._thread = Thread(target=self._pull, name=f"pull {asked[:8]}", daemon=True)
        self._thread.start()

    def done(self, seconds: float) -> bool:
        """Whether it has ended, after waiting at most `seconds` for that."""
        self._thread.join(max(0.0, seconds))
        return not self._thread.is_alive()

    def replies(self) -> Iterator[Reply]:
        """What came, once it is done: nothing where there is no reply yet.

        Raises what `pull_messages` raised, except for what is wrong with the reply alone.
        """
        if isinstance(self._error, ValueError | KeyError | TypeError | AttributeError):
            what = f"{type(self._error).__name__}: {self._error}"
            yield self._asked, Failed(f"a reply that Flower cannot read: {what}")
        elif self._error is not None:
            raise self._error
        while self._messages:  # each is let go of once it is read
            yield _content(self._messages.pop())

    def _pull(self) -> None:
        try:
            self._messages = list(self._grid.pull_messages([self._asked]))
        except Exception as error:  # for the thread that asks
            self._error = error


def _content(message: Message) -> Reply:
    key = message.metadata.reply_to_message_id
    if message.has_error():
        error = message.error
        return key, Failed(f"Flower error {error.code}: {error.reason or 'no reason given'}")
    try:
        return key, from_record(message.content)
    except NotOurs as error:
        return key, Failed(str(error))
