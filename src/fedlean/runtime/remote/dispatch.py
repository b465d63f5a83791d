"""Dispatch to devices that may be slow, silent, forgetful or gone; `Post` carries the bytes.

A round ends when all have answered or at its deadline.  With fewer answers than `min_replies` none
is used: the runtime says so and asks again.  Replies wait on disk, so that memory stays flat.
"""

from __future__ import annotations

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
from fedlean.runtime.remote.attendance import Attendance, NobodyThere, Terms
from fedlean.runtime.remote.envelope import Envelope, EnvelopeError, seal, unseal
from fedlean.runtime.remote.exchange import Exchange, Failed, Letter, Letters, Post, printable
from fedlean.runtime.remote.holding import expected_by
from fedlean.runtime.remote.replysize import Statistics, reply_bytes
from fedlean.runtime.remote.roster import GREETING, Roster
from fedlean.runtime.waiting import NoRoom, Waiting, read

SPARE_BYTES = 1 << 22  # of a reply, for headers, metrics and small statistics
EARLY_BYTES = 1 << 28  # of late replies that are kept in memory for the next attempt
REFUSAL_SECONDS = 600.0  # until a client that will not do a task is asked for the same again


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


__all__ = ["Failed", "NobodyThere", "RemoteDispatch", "Terms"]


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
        statistics: Statistics | None = None,
    ):
        """`check` is called before a step and before its updates are used, and may raise.

        statistics: of the method, by which the size of replies is bounded; None: more loosely.
        Raises ValueError where the names of the classes are too long to be sent, or `terms` ask for
        more clients than there are.
        """
        self._check = check
        self._statistics = statistics
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
        for name in ("min_clients", "min_replies"):
            if (least := getattr(terms, name)) > clients:
                raise ValueError(
                    f"{name.replace('_', '-')} is {least}, and the run has {clients} clients: "
                    "lower it, or raise clients"
                )
        self._roster = Roster(self._exchange, expected=expected, clients=clients, say=say)
        self._attendance = Attendance(self._exchange, self._roster, terms, say=say)
        self._exchange.late = self._late
        self._store = ClientStore()  # the runtime's own, set by `begin`
        self._step = 0
        self._committed: dict[int, int] = {}  # client -> step after which its state counts
        self._seconds: dict[int, float] = {}
        self._troubles: dict[int, str] = {}
        self._repeated_bytes = 0
        self._final: dict[int, _Refusal] = {}  # by client
        self._asked: set[int] = set()  # clients to which a task went out in the last call
        self._silent: set[int] = set()  # of those, who gave no answer
        self._early: dict[int, bytes] = {}  # by client: a reply to this step, come between attempts

    def begin(self, store: ClientStore, step: int) -> list[Device]:
        """Clients whose nodes are connected, as `Attendance.gather` says.  Raises NobodyThere."""
        self._check()
        if step != self._step:
            self._early = {}
        self._store, self._step = store, step
        return self._attendance.gather(self._run, step)

    def __call__(self, tasks: Sequence[ClientTask], refuse: Refuse) -> Iterator[ClientUpdate]:
        """Updates in the order of `tasks`; none, where fewer than `min_replies` are good."""
        self._seconds, self._troubles, self._repeated_bytes = {}, {}, 0
        self._asked, self._silent = set(), set()
        began = time.monotonic()
        enough = min(self._terms.min_replies, len(tasks))
        with Waiting("fedlean-replies-") as waiting:
            asked = {task.client: task for task in tasks}
            replies = self._collect(asked, enough, waiting)
            self._check()
            good, decoded = self._good(replies, asked, refuse, enough)
            if good < enough:
                self._attendance.in_vain(self._silent, began)
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
        self, asked: Mapping[int, ClientTask], enough: int, waiting: Waiting
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
                return {node: partial(self._letter, asked[client], ends, whole=True)}
            if update is not None:
                try:
                    replies[client] = waiting.keep(update.body, "its reply")
                except NoRoom as error:
                    self._trouble(client, str(error))
            return {}

        def limit(node: int) -> int:
            return reply_bytes(asked[client_of[node]], self._statistics)

        letters: dict[int, Letter] = {
            nodes[client]: partial(self._letter, asked[client], ends) for client in nodes
        }
        for client in nodes.keys() & self._early.keys():
            del letters[nodes[client]]
            letters.update(take(nodes[client], self._early.pop(client)))
        about = self._about()
        self._exchange.run(letters, ends=ends, about=about, take=take, limit=limit)
        for client in asked.keys() - replies.keys() - self._troubles.keys():
            self._trouble(client, f"no reply within {self._terms.deadline_seconds:g} s")
            if client in self._asked:  # to others nothing went out in time
                self._silent.add(client)
                self._attendance.patience.missed(client, self._step)
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
            self._silent.add(client)
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

    def _letter(self, task: ClientTask, ends: float, *, whole: bool = False) -> bytes:
        """ends: the monotonic second of the deadline."""
        self._asked.add(task.client)
        known = wire.Known() if whole else self._store.known(task.client)
        fields = {
            "run": self._run,
            "method": self._method,
            "step": self._step,
            "committed": self._committed.get(task.client),
            "classes": list(self._dataset.class_names),
            "mean": self._dataset.mean.tolist(),
            "std": self._dataset.std.tolist(),
            "deadline_seconds": max(1.0, ends - time.monotonic()),
        }
        body = wire.encode_task(task, known)
        if whole:
            self._repeated_bytes += len(body)
        return seal(Envelope(env.TASK, fields, body))

    def _update(self, task: ClientTask, content: bytes | Failed) -> Envelope | Missing | None:
        """The envelope of an update; None where there is none, which is noted."""
        client = task.client
        if isinstance(content, Failed):
            self._silent.add(client)
            return self._trouble(client, content.reason)
        patience = self._attendance.patience
        try:
            envelope = unseal(content, expected=(env.UPDATE, env.TROUBLE))
        except EnvelopeError as error:
            return self._trouble(client, str(error))
        fields = envelope.fields
        if envelope.kind == env.TROUBLE:
            if fields["gave_up"]:
                patience.missed(client, self._step, slow=True)
                return self._trouble(client, fields["reason"])
            patience.answered(client)
            if fields["missing"]:
                return Missing(fields["missing"], fields["reason"])
            if fields["final"]:
                until = time.monotonic() + REFUSAL_SECONDS
                self._final[client] = _Refusal(printable(fields["reason"]), _model(task), until)
            return self._trouble(client, fields["reason"])
        if fields["step"] != self._step:
            return self._trouble(client, f"answered step {fields['step']}, expected {self._step}")
        patience.answered(client)
        if fields["lost_state"]:
            self._say(f"client {client} has lost what it kept between rounds")
        claimed = float(fields["seconds"])
        self._seconds[client] = min(max(0.0, claimed), self._terms.deadline_seconds)
        return envelope

    def _late(self, node: int, about: str, content: bytes | Failed) -> bool:
        """Of a reply that nobody waited for: whether it is of use, if only later."""
        if about == GREETING:
            self._roster.late(node, content)
            return True
        client = next((c for c, n in self._roster.node.items() if n == node), None)
        if client is None or isinstance(content, Failed):
            return False
        try:
            envelope = unseal(content, expected=(env.UPDATE, env.TROUBLE))
        except EnvelopeError:
            return False
        self._attendance.heard(client)
        if envelope.kind == env.TROUBLE and envelope.fields["gave_up"]:
            self._attendance.patience.gave_up(client)
            return False
        self._attendance.patience.spoke(client)
        room = EARLY_BYTES - sum(map(len, self._early.values())) - len(content)
        if about != self._about() or envelope.kind != env.UPDATE or room < 0:
            return False
        self._early[client] = content
        return True

    def _about(self) -> str:
        return f"step {self._step}"

    def _trouble(self, client: int, reason: str) -> None:
        reason = printable(reason)
        self._troubles[client] = reason
        self._say(f"client {client}: {reason}")

    def acknowledge(self, taken: Iterable[int], refused: Iterable[int]) -> None:
        for client in taken:
            self._committed[client] = self._step
            self._attendance.patience.taken(client)
        for client in refused:
            self._attendance.patience.refused(client, self._step)

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
        return [*self._roster.notes(), *self._attendance.patience.notes()]

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
            read(path, "its reply"), task, limit_bytes=limit, allow_nonfinite=True, packed=True
        )
    except (wire.WireError, NoRoom) as error:
        return str(error)
