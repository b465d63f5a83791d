"""Which node is which client: nodes are asked when they appear, and admitted or not."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from fedlean.data.dataset import Dataset
from fedlean.runtime.remote import envelope as env
from fedlean.runtime.remote.envelope import Envelope, EnvelopeError, seal, unseal
from fedlean.runtime.remote.exchange import Exchange, Failed, Letters, printable

HELLO_SECONDS = 60.0  # for an answer
AGAIN_SECONDS = 60.0  # until a node that gave none is asked again: it may be at work


class Roster:
    """The clients of one run, numbered 0 to `clients` - 1.

    A node that names its number has it; to others the lowest free one is given.  Where two claim
    one, the newest has it: the other is most often a connection that is not known to be dead yet.
    """

    def __init__(
        self, exchange: Exchange, *, dataset: Dataset, clients: int, say: Callable[[str], None]
    ):
        self._exchange = exchange
        self._dataset = dataset
        self._clients = clients
        self._say = say
        self.node: dict[int, int] = {}  # client -> node
        self._left: set[int] = set()  # nodes that were gone: asked anew when they are back
        self._refused: dict[int, str] = {}  # node -> why
        self._asked: dict[int, float] = {}  # node -> when, if it has not answered

    def present(self, run: str, *, seconds: float) -> dict[int, int]:
        """Client -> node, of those that are connected; asks new nodes for at most `seconds`."""
        nodes = set(self._exchange.post.nodes())
        self._left |= set(self.node.values()) - nodes
        self._refused = {node: why for node, why in self._refused.items() if node in nodes}
        self._asked = {node: when for node, when in self._asked.items() if node in nodes}
        self._greet(nodes, run, seconds)
        return self._among(nodes)

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

    def _greet(self, nodes: Collection[int], run: str, seconds: float) -> None:
        now = time.monotonic()
        known = {*self.node.values(), *self._refused} - self._left
        waiting = {node for node, when in self._asked.items() if now - when < AGAIN_SECONDS}
        new = sorted(set(nodes) - known - waiting)
        if not new:
            return
        self._asked |= dict.fromkeys(new, now)
        hello = seal(Envelope(env.HELLO, {"run": run}))
        ends = now + max(1.0, min(HELLO_SECONDS, seconds))
        letters = dict.fromkeys(new, lambda: hello)

        def take(node: int, content: bytes | Failed) -> Letters:
            self._answered(node, content, nodes)
            return {}

        self._exchange.run(letters, ends=ends, about="its greeting", take=take)

    def _answered(self, node: int, content: bytes | Failed, nodes: Collection[int]) -> None:
        if isinstance(content, Failed):
            self._say(f"node {node}: {content.reason}")
            return
        del self._asked[node]
        try:
            fields = unseal(content, expected=(env.WELCOME,)).fields
        except EnvelopeError as error:
            self._refuse(node, str(error))
            return
        client = fields["client"]
        if client is None:
            client = self._number(node, nodes)
        if problem := self._problem(client, fields):
            self._refuse(node, problem)
            return
        if self.node.get(client) in set(nodes) - {node}:
            self._refused[self.node[client]] = f"node {node} is client {client} now"
        self.node = {c: n for c, n in self.node.items() if n != node} | {client: node}
        self._left.discard(node)
        name = f" ({printable(fields['name'])})" if fields["name"] else ""
        self._say(f"client {client} is node {node}{name}, {fields['num_examples']} examples")

    def _number(self, node: int, nodes: Collection[int]) -> int:
        """The one that it had, or the lowest that is free or whose node is gone."""
        had = [client for client, other in self.node.items() if other == node]
        free = [c for c in range(self._clients) if self.node.get(c) not in nodes]
        return next(iter([*had, *free]), self._clients)

    def _problem(self, client: int, fields: Mapping[str, Any]) -> str | None:
        dataset = self._dataset
        if client >= self._clients:
            return f"it is client {client}, the run has {self._clients}, numbered from 0"
        if tuple(fields["input_shape"]) != dataset.input_shape:
            return f"its examples are {fields['input_shape']}, not {list(dataset.input_shape)}"
        if fields["classes"] > dataset.classes:
            return f"it has {fields['classes']} classes, the run {dataset.classes}"
        return None

    def _refuse(self, node: int, why: str) -> None:
        self._refused[node] = printable(why)
        self._left.discard(node)
        self._say(f"node {node} cannot take part: {printable(why)}")
