"""Dispatch to devices that may be slow, silent, forgetful or gone; `Post` carries the bytes.

A round ends when all have answered or at its deadline.  With fewer answers than `min_replies` none
is used: the runtime says so and asks again.  Replies wait on disk, so that memory stays flat.
"""

from __future__ import annotations

import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from fedlean import wire
from fedlean.core import ClientState, ClientTask, ClientUpdate, Device
from fedlean.data.dataset import Dataset
from fedlean.runtime.clientstore import ClientStore
from fedlean.runtime.local import Refuse
from fedlean.runtime.remote import envelope as env
from fedlean.runtime.remote.envelope import Envelope, EnvelopeError, seal, unseal
from fedlean.runtime.remote.exchange import Exchange, Failed, Letters, Post, printable
from fedlean.runtime.remote.holding import expected_by
from fedlean.runtime.remote.roster import Roster

SPARE_BYTES = 1 << 22  # of a reply, for headers, metrics and small statistics
REFUSAL_SECONDS = 600.0  # until a client that will not do a task is asked for the same again


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


@dataclass(frozen=True)
class Missing:
    """A device lacks the spec or the pattern that the server took for granted."""

    what: str
    reason: str


@dataclass(frozen=True)
class _Refusal:
    """A client will not do a task, and would not if it were asked again."""

    reason: str
    model: tuple[str, str]  # of the task, as `_model` names it
    until: float  # monotonic seconds; its operator may have changed something by then


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
        check: Callable[[], None] = lambda: None,
    ):
        """`check` is called before a step and before its updates are used, and may raise.

        Raises ValueError where the names of the classes are too long to be sent.
        """
        self._check = check
        self._run = uuid.uuid4().hex  # by which devices file what they keep
        self._method = method
        self._dataset = dataset
        self._terms = terms
        self._say = say
        self._exchange = Exchange(post, poll_seconds=terms.poll_seconds, say=say)
        expected = expected_by(dataset)
        seal(
            Envelope(env.HELLO, expected.to_fields())
        )  # raises here rather than in the first round
        self._roster = Roster(self._exchange, expected=expected, clients=clients, say=say)
        self._store = ClientStore()  # the runtime's own, set by `begin`
        self._step = 0
        self._committed: dict[int, int] = {}  # client -> step after which its state counts
        self._seconds: dict[int, float] = {}
        self._troubles: dict[int, str] = {}
        self._repeated_bytes = 0
        self._final: dict[int, _Refusal] = {}  # by client

    def begin(self, store: ClientStore, step: int) -> list[Device]:
        """The clients whose nodes are connected, once there are `min_clients` of them.

        Raises NobodyThere after `join_seconds`.
        """
        self._check()
        self._store, self._step = store, step
        wanted, seconds = self._terms.min_clients, self._terms.join_seconds
        ends = time.monotonic() + seconds
        said = False
        while True:
            here = self._roster.present(self._run, seconds=ends - time.monotonic())
            if len(here) >= wanted:
                return [Device(client) for client in here]
            line = f"{len(here)} of {wanted} clients are connected"
            if time.monotonic() >= ends:
                refused = "; refused: ".join(["", *self._roster.refused()])
                raise NobodyThere(
                    f"{line} after {seconds:g} s{refused}: start the missing ones, or lower "
                    "min-clients, and submit the run again with the same folder"
                )
            if not said:
                self._say(f"waiting: {line}")
                said = True
            time.sleep(self._terms.poll_seconds)

    def __call__(self, tasks: Sequence[ClientTask], refuse: Refuse) -> Iterator[ClientUpdate]:
        """Updates in the order of `tasks`; none, where fewer than `min_replies` are good."""
        self._seconds, self._troubles, self._repeated_bytes = {}, {}, 0
        enough = min(self._terms.min_replies, len(tasks))
        with tempfile.TemporaryDirectory(prefix="fedlean-replies-") as folder:
            asked = {task.client: task for task in tasks}
            replies = self._collect(asked, enough, Path(folder))
            self._check()
            good, decoded = self._good(replies, asked, refuse, enough)
            if good < enough:
                self._say(
                    f"round {tasks[0].round}: {good} of {len(tasks)} gave an answer that can be "
                    f"used within {self._terms.deadline_seconds:g} s, {enough} are needed: nothing "
                    "is aggregated"
                )
                return
            for task in tasks:
                if task.client in replies:
                    path = replies.pop(task.client)
                    update = decoded.pop(task.client, None) or _decoded(path, task)
                    if isinstance(update, ClientUpdate):
                        yield update
                    else:
                        self._trouble(task.client, update)

    def _good(
        self,
        replies: Mapping[int, Path],
        asked: Mapping[int, ClientTask],
        refuse: Refuse,
        enough: int,
    ) -> tuple[int, dict[int, ClientUpdate]]:
        """How many replies can be used, counted up to `enough`; with fewer, why not the others.

        And the first of them, decoded.  The others are decoded once more when they are used: all of
        them together may not fit into memory.
        """
        good, objections, first = 0, dict[int, str](), dict[int, ClientUpdate]()
        for client, path in replies.items():
            if good == enough:
                break
            update = _decoded(path, asked[client])
            why = update if isinstance(update, str) else refuse(update, asked[client])
            if why is not None:
                objections[client] = why
                continue
            good += 1
            if not first and isinstance(update, ClientUpdate):
                first[client] = update
        if good < enough:
            for client, why in objections.items():
                self._trouble(client, why)
        return good, first

    def _collect(
        self, asked: Mapping[int, ClientTask], enough: int, folder: Path
    ) -> dict[int, Path]:
        """Replies on disk, by client."""
        ends = time.monotonic() + self._terms.deadline_seconds
        asked = self._willing(asked)
        if len(asked) < enough:  # nothing would be aggregated
            return {}
        nodes = self._connected(asked, enough, ends)
        client_of = {node: client for client, node in nodes.items()}
        repeated: set[int] = set()
        replies: dict[int, Path] = {}

        def take(node: int, content: bytes | Failed) -> Letters:
            client = client_of[node]
            update = self._update(asked[client], content)
            if isinstance(update, Missing):
                if client in repeated:
                    self._trouble(client, update.reason)
                    return {}
                repeated.add(client)
                self._say(f"client {client} lacks the {update.what}: it is sent again")
                return {node: partial(self._letter, asked[client], whole=True)}
            if update is not None:
                replies[client] = folder / str(client)
                replies[client].write_bytes(update.body)
            return {}

        letters = {nodes[client]: partial(self._letter, asked[client]) for client in nodes}
        self._exchange.run(letters, ends=ends, about=f"step {self._step}", take=take)
        for client in asked.keys() - replies.keys() - self._troubles.keys():
            self._trouble(client, f"no reply within {self._terms.deadline_seconds:g} s")
        return replies

    def _connected(
        self, asked: Mapping[int, ClientTask], enough: int, ends: float
    ) -> dict[int, int]:
        """Nodes of those clients that are there, once they can be enough, or at `ends`.

        A round that is asked again often meets nodes that have just died and are coming back.
        """
        here = self._roster.known()
        while True:
            nodes = {client: here[client] for client in asked if client in here}
            if len(nodes) >= enough or time.monotonic() >= ends:
                break
            time.sleep(self._terms.poll_seconds)
            here = self._roster.present(self._run, seconds=ends - time.monotonic())
        for client in asked.keys() - nodes.keys():
            self._trouble(client, "is not connected")
        return nodes

    def _willing(self, asked: Mapping[int, ClientTask]) -> dict[int, ClientTask]:
        """Without those that have just refused the same task for good."""
        now, willing = time.monotonic(), dict(asked)
        for client, task in asked.items():
            refusal = self._final.get(client)
            if refusal and refusal.model == _model(task) and now < refusal.until:
                self._trouble(client, f"{refusal.reason} (it was not asked again)")
                del willing[client]
        return willing

    def _letter(self, task: ClientTask, *, whole: bool = False) -> bytes:
        known = wire.Known() if whole else self._store.known(task.client)
        fields = {
            "run": self._run,
            "method": self._method,
            "step": self._step,
            "committed": self._committed.get(task.client),
            "classes": list(self._dataset.class_names),
            "mean": self._dataset.mean.tolist(),
            "std": self._dataset.std.tolist(),
        }
        body = wire.encode_task(task, known)
        if whole:
            self._repeated_bytes += len(body)
        return seal(Envelope(env.TASK, fields, body))

    def _update(self, task: ClientTask, content: bytes | Failed) -> Envelope | Missing | None:
        """The envelope of an update; None where there is none, which is noted."""
        client = task.client
        if isinstance(content, Failed):
            return self._trouble(client, content.reason)
        try:
            envelope = unseal(content, expected=(env.UPDATE, env.TROUBLE))
        except EnvelopeError as error:
            return self._trouble(client, str(error))
        fields = envelope.fields
        if envelope.kind == env.TROUBLE:
            if fields["missing"]:
                return Missing(fields["missing"], fields["reason"])
            if fields["final"]:
                until = time.monotonic() + REFUSAL_SECONDS
                self._final[client] = _Refusal(printable(fields["reason"]), _model(task), until)
            return self._trouble(client, fields["reason"])
        if fields["step"] != self._step:
            return self._trouble(client, f"answered step {fields['step']}, expected {self._step}")
        if fields["lost_state"]:
            self._say(f"client {client} has lost what it kept between rounds")
        self._seconds[client] = float(fields["seconds"])
        return envelope

    def _trouble(self, client: int, reason: str) -> None:
        reason = printable(reason)
        self._troubles[client] = reason
        self._say(f"client {client}: {reason}")

    def acknowledge(self, clients: Iterable[int]) -> None:
        for client in clients:
            self._committed[client] = self._step

    def client_states(self) -> Mapping[int, ClientState]:
        """Devices keep their own; the server remembers after which step each one's counts."""
        run = np.frombuffer(bytes.fromhex(self._run), np.uint8)
        nodes = self._roster.node
        return {
            client: {
                "step": np.array(step),
                "run": run,
                "node": np.array(nodes.get(client, 0), np.uint64),
            }
            for client, step in self._committed.items()
        }

    def restore(self, states: Mapping[int, ClientState]) -> None:
        if any("run" not in state for state in states.values()):
            raise ValueError(
                "this run's clients were in one process: continue it with 'fedlean resume'"
            )
        self._committed = {client: int(state["step"]) for client, state in states.items()}
        for state in states.values():
            self._run = bytes(state["run"]).hex()
        self._roster.expect({client: int(state["node"]) for client, state in states.items()})

    def measured_seconds(self) -> Mapping[int, float]:
        return dict(self._seconds)

    def repeated_bytes(self) -> int:
        return self._repeated_bytes

    def notes(self) -> Sequence[str]:
        return self._roster.notes()

    def troubles(self) -> Mapping[int, str]:
        """Why clients of the last call gave nothing."""
        return dict(self._troubles)


def _model(task: ClientTask) -> tuple[str, str]:
    """What decides whether a device has the memory for a task."""
    return task.spec.hash, wire.pattern_hash(task.sub_model.masks)


def _decoded(path: Path, task: ClientTask) -> ClientUpdate | str:
    """The update in a reply, or what is wrong with it."""
    limit = 32 * task.spec.num_params + SPARE_BYTES  # values, statistics, masks
    try:
        return wire.decode_update(
            path.read_bytes(), task, limit_bytes=limit, allow_nonfinite=True, packed=True
        )
    except wire.WireError as error:
        return str(error)
