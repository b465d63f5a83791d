"""Letters out, replies in, until all have come or the time is over."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

LATE_KEPT = 1000  # message ids of which a late reply is still told from a stranger's


@dataclass(frozen=True)
class Failed:
    """The transport has an error instead of a reply."""

    reason: str


class Post(Protocol):
    """Messages to nodes, and their replies by message id."""

    def nodes(self) -> Collection[int]:
        """Ids of the nodes that are connected now."""
        ...

    def send(self, letters: Sequence[tuple[int, bytes]], *, seconds: float) -> list[str]:
        """Message ids, in order; a reply is of use for so many seconds."""
        ...

    def fetch(
        self, ids: Collection[str], *, seconds: float
    ) -> Iterable[tuple[str, bytes | Failed]]:
        """Replies that have come since, with the message they answer, in about `seconds`."""
        ...


Letter = Callable[[], bytes]  # written when it is sent: one is in memory at a time
Letters = Mapping[int, Letter]  # by node
Take = Callable[[int, bytes | Failed], Letters]  # node and its reply -> letters to send in turn


def printable(text: str) -> str:
    """What another machine wrote, fit for one line of a log."""
    return "".join(each if each.isprintable() else "?" for each in text)


class Exchange:
    """Over one `Post`.  Late and second replies are discarded, and said."""

    def __init__(self, post: Post, *, poll_seconds: float, say: Callable[[str], None]):
        self.post = post
        self._poll_seconds = poll_seconds
        self._say = say
        self._late: dict[str, tuple[int, str]] = {}  # message id -> node, what it was about

    def run(self, letters: Letters, *, ends: float, about: str, take: Take) -> None:
        """Hands every reply that comes before `ends` (monotonic seconds) to `take`."""
        waiting = self._send(letters, ends)
        while waiting and time.monotonic() < ends:
            came = False
            fetched = self.post.fetch([*waiting, *self._late], seconds=ends - time.monotonic())
            for key, content in fetched:
                came = True
                node = waiting.pop(key, None)
                if key in self._late:
                    node, what = self._late.pop(key)
                    again = [one for one, other in waiting.items() if other == node]
                    if what != about or not again:
                        self._say(f"discarded a late reply: node {node}, {what}")
                        continue
                    for one in again:  # asked twice: the first answer is as good as the second
                        del waiting[one]
                        self._late[one] = (node, about)
                if node is None:
                    self._say("discarded a second reply to one message")
                    continue
                waiting |= self._send(take(node, content), ends)
            if waiting and not came:
                time.sleep(self._poll_seconds)
        self._late |= {key: (node, about) for key, node in waiting.items()}
        for key in [*self._late][:-LATE_KEPT]:
            del self._late[key]

    def _send(self, letters: Letters, ends: float) -> dict[str, int]:
        seconds = max(1.0, ends - time.monotonic())
        ids = {}
        for node, letter in letters.items():
            if time.monotonic() >= ends:  # nobody would wait for the answer
                break
            (key,) = self.post.send([(node, letter())], seconds=seconds)
            ids[key] = node
        return ids
