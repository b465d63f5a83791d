"""Letters out, replies in, until all have come or the time is over."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from fedlean.runtime.remote.envelope import MAX_JSON_BYTES

LATE_KEPT = 1000  # message ids of which a late reply is still told from a stranger's
LISTEN_SECONDS = 1.0  # for late replies that are still on their way
BARE_BYTES = MAX_JSON_BYTES + 1024  # of an envelope without a body, at most


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
        self, ids: Mapping[str, int], *, seconds: float
    ) -> Iterable[tuple[str, bytes | Failed]]:
        """Replies that have come since, with the message they answer, in about `seconds`.

        ids: of each message, how many bytes its reply may have.  A larger one is `Failed`, before
        it is in memory where the transport can tell.
        """
        ...


Letter = Callable[[], bytes]  # written when it is sent: one is in memory at a time
Letters = Mapping[int, Letter]  # by node
Take = Callable[[int, bytes | Failed], Letters]  # node and its reply -> letters to send in turn
Limit = Callable[[int], int]  # node -> bytes that its reply may have


def too_large(num_bytes: int, limit_bytes: int) -> str:
    """Why a reply is refused."""
    return f"its reply has {num_bytes} bytes, an answer to what it was asked at most {limit_bytes}"


def bare(node: int) -> int:
    """The limit of replies that are an envelope and nothing in it."""
    return BARE_BYTES


class _Sent(NamedTuple):
    """A message that waits for its reply."""

    node: int
    limit_bytes: int


class Exchange:
    """Over one `Post`.  Late and second replies are discarded, and said.

    late: is handed late replies first, with their node and what they are about; what it returns
    True for is not discarded.
    """

    def __init__(self, post: Post, *, poll_seconds: float, say: Callable[[str], None]):
        self.post = post
        self._poll_seconds = poll_seconds
        self._say = say
        self._late: dict[str, tuple[_Sent, str]] = {}  # by message id, and what it was about
        self.late: Callable[[int, str, bytes | Failed], bool] = lambda node, about, content: False

    def run(
        self, letters: Letters, *, ends: float, about: str, take: Take, limit: Limit = bare
    ) -> None:
        """Hands every reply that comes before `ends` (monotonic seconds) to `take`."""
        waiting = self._send(letters, ends, limit)
        while waiting and time.monotonic() < ends:
            came = False
            asked = {key: sent.limit_bytes for key, sent in waiting.items()}
            asked |= {key: sent.limit_bytes for key, (sent, _) in self._late.items()}
            for key, content in self.post.fetch(asked, seconds=ends - time.monotonic()):
                came = True
                sent = waiting.pop(key, None)
                if key in self._late:
                    sent, what = self._late.pop(key)
                    again = [one for one, other in waiting.items() if other.node == sent.node]
                    if what != about or not again:
                        self._too_late(sent.node, what, content)
                        continue
                    for one in again:  # asked twice: the first answer is as good as the second
                        self._late[one] = (waiting.pop(one), about)
                if sent is None:
                    self._say("discarded a second reply to one message")
                    continue
                waiting |= self._send(take(sent.node, content), ends, limit)
            if waiting and not came:
                time.sleep(self._poll_seconds)
        self._late |= {key: (sent, about) for key, sent in waiting.items()}
        for key in [*self._late][:-LATE_KEPT]:
            del self._late[key]

    def listen(self) -> None:
        """Looks once for late replies."""
        asked = {key: sent.limit_bytes for key, (sent, _) in self._late.items()}
        if asked:
            for key, content in self.post.fetch(asked, seconds=LISTEN_SECONDS):
                if key in self._late:
                    sent, what = self._late.pop(key)
                    self._too_late(sent.node, what, content)

    def _too_late(self, node: int, about: str, content: bytes | Failed) -> None:
        if not self.late(node, about, content):
            self._say(f"discarded a late reply: node {node}, {about}")

    def _send(self, letters: Letters, ends: float, limit: Limit) -> dict[str, _Sent]:
        seconds = max(1.0, ends - time.monotonic())
        ids = {}
        for node, letter in letters.items():
            if time.monotonic() >= ends:  # nobody would wait for the answer
                break
            (key,) = self.post.send([(node, letter())], seconds=seconds)
            ids[key] = _Sent(node, limit(node))
        return ids
