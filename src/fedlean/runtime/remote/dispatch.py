"""Dispatch to devices that may be slow, silent, forgetful or gone; `Post` carries the bytes.

A round ends when all have answered or at its deadline.  With fewer answers than `min_replies` none
is used: the runtime says so and asks again.  Replies wait on disk, so that memory stays flat.
"""

from __future__ import annotations

import tempfile
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fedlean import wire
from fedlean.core import ClientState, ClientTask, ClientUpdate, Device
from fedlean.data.dataset import Dataset
from fedlean.runtime.clientstore import ClientStore
from fedlean.runtime.remote import envelope as env
from fedlean.runtime.remote.envelope import Envelope, EnvelopeError, seal, unseal

SPARE_BYTES = 1 << 20  # of a reply, for headers and metrics


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

    def fetch(self, ids: Collection[str]) -> Iterable[tuple[str, bytes | Failed]]:
        """Replies that have come since, with the message they answer."""
        ...


@dataclass(frozen=True)
class Terms:
    """How long the server waits, and for how many."""

    deadline_seconds: float = 600.0
    min_replies: int = 1
    min_clients: int = 1  # connected before a round starts
    join_seconds: float = 600.0  # how long a round waits for them
    poll_seconds: float = 0.2

    def __post_init__(self) -> None:
        for name in ("deadline_seconds", "join_seconds", "poll_seconds"):
            value = getattr(self, name)
            if not 0 < value < 1e7:
                raise ValueError(f"{name} must be a positive number of seconds, got {value}")
        for name in ("min_replies", "min_clients"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class NobodyThere(RuntimeError):
    """Too few devices are connected; the run can be resumed."""


class RemoteDispatch:
    """tasks -> updates over `post`, for one run."""

    def __init__(
        self,
        post: Post,
        *,
        method: str,
        dataset: Dataset,
        clients: int,
        terms: Terms,
        say: Callable[[str], None],
    ):
        self._post = post
        self._run = uuid.uuid4().hex  # by which devices file what they keep
        self._method = method
        self._dataset = dataset
        self._clients = clients
        self._terms = terms
        self._say = say
        self.store = ClientStore()  # the runtime's own, set by `begin`
        self._step = 0
        self._committed: dict[int, int] = {}  # client -> step after which its state counts
        self._node: dict[int, int] = {}  # client -> node
        self._refused_nodes: dict[int, str] = {}
        self._seconds: dict[int, float] = {}
        self._troubles: dict[int, str] = {}
        self._late: dict[str, str] = {}  # message id -> what it was, of rounds that are over

    # Who is there

    def begin(self, store: ClientStore, step: int) -> list[Device]:
        """The clients whose nodes are connected, once there are `min_clients` of them.

        Raises NobodyThere after `join_seconds`.
        """
        self.store, self._step = store, step
        ends = time.monotonic() + self._terms.join_seconds
        said = False
        while True:
            nodes = set(self._post.nodes())
            self._greet(nodes)
            here = sorted(client for client, node in self._node.items() if node in nodes)
            if len(here) >= self._terms.min_clients:
                return [Device(client) for client in here]
            wanted = f"{len(here)} of {self._terms.min_clients} clients are connected"
            if time.monotonic() >= ends:
                raise NobodyThere(f"{wanted} after {self._terms.join_seconds:g} s")
            if not said:
                self._say(f"waiting: {wanted}")
                said = True
            time.sleep(self._terms.poll_seconds)

    def _greet(self, nodes: set[int]) -> None:
        """Asks nodes that nobody knows yet who they are."""
        known = {*self._node.values(), *self._refused_nodes}
        new = sorted(nodes - known)
        if not new:
            return
        hello = seal(Envelope(env.HELLO, {"run": self._run}))
        replies = self._ask(dict.fromkeys(new, hello), min(60.0, self._terms.join_seconds))
        for node in new:
            if node not in replies:
                continue  # asked again with the next look
            try:
                self._admit(node, nodes, unseal(replies[node], expected=(env.WELCOME,)).fields)
            except EnvelopeError as error:
                self._refused_nodes[node] = str(error)
                self._say(f"node {node} cannot take part: {error}")

    def _admit(self, node: int, nodes: set[int], fields: Mapping[str, Any]) -> None:
        client = fields["client"]
        if client is None:
            client = next((c for c in range(self._clients) if c not in self._node), self._clients)
        problem = None
        if client >= self._clients:
            problem = f"it is client {client}, the run has {self._clients} (0 to its last)"
        elif tuple(fields["input_shape"]) != self._dataset.input_shape:
            problem = f"its examples are {fields['input_shape']}, not {self._dataset.input_shape}"
        elif fields["classes"] > self._dataset.classes:
            problem = f"it has {fields['classes']} classes, the run {self._dataset.classes}"
        if problem:
            self._refused_nodes[node] = problem
            self._say(f"node {node} cannot take part: {problem}")
            return
        if self._node.get(client) in nodes:  # the newest is it: the other may be a dead connection
            self._refused_nodes[self._node[client]] = f"node {node} is client {client} now"
        self._node[client] = node
        name = f" ({fields['name']})" if fields["name"] else ""
        self._say(f"client {client} is node {node}{name}, {fields['num_examples']} examples")

    # A round

    def __call__(self, tasks: Sequence[ClientTask]) -> Iterator[ClientUpdate]:
        self._seconds, self._troubles = {}, {}
        asked = {task.client: task for task in tasks}
        ends = time.monotonic() + self._terms.deadline_seconds
        connected = self._connected(asked, ends)
        for client in asked.keys() - connected:
            self._trouble(client, "is not connected")
        letters = {self._node[client]: self._letter(asked[client]) for client in connected}
        with tempfile.TemporaryDirectory(prefix="fedlean-replies-") as folder:
            replies = self._collect(letters, asked, Path(folder), ends)
            if len(replies) < min(self._terms.min_replies, len(tasks)):
                self._say(
                    f"round {tasks[0].round}: {len(replies)} of {len(tasks)} answered within "
                    f"{self._terms.deadline_seconds:g} s, {self._terms.min_replies} are needed: "
                    "nothing is aggregated"
                )
                return
            for task in tasks:
                if task.client in replies:
                    yield from self._decoded(replies[task.client], task)

    def _connected(self, asked: Collection[int], ends: float) -> list[int]:
        """Those of the clients whose nodes are there, once they can be enough, or at `ends`.

        A round that is asked again often meets nodes that have just died and are coming back.
        """
        enough = min(self._terms.min_replies, len(asked))
        while True:
            nodes = set(self._post.nodes())
            self._greet(nodes)
            there = [client for client in asked if self._node.get(client) in nodes]
            if len(there) >= enough or time.monotonic() >= ends:
                return there
            time.sleep(self._terms.poll_seconds)

    def _letter(self, task: ClientTask, *, whole: bool = False) -> bytes:
        known = wire.Known() if whole else self.store.known(task.client)
        fields = {
            "run": self._run,
            "method": self._method,
            "step": self._step,
            "committed": self._committed.get(task.client),
            "mean": self._dataset.mean.tolist(),
            "std": self._dataset.std.tolist(),
        }
        return seal(Envelope(env.TASK, fields, wire.encode_task(task, known)))

    def _collect(
        self,
        letters: Mapping[int, bytes],
        asked: Mapping[int, ClientTask],
        folder: Path,
        ends: float,
    ) -> dict[int, Path]:
        """Replies on disk by client; who lacks a spec or pattern is sent the whole task once."""
        client_of = {self._node[client]: client for client in asked if client in self._node}
        replies: dict[int, Path] = {}
        repeated: set[int] = set()

        def take(node: int, content: bytes | Failed) -> dict[int, bytes]:
            """Notes one reply; letters to send in turn."""
            client = client_of[node]
            if isinstance(content, Failed):
                self._trouble(client, content.reason)
                return {}
            try:
                envelope = unseal(content, expected=(env.UPDATE, env.TROUBLE))
            except EnvelopeError as error:
                self._trouble(client, str(error))
                return {}
            fields = envelope.fields
            if envelope.kind == env.TROUBLE:
                if fields["missing"] and client not in repeated:
                    repeated.add(client)
                    self._say(f"client {client} lacks the {fields['missing']}: it is sent again")
                    return {node: self._letter(asked[client], whole=True)}
                self._trouble(client, fields["reason"])
                return {}
            if fields["step"] != self._step:
                self._trouble(client, f"answered step {fields['step']}, expected {self._step}")
                return {}
            if fields["lost_state"]:
                self._say(f"client {client} has lost what it kept between rounds")
            self._seconds[client] = float(fields["seconds"])
            replies[client] = folder / str(client)
            replies[client].write_bytes(envelope.body)
            return {}

        self._exchange(letters, ends, take)
        for client in asked.keys() - replies.keys() - self._troubles.keys():
            self._trouble(client, f"no reply within {self._terms.deadline_seconds:g} s")
        return replies

    def _trouble(self, client: int, reason: str) -> None:
        self._troubles[client] = reason
        self._say(f"client {client}: {reason}")

    def _decoded(self, path: Path, task: ClientTask) -> Iterator[ClientUpdate]:
        limit = 8 * task.spec.num_params + 4 * SPARE_BYTES  # values and fp32 statistics
        try:
            update = wire.decode_update(
                path.read_bytes(), task, limit_bytes=4 * limit, allow_nonfinite=True, packed=True
            )
        except wire.WireError as error:
            self._trouble(task.client, str(error))
            return
        finally:
            path.unlink(missing_ok=True)
        yield update

    # Letters and replies

    def _ask(self, letters: Mapping[int, bytes], seconds: float) -> dict[int, bytes]:
        """Replies by node, of those that came in time."""
        out: dict[int, bytes] = {}

        def take(node: int, content: bytes | Failed) -> dict[int, bytes]:
            if isinstance(content, Failed):
                self._say(f"node {node}: {content.reason}")
            else:
                out[node] = content
            return {}

        self._exchange(letters, time.monotonic() + seconds, take)
        return out

    def _exchange(
        self,
        letters: Mapping[int, bytes],
        ends: float,
        take: Callable[[int, bytes | Failed], dict[int, bytes]],
    ) -> None:
        """Sends, and hands every reply to `take` until all have come or the time is over."""
        open_letters = self._send(letters, ends)
        while open_letters and time.monotonic() < ends:
            came = False
            for key, content in self._post.fetch([*open_letters, *self._late]):
                came = True
                if key in self._late:
                    self._say(f"discarded a late reply: {self._late.pop(key)}")
                    continue
                node = open_letters.pop(key, None)
                if node is None:
                    self._say("discarded a second reply to one message")
                    continue
                open_letters |= self._send(take(node, content), ends)
            if open_letters and not came:
                time.sleep(self._terms.poll_seconds)
        for key, node in open_letters.items():
            self._late[key] = f"node {node}, step {self._step}"
        for key in [*self._late][: -4 * self._clients]:  # nobody answers these any more
            del self._late[key]

    def _send(self, letters: Mapping[int, bytes], ends: float) -> dict[str, int]:
        if not letters:
            return {}
        seconds = max(1.0, ends - time.monotonic())
        nodes = [*letters]
        ids = self._post.send([(node, letters[node]) for node in nodes], seconds=seconds)
        return dict(zip(ids, nodes, strict=True))

    # The runtime's seam

    def acknowledge(self, clients: Iterable[int]) -> None:
        for client in clients:
            self._committed[client] = self._step

    def client_states(self) -> Mapping[int, ClientState]:
        """Devices keep their own; the server remembers after which step each one's counts."""
        run = np.frombuffer(bytes.fromhex(self._run), np.uint8)
        return {
            client: {"step": np.array(step), "run": run} for client, step in self._committed.items()
        }

    def restore(self, states: Mapping[int, ClientState]) -> None:
        self._committed = {client: int(state["step"]) for client, state in states.items()}
        for state in states.values():
            self._run = bytes(state["run"]).hex()

    def measured_seconds(self) -> Mapping[int, float]:
        return dict(self._seconds)

    def troubles(self) -> Mapping[int, str]:
        """Why clients of the last call gave nothing."""
        return dict(self._troubles)
