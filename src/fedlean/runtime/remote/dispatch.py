"""Dispatch to devices that may be slow, silent, forgetful or gone; `Post` carries the bytes.

A round ends when all have answered or at its deadline.  With fewer answers than `min_replies` none
is used: the runtime says so and asks again.  Replies wait on disk, so that memory stays flat.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fedlean import wire
from fedlean.algorithm import Device
from fedlean.core import Batches, ClientState, ClientTask, ClientUpdate
from fedlean.data.dataset import Dataset
from fedlean.printable import megabytes, printable
from fedlean.runtime.ceilings import Ceilings
from fedlean.runtime.clientstore import ClientStore
from fedlean.runtime.local import Held, Refuse
from fedlean.runtime.remote import envelope as env
from fedlean.runtime.remote.attendance import Attempt, Attendance, NobodyThere, Present, Terms
from fedlean.runtime.remote.envelope import Envelope, EnvelopeError, seal, unseal
from fedlean.runtime.remote.exchange import Exchange, Failed, Letter, Letters, Post
from fedlean.runtime.remote.holding import expected_by
from fedlean.runtime.remote.normalising import Agreed, agreed, ask
from fedlean.runtime.remote.replysize import Statistics, reply_bytes
from fedlean.runtime.remote.roster import GREETING, Roster
from fedlean.runtime.remote.unwilling import Unwilling
from fedlean.runtime.waiting import NoRoom, Waiting, read

MAX_REASON = 1000  # characters of what a device says that are kept
SPARE_BYTES = 1 << 22  # of a reply, for headers, metrics and small statistics
EARLY_BYTES = 1 << 28  # of late replies that are kept in memory for the next attempt


@dataclass(frozen=True)
class Missing:
    """A device lacks what the server took for granted: one of `envelope.MISSING`."""

    what: str
    reason: str


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
        present: Present | None = None,
    ):
        """`check` is called before a step and before its updates are used, and may raise.

        present: see `Attendance`.
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
        seal(Envelope(env.HELLO, expected.to_fields()))  # raises here, not in the first round
        for name in ("min_clients", "min_replies"):
            if (least := getattr(terms, name)) > clients:
                raise ValueError(
                    f"{name.replace('_', '-')} is {least}, and the run has {clients} clients: "
                    "lower it, or raise clients"
                )
        self._roster = Roster(self._exchange, expected=expected, clients=clients, say=say)
        self._attendance = Attendance(
            self._exchange, self._roster, terms, clients=clients, say=say, present=present
        )
        self._exchange.late = self._late
        self._store = ClientStore()  # the runtime's own, set by `begin`
        self._step = 0
        self._said: dict[int, int | None] = {}  # by client: memory, as `begin` gave it
        self._committed: dict[int, int] = {}  # client -> step after which its state counts
        self._seconds: dict[int, float] = {}
        self._troubles: dict[int, str] = {}
        self._repeated_bytes = 0
        self._unwilling = Unwilling()
        self._ceilings = Ceilings()
        self._too_large: set[int] = set()  # clients whose devices said so in the last call
        self._asked: set[int] = set()  # clients to which a task went out in the last call
        self._silent: set[int] = set()  # of those, who gave no answer
        self._refused: set[int] = set()  # of those, whose update the checks refused
        self._early: dict[int, bytes] = {}  # by client: a reply to this step, come between attempts

    def agree(self) -> Agreed:
        """Mean and deviation of what the clients hold, with which every task is sent from now on.

        Waits for as many clients as a step does.  Raises NobodyThere when fewer come or answer.
        """
        here = self._attendance.join(self._run)
        nodes = {node: client for client, node in self._roster.known().items() if client in here}
        ends = time.monotonic() + self._terms.deadline_seconds
        expected = expected_by(self._dataset)
        found = ask(self._exchange, nodes, self._run, expected, ends=ends, say=self._say)
        wanted = max(self._terms.min_clients, self._terms.min_replies)
        if len(found) < wanted:
            raise NobodyThere(
                f"{len(found)} of {wanted} clients said within {self._terms.deadline_seconds:g} s "
                "what their examples add up to, by which inputs are standardised: start the "
                "missing ones, or lower min-clients, and submit the run again with the same "
                "folder; or give mean and deviation"
            )
        mean, std = agreed([found[client] for client in sorted(found)])
        self._dataset = replace(self._dataset, mean=mean, std=std)
        return Agreed(mean, std, tuple(sorted(found)))

    def held(self) -> dict[int, Held]:
        """What the clients that have joined said that they hold."""
        examples, classes = self._roster.num_examples, self._roster.num_classes
        return {client: Held(examples[client], classes[client]) for client in sorted(classes)}

    def begin(self, store: ClientStore, step: int) -> list[Device]:
        """Clients whose nodes are connected, as `Attendance.gather` says.  Raises NobodyThere."""
        self._check()
        if step != self._step:
            self._early = {}
        self._store, self._step = store, step
        devices = self._ceilings.under(self._attendance.gather(self._run, step))
        self._said = {device.id: device.memory_bytes for device in devices}
        return devices

    def __call__(self, tasks: Sequence[ClientTask], refuse: Refuse) -> Iterator[ClientUpdate]:
        """Updates in the order of `tasks`; none, where fewer than `min_replies` are good."""
        self._seconds, self._troubles, self._repeated_bytes = {}, {}, 0
        self._asked, self._silent, self._refused = set(), set(), set()
        self._too_large = set()
        began = time.monotonic()
        enough = min(self._terms.min_replies, len(tasks))
        with Waiting("fedlean-replies-") as waiting:
            asked = {task.client: task for task in tasks}
            replies = self._collect(asked, enough, waiting)
            self._check()
            good, decoded = self._good(replies, asked, refuse, enough)
            if good < enough:
                failed = self._troubles.keys()
                attempt = Attempt(began, asked.keys(), failed, self._silent, self._refused)
                self._attendance.in_vain(self._step, attempt)
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
                        self._useless(task.client, update)

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
        good, useless, refused = 0, dict[int, str](), dict[int, str]()
        first: dict[int, ClientUpdate] = {}
        for client, path in replies.items():
            if good == enough:
                break
            update = _decoded(path, asked[client])
            if isinstance(update, str):
                useless[client] = update
            elif why := refuse(update, asked[client]):
                refused[client] = why
            else:
                good += 1
                first = first or {client: update}
        if good < enough:
            for client, why in useless.items():
                self._useless(client, why)
            for client, why in refused.items():
                self._trouble(client, why)
            self._refused = set(refused)
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
                    self._useless(client, update.reason)
                    return {}
                repeated.add(client)
                again = "they are" if update.what.endswith("s") else "it is"
                self._say(f"client {client} lacks the {update.what}: {again} sent again")
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
            self._exchange.listen()
            here = self._roster.present(self._run, seconds=ends - time.monotonic())
        for client in asked.keys() - nodes.keys():
            self._trouble(client, "is not connected")
            self._silent.add(client)
        return nodes

    def _willing(self, asked: Mapping[int, ClientTask]) -> dict[int, ClientTask]:
        """Without those that have just refused the same task for good."""
        unwilling = self._unwilling.among(asked)
        for client, reason in unwilling.items():
            self._trouble(client, f"{reason} (it was not asked again)")
        return {client: task for client, task in asked.items() if client not in unwilling}

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
            "memory_bytes": self._said.get(task.client),
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
            self._attendance.patience.missed(client, self._step)
            return self._trouble(client, content.reason)
        try:
            envelope = unseal(content, expected=(env.UPDATE, env.TROUBLE))
        except EnvelopeError as error:
            return self._useless(client, str(error))
        fields = envelope.fields
        if envelope.kind == env.TROUBLE:
            return self._no_update(task, fields)
        if fields["step"] != self._step:
            return self._useless(client, f"answered step {fields['step']}, expected {self._step}")
        self._attendance.patience.answered(client)
        if fields["lost_state"]:
            self._say(f"client {client} has lost what it kept between rounds")
        claimed = float(fields["seconds"])
        self._seconds[client] = min(max(0.0, claimed), self._terms.deadline_seconds)
        return envelope

    def _no_update(self, task: ClientTask, fields: Mapping[str, Any]) -> Missing | None:
        """What a client says instead of an update."""
        client, reason = task.client, fields["reason"]
        if fields["missing"]:
            return Missing(fields["missing"], reason)
        if fields["gave_up"]:
            self._attendance.patience.missed(client, self._step, slow=True)
            return self._trouble(client, reason)
        if fields["too_large"]:
            self._too_large.add(client)
        if fields["final"]:
            self._unwilling.note(task, printable(reason))
        return self._useless(client, reason)

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
        reason = printable(reason)[:MAX_REASON]
        self._troubles[client] = reason
        self._say(f"client {client}: {reason}")

    def _useless(self, client: int, reason: str) -> None:
        """It has answered, with something that is no update: as if its update had been refused."""
        self._attendance.patience.answered(client)
        self._attendance.patience.refused(client, self._step)
        self._trouble(client, reason)

    def acknowledge(self, taken: Iterable[int], refused: Iterable[int]) -> None:
        taken = list(taken)
        self._roster.served(taken)
        for client in taken:
            self._committed[client] = self._step
            self._attendance.patience.taken(client)
        for client in refused:
            self._attendance.patience.refused(client, self._step)

    def too_large(self) -> Collection[int]:
        return self._too_large

    def cannot_hold(self, client: int, needed_bytes: int) -> None:
        self._ceilings.lower(client, needed_bytes)
        self._say(f"client {client} is asked for less than {megabytes(needed_bytes)} from now on")

    def clients(self) -> Mapping[int, Batches]:
        return {}

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
        if any(not {"step", "node"} <= state.keys() for state in states.values()):
            raise ValueError("what the checkpoint says of its clients is not what devices keep")
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


def _decoded(path: Path, task: ClientTask) -> ClientUpdate | str:
    """The update in a reply, or what is wrong with it."""
    limit = 32 * task.spec.num_params + SPARE_BYTES  # values, statistics, masks
    try:
        return wire.decode_update(
            read(path, "its reply"), task, limit_bytes=limit, allow_nonfinite=True, packed=True
        )
    except (wire.WireError, NoRoom) as error:
        return str(error)
