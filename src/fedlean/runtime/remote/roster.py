"""Which node is which client: nodes are asked when they appear, and admitted or not."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from functools import partial
from statistics import median
from typing import NamedTuple

from fedlean.data.labels import listed
from fedlean.printable import printable
from fedlean.runtime.notices import some
from fedlean.runtime.remote import envelope as env
from fedlean.runtime.remote.envelope import Envelope, EnvelopeError, seal, unseal
from fedlean.runtime.remote.exchange import Exchange, Failed, Letter, Letters
from fedlean.runtime.remote.holding import Holding, mismatch

HELLO_SECONDS = 60.0  # for an answer, while too few clients are there
AGAIN_SECONDS = 60.0  # until a node that gave none is asked again: it may be at work
KNOCK_SECONDS = 1.0  # for any other answer; a later one counts all the same
GREETING = "its greeting"
MUCH = 1000  # times what others hold, of examples, from which on a client owns the mean


class _No(NamedTuple):
    """Why a node cannot take part: for the log, and for the node, if that may not read the same.

    rival: the node that has `client`, without which it could.
    """

    why: str
    told: str = ""
    rival: int | None = None
    client: int = 0


class Roster:
    """The clients of one run, numbered 0 to `clients` - 1.

    A node that names its number has it; to others the lowest free one is given.  Where one device
    claims it by two connections, the newest has it: the other is not known to be dead yet.  Where
    two devices do, the first keeps it and the second is refused; and where another came while it
    was away, the one whose update was the first to count has it back.

    A device is known by words that it alone and the server know.  What comes before their last
    space may be shown, and no node is told any of them.
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
        self._owner: dict[int, str] = {}  # client -> device whose update was the first to count
        self._left: set[int] = set()  # nodes that were gone: asked anew when they are back
        self._refused: dict[int, _No] = {}  # by node
        self._untold: set[int] = set()  # of those, whom nobody has told
        self._asked: dict[int, float] = {}  # node -> when, if it has not answered
        self._hung_up: set[int] = set()  # of those, who are gone
        self._lacking: dict[int, int] = {}  # new client -> classes of which it has no example
        self.num_examples: dict[int, int] = {}  # by client, as it said when it joined
        self.num_classes: dict[int, int] = {}  # the same of the classes it has examples of
        self.memory_bytes: dict[int, int | None] = {}  # the same of what a task may take
        self._owners: set[int] = set()  # clients that have been said to hold most of them
        self._spoken: set[int] = set()  # clients that have answered a greeting
        self._notes: list[str] = []

    def present(
        self, run: str, *, seconds: float, wanted: int = 0, knock: Collection[int] = ()
    ) -> dict[int, int]:
        """Client -> node, of those that are connected; asks new nodes for at most `seconds`.

        wanted: how many clients must be there; for more of them it hardly waits, since a node that
        never answers can be there at any time.  knock: clients that are greeted once more, to see
        whether they are there.
        """
        nodes = set(self._exchange.post.nodes())
        self._forget(nodes)
        patience = HELLO_SECONDS if len(self._among(nodes)) < wanted else KNOCK_SECONDS
        again = {self.node[client] for client in knock if client in self.node}
        self._greet(nodes, run, min(patience, seconds), again)
        return self._among(nodes)

    def served(self, clients: Iterable[int]) -> None:
        """Their updates count."""
        for client in clients:
            if device := self._device.get(self.node.get(client, 0)):
                self._owner.setdefault(client, device)

    def spoken(self) -> set[int]:
        """Clients that have answered a greeting since the last call."""
        spoken, self._spoken = self._spoken, set()
        return spoken

    def late(self, node: int, content: bytes | Failed) -> None:
        """A greeting's answer that came when nobody waited for it."""
        nodes = set(self._exchange.post.nodes())
        if node in nodes and node not in self._refused:
            self._answered(node, content, nodes)
            self._note_owners()

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

    def _forget(self, nodes: Set[int]) -> None:
        """What holds no more now that these nodes are connected."""
        self._left |= set(self.node.values()) - nodes
        self._refused = {n: no for n, no in self._refused.items() if self._stands(n, no, nodes)}
        self._untold &= self._refused.keys()
        soon = time.monotonic() - AGAIN_SECONDS
        self._asked = {n: when for n, when in self._asked.items() if n in nodes or when > soon}
        known = nodes | set(self.node.values())
        self._device = {node: who for node, who in self._device.items() if node in known}

    def _stands(self, node: int, no: _No, nodes: Set[int]) -> bool:
        there = node in nodes
        if no.rival is None:
            return there
        return there and no.rival in nodes and self.node.get(no.client) == no.rival

    def _among(self, nodes: Collection[int]) -> dict[int, int]:
        there = set(nodes) - self._left
        return {client: node for client, node in sorted(self.node.items()) if node in there}

    def _greet(self, nodes: Set[int], run: str, seconds: float, knock: Collection[int]) -> None:
        now = time.monotonic()
        known = {*self.node.values(), *self._refused} - self._left - set(knock)
        waiting = {node for node, when in self._asked.items() if now - when < AGAIN_SECONDS}
        back = self._hung_up & nodes
        asked = nodes - known - (waiting - back)
        silent = {node for node in asked if node in self._asked or node in knock}
        self._asked |= dict.fromkeys(asked, now)
        self._hung_up = self._asked.keys() - nodes
        hello = partial(self._hello, run)
        self._ask(dict.fromkeys(sorted(asked - silent), hello), nodes, seconds)
        told = {node: self._refused[node] for node in self._untold}
        self._untold = set()
        letters: dict[int, Letter] = dict.fromkeys(sorted(silent), hello)
        letters |= {node: partial(hello, no.told or no.why) for node, no in told.items()}
        self._ask(letters, nodes, min(KNOCK_SECONDS, seconds))

    def _ask(self, letters: Letters, nodes: Set[int], seconds: float) -> None:
        def take(node: int, content: bytes | Failed) -> Letters:
            if node not in self._refused:  # else it has been told
                self._answered(node, content, nodes)
            return {}

        if letters:
            ends = time.monotonic() + max(1.0, seconds)
            self._exchange.run(letters, ends=ends, about=GREETING, take=take)
            self._note_owners()

    def _hello(self, run: str, refused: str | None = None) -> bytes:
        fields = {"run": run, **self._expected.to_fields(), "refused": refused}
        return seal(Envelope(env.HELLO, fields))

    def _answered(self, node: int, content: bytes | Failed, nodes: Set[int]) -> None:
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
        before, self._device[node] = self._device.get(node), printable(fields["device"])
        client = fields["client"]
        if client is None:
            client = self._number(node, nodes)
        rival = self.node.get(client)
        same = rival == node and node not in self._left
        if no := self._problem(client, node, held, nodes):
            self._refuse(node, no)
            return
        if rival is not None and rival in nodes - {node}:
            self._replaced(rival, node, client)
        self.node = {c: n for c, n in self.node.items() if n != node} | {client: node}
        self._left.discard(node)
        self._spoken.add(client)
        self.num_examples[client] = fields["num_examples"]
        self.num_classes[client] = len(set(held.classes))
        self.memory_bytes[client] = fields["memory_bytes"]
        if not (same and before == self._device[node]):
            self._admitted(client, node, printable(fields["name"]), fields["num_examples"], held)

    def _replaced(self, rival: int, node: int, client: int) -> None:
        no = _No(f"node {node} is client {client} now")
        if self._device.get(rival) == self._device[node]:  # it is dead, and has nothing to be told
            self._refused[rival] = no
        else:
            self._refuse(rival, no._replace(rival=node, client=client))

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

    def _number(self, node: int, nodes: Set[int]) -> int:
        """The one that it had, or the lowest that is free or whose node is gone."""
        had = [client for client, other in self.node.items() if other == node]
        had += [client for client, device in self._owner.items() if device == self._device[node]]
        free = [c for c in range(self._clients) if self.node.get(c) not in nodes]
        return next(iter([*had, *free]), self._clients)

    def _problem(self, client: int, node: int, held: Holding, nodes: Set[int]) -> _No | None:
        if client >= self._clients:
            return _No(f"it is client {client}, the run has {self._clients}, numbered from 0")
        why = mismatch(held, self._expected)
        return self._claimed_twice(client, node, nodes) if why is None else _No(why)

    def _claimed_twice(self, client: int, node: int, nodes: Set[int]) -> _No | None:
        rival, mine = self.node.get(client, node), self._device[node]
        known = self._device.get(rival)
        if rival not in nodes - {node} or mine in (known, self._owner.get(client)):
            return None
        has = "which has it"
        if known is None:
            has = "which had it before the server started again, and has not answered yet"
        why, told = (
            f"number {client} is claimed twice: by {by(rival)}, {has}, and by {by(node)}: give "
            "each its own --client"
            for by in (self._named, lambda node: f"node {node}")
        )
        return _No(why, told, rival, client)

    def _named(self, node: int) -> str:
        """With what may be shown of the device that it says it is."""
        shown = self._device.get(node, "").rpartition(" ")[0]
        return f"node {node} ({shown})" if shown else f"node {node}"

    def _refuse(self, node: int, no: _No) -> None:
        self._refused[node] = no._replace(why=printable(no.why)[:1000], told=no.told[:1000])
        self._untold.add(node)
        self.node = {client: other for client, other in self.node.items() if other != node}
        self._left.discard(node)
        line = f"node {node} cannot take part: {self._refused[node].why}"
        self._say(line)
        self._notes.append(line)
