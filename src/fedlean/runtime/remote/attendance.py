"""Who takes part in a step: which clients are waited for, for how long, and which are left out."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence, Set
from dataclasses import dataclass, replace

from fedlean.algorithm import Device
from fedlean.runtime.notices import some
from fedlean.runtime.remote.exchange import Exchange
from fedlean.runtime.remote.patience import Patience
from fedlean.runtime.remote.roster import Roster

# A SuperLink lets a killed node in again once it takes it for dead: after two heartbeats of 30 s.
READMIT_SECONDS = 70.0
Present = Callable[[int], Sequence[Device]]  # the devices of a step


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
class Attempt:
    """What came of asking clients once, as sets of them."""

    began: float  # monotonic seconds
    tried: Set[int]
    failed: Set[int]  # of those, who gave nothing that can be used
    silent: Set[int]  # of those, who gave no answer
    refused: Set[int]  # of those, whose update the checks refused


class NobodyThere(RuntimeError):
    """Too few devices are connected; the run can be resumed."""


class Attendance:
    """Of the clients of one run, step by step."""

    def __init__(
        self,
        exchange: Exchange,
        roster: Roster,
        terms: Terms,
        *,
        clients: int,
        say: Callable[[str], None],
        present: Present | None = None,
    ):
        """present: the devices of a step, of a fleet for which the connected ones stand.

        Who is not among them is away.
        """
        self.patience = Patience(say)
        self._exchange, self._roster, self._terms, self._say = exchange, roster, terms, say
        self._clients = clients
        self._present = present
        self._wanted = max(terms.min_clients, terms.min_replies)
        self._unheard: set[int] = set()  # asked in vain; those that died are let in again soon
        self._again = 0.0  # the monotonic second before which nobody is asked as in vain before
        self._vain = 0  # the last step in which an attempt was in vain; in all of its attempts:
        self._tried: set[int] = set()  # whom they asked
        self._failed: set[int] = set()  # who gave nothing that can be used

    def gather(self, run: str, step: int) -> list[Device]:
        """The clients to choose from in `step`.

        After an attempt in vain it waits until those that gave no answer are heard or, where all
        answered, until a client is there that was not asked; until READMIT_SECONDS have passed
        since the attempt began at most.  Attempts in a row would all meet the same dead node, or
        the same device that answers at once, and uselessly.  Then it waits until max(min_clients,
        min_replies) clients are connected.  Raises NobodyThere after `join_seconds`.

        Nobody is left out once an attempt at the step was in vain.
        """
        self._wait_for_others(run, step)
        here = self._wait_for_enough(run, step)
        out = set[int]()
        if step != self._vain:
            out = self.patience.left_out(here, step, least=self._terms.min_replies)
        examples, memory = self._roster.num_examples, self._roster.memory_bytes
        devices = [
            Device(client, examples.get(client), memory_bytes=memory.get(client))
            for client in here
            if client not in out
        ]
        if self._present is None:
            return devices
        fleet = {device.id: device for device in self._present(step)}
        return [_standing_for(fleet[one.id], one) for one in devices if one.id in fleet]

    def join(self, run: str) -> Collection[int]:
        """Waits for as many clients as a step does, before the first; who is there.

        Raises NobodyThere as `gather`.
        """
        return self._wait_for_enough(run, 0)

    def heard(self, client: int) -> None:
        """It is there, whatever it said."""
        self._unheard.discard(client)

    def in_vain(self, step: int, attempt: Attempt) -> None:
        """It gave too little."""
        if step != self._vain:
            self._vain, self._tried, self._failed = step, set(), set()
        self._tried |= attempt.tried
        self._failed |= attempt.failed
        self._unheard, self._again = set(attempt.silent), attempt.began + READMIT_SECONDS
        # without those that were refused the others are another question, asked at once
        others = attempt.refused and attempt.tried - attempt.failed
        nobody_is_left = len(self._failed) == self._clients
        if not attempt.silent and (others or nobody_is_left):
            self._again = 0.0

    def _wait_for_others(self, run: str, step: int) -> None:
        said, silent = False, bool(self._unheard)
        while (left := self._again - time.monotonic()) > 0:
            here = self._look(run, step, left)
            if not self._unheard if silent else set(here) - self._tried:
                break
            if not said:
                until, which = "silent clients are heard", self._unheard
                if not silent:
                    until, which = "others are there than those just asked in vain", self._tried
                named = some([str(client) for client in sorted(which)])
                self._say(f"waiting up to {left:.0f} s until {until}: {named}")
                said = True
            time.sleep(min(left, self._terms.poll_seconds))
        self._unheard, self._again = set(), 0.0

    def _wait_for_enough(self, run: str, step: int) -> Collection[int]:
        terms, wanted, said = self._terms, self._wanted, False
        ends = time.monotonic() + terms.join_seconds
        while True:
            here = self._look(run, step, ends - time.monotonic())
            if len(here) >= wanted:
                return here
            line = f"{len(here)} of {wanted} clients are connected"
            if time.monotonic() >= ends:
                refused = "; refused: ".join(["", *self._roster.refused()])
                lower = "min-clients" if terms.min_clients >= wanted else "min-replies"
                raise NobodyThere(
                    f"{line} after {terms.join_seconds:g} s{refused}: start the missing ones, or "
                    f"lower {lower}, and submit the run again with the same folder"
                )
            if not said:
                self._say(f"waiting: {line}")
                said = True
            time.sleep(terms.poll_seconds)

    def _look(self, run: str, step: int, seconds: float) -> Collection[int]:
        """Who is there now; the silent are greeted, and whoever has spoken is heard."""
        self._exchange.listen()
        knock = self.patience.silent(step) | self._unheard
        here = self._roster.present(run, seconds=seconds, wanted=self._wanted, knock=knock)
        for client in self._roster.spoken():
            if self.patience.spoke(client):
                self.heard(client)
        return here


def _standing_for(emulated: Device, connected: Device) -> Device:
    """The emulated one with what the connected one says: of two limits of memory the smaller."""
    limits = [each.memory_bytes for each in (connected, emulated) if each.memory_bytes is not None]
    return replace(
        emulated, num_examples=connected.num_examples, memory_bytes=min(limits, default=None)
    )
