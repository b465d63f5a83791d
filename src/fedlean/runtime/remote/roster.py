"""Which node is which client: nodes are asked when they appear, and admitted or not."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from statistics import median
from typing import NamedTuple

from fedlean.data.labels import listed
from fedlean.runtime.notices import some
from fedlean.runtime.remote import envelope as env
from fedlean.runtime.remote.envelope import Envelope, EnvelopeError, seal, unseal
from fedlean.runtime.remote.exchange import Exchange, Failed, Letters, printable
from fedlean.runtime.remote.holding import Holding, mismatch

HELLO_SECONDS = 60.0  # for an answer
AGAIN_SECONDS = 60.0  # until a node that gave none is asked again: it may be at work
KNOCK_SECONDS = 1.0  # for the answer of one that was silent; a later one counts all the same
GREETING = "its greeting"
MUCH = 1000  # times what others hold, of examples, from which on a client owns the mean


class _No(NamedTuple):
    """Why a node cannot take part, and the node without which it could."""

    why: str
    rival: tuple[int, ...] = ()


class Roster:
    """The clients of one run, numbered 0 to `clients` - 1.

    A node that names its number has it; to others the lowest free one is given.  Where one device
    claims it by two connections, the newest has it: the other is not known to be dead yet.  Where
    two devices do, the first keeps it and the second is refused.
    """

    def __init__(
        self, exchange: Exchange, *, expected: Holding, clients: int, say: Callable[[str], None]
    ):
        self._exchange = exchange
        self._expected = expected
        self._clients = clients
        self._say = say
        self.node: dict[int, int] = {}  # client -> node
        self._device: dict[int, str] = {}  # node -> who it says it is
        self._left: set[int] = set()  # nodes that were gone: asked anew when they are back
        self._refused: dict[int, _No] = {}  # by node
        self._asked: dict[int, float] = {}  # node -> when, if it has not answered
        self._lacking: dict[int, int] = {}  # new client -> classes of which it has no example
        self.num_examples: dict[int, int] = {}  # by client, as it said when it joined
        self._owners: set[int] = set()  # clients that have been said to hold most of them
        self._spoken: set[int] = set()  # clients that have answered a greeting
        self._notes: list[str] = []

    def present(self, run: str, *, seconds: float, knock: Collection[int] = ()) -> dict[int, int]:
        """Client -> node, of those that are connected; asks new nodes for at most `seconds`.

        knock: clients that are greeted once more, to see whether they are there.
        """
        nodes = set(self._exchange.post.nodes())
        self._left |= set(self.node.values()) - nodes
        self._refused = {n: no for n, no in self._refused.items() if {n, *no.rival} <= nodes}
        self._asked = {node: when for node, when in self._asked.items() if node in nodes}
        self._greet(nodes, run, seconds, {self.node[c] for c in knock if c in self.node})
        return self._among(nodes)

    def spoken(self) -> set[int]:
        """Clients that have answered a greeting since the last call."""
        spoken, self._spoken = self._spoken, set()
        return spoken

    def late(self, node: int, content: bytes | Failed) -> None:
        """A greeting's answer that came when nobody waited for it."""
        nodes = set(self._exchange.post.nodes())
        if node in nodes and node not in self._refused:
            self._answered(node, content, nodes)

    def refused(self) -> Sequence[str]:
        """Of the nodes that are connected and cannot take part, who and why."""
        return [f"node {node}: {no.why}" for node, no in self._refused.items()]

    def notes(self) -> list[str]:
        """What came up since the last call that the run's user should know."""
        notes, self._notes = self._notes, []
        if self._lacking:
            each = [f"client {client} lacks {count}" for client, count in self._lacking.items()]
            notes.append(
                f"{len(each)} of the clients that joined have no example of some of the "
                f"{len(self._expected.classes)} classes: {some(each)}"
            )
            self._lacking = {}
        return notes

    def known(self) -> dict[int, int]:
        """The same of those that were asked before."""
        return self._among(self._exchange.post.nodes())

    def expect(self, node: Mapping[int, int]) -> None:
        """Numbers that nodes had before the server started again; they are asked all the same."""
        self.node = dict(node)
        self._left = set(node.values())

    def _among(self, nodes: Collection[int]) -> dict[int, int]:
        there = set(nodes) - self._left
        return {client: node for client, node in sorted(self.node.items()) if node in there}

    def _greet(
        self, nodes: Collection[int], run: str, seconds: float, knock: Collection[int]
    ) -> None:
        now = time.monotonic()
        known = {*self.node.values(), *self._refused} - self._left - set(knock)
        waiting = {node for node, when in self._asked.items() if now - when < AGAIN_SECONDS}
        asked = set(nodes) - known - waiting
        silent = {node for node in asked if node in self._asked or node in knock}
        self._asked |= dict.fromkeys(asked, now)
        for group, patience in ((asked - silent, HELLO_SECONDS), (silent, KNOCK_SECONDS)):
            if group:
                self._ask(sorted(group), nodes, run, max(1.0, min(patience, seconds)))

    def _ask(self, new: Sequence[int], nodes: Collection[int], run: str, seconds: float) -> None:
        letters = dict.fromkeys(new, partial(self._hello, run))

        def take(node: int, content: bytes | Failed) -> Letters:
            if node in self._refused:  # it has been told
                return {}
            self._answered(node, content, nodes)
            no = self._refused.get(node)
            return {} if no is None else {node: partial(self._hello, run, no.why)}

        ends = time.monotonic() + seconds
        self._exchange.run(letters, ends=ends, about=GREETING, take=take)
        self._note_owners()

    def _hello(self, run: str, refused: str | None = None) -> bytes:
        fields = {"run": run, **self._expected.to_fields(), "refused": refused}
        return seal(Envelope(env.HELLO, fields))

    def _answered(self, node: int, content: bytes | Failed, nodes: Collection[int]) -> None:
        if isinstance(content, Failed):
            self._say(f"node {node}: {content.reason}")
            return
        self._asked.pop(node, None)
        try:
            fields = unseal(content, expected=(env.WELCOME,)).fields
        except EnvelopeError as error:
            self._refuse(node, _No(str(error)))
            return
        held = Holding.from_fields(fields)
        client = fields["client"]
        if client is None:
            client = self._number(node, nodes)
        before, self._device[node] = self._device.get(node), printable(fields["device"])
        same = self.node.get(client) == node and node not in self._left
        if no := self._problem(client, node, held, nodes):
            self._refuse(node, no)
            return
        if self.node.get(client) in set(nodes) - {node}:
            self._refused[self.node[client]] = _No(f"node {node} is client {client} now")
        self.node = {c: n for c, n in self.node.items() if n != node} | {client: node}
        self._left.discard(node)
        self._spoken.add(client)
        self.num_examples[client] = fields["num_examples"]
        if not (same and before == self._device[node]):
            self._admitted(client, node, printable(fields["name"]), fields["num_examples"], held)

    def _admitted(self, client: int, node: int, name: str, examples: int, held: Holding) -> None:
        named = f" ({name})" if name else ""
        missing = [one for one in self._expected.classes if one not in set(held.classes)]
        lacks = f", none of {listed(missing)}" if missing else ""
        self._say(f"client {client} is node {node}{named}, {examples} examples{lacks}")
        if missing:
            self._lacking[client] = len(missing)

    def _note_owners(self) -> None:
        """Of clients whose word on their examples, if it is believed, makes them the mean."""
        for client, count in self.num_examples.items():
            others = [n for other, n in self.num_examples.items() if other != client]
            if client not in self._owners and others and count > MUCH * max(1, median(others)):
                self._owners.add(client)
                line = (
                    f"client {client} says that it has {count} examples, more than {MUCH} times "
                    f"the median of the others ({median(others):g}): weighted means are its own"
                )
                self._say(line)
                self._notes.append(line)

    def _number(self, node: int, nodes: Collection[int]) -> int:
        """The one that it had, or the lowest that is free or whose node is gone."""
        had = [client for client, other in self.node.items() if other == node]
        free = [c for c in range(self._clients) if self.node.get(c) not in nodes]
        return next(iter([*had, *free]), self._clients)

    def _problem(self, client: int, node: int, held: Holding, nodes: Collection[int]) -> _No | None:
        if client >= self._clients:
            return _No(f"it is client {client}, the run has {self._clients}, numbered from 0")
        rival = self.node.get(client, node)
        other = self._device.get(rival)  # None: it joined before the server started again
        if rival in set(nodes) - {node} and other not in (None, self._device[node]):
            why = (
                f"number {client} is claimed twice: by {other} (node {rival}), which has it, and "
                f"by {self._device[node]} (node {node}): give each its own --client"
            )
            return _No(why, (rival,))
        why = mismatch(held, self._expected)
        return None if why is None else _No(why)

    def _refuse(self, node: int, no: _No) -> None:
        self._refused[node] = no._replace(why=printable(no.why)[:1000])
        self._left.discard(node)
        line = f"node {node} cannot take part: {self._refused[node].why}"
        self._say(line)
        self._notes.append(line)
