"""In-process dispatch: clients run in order, one after the other, in this process.

The seam of the runtime is `Dispatch`; this is its simplest form and the debugging tool: whatever
goes wrong in a client names the round, the client and the seed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

from fedlean.algorithm import Device
from fedlean.core import Batches, ClientState, ClientTask, ClientUpdate
from fedlean.engine.memory import step_memory
from fedlean.engine.protocol import Engine
from fedlean.runtime.ceilings import Ceilings
from fedlean.runtime.checks import diverged, remedy
from fedlean.runtime.clientstore import ClientStore
from fedlean.runtime.outofmemory import OutOfMemory, memory_for
from fedlean.runtime.remote.fitting import FittingEngine
from fedlean.runtime.remote.limit import LimitedEngine
from fedlean.runtime.remote.normalising import Agreed
from fedlean.runtime.remote.room import TooLarge
from fedlean.tree import kept_counts

Refuse = Callable[[ClientUpdate, ClientTask], str | None]  # why an update cannot be used


class Dispatch(Protocol):
    """tasks -> updates, in any order, some perhaps missing."""

    def begin(self, store: ClientStore, step: int) -> Sequence[Device]:
        """A server step begins: the clients that are present.  Attempts at it share its number."""
        ...

    def __call__(self, tasks: Sequence[ClientTask], refuse: Refuse) -> Iterable[ClientUpdate]:
        """What `refuse` objects to does not count as an answer where a number of them is awaited.

        It may be among the updates all the same: who reads them refuses it, and charges it.
        """
        ...

    def acknowledge(self, taken: Iterable[int], refused: Iterable[int]) -> None:
        """Of clients whose updates were taken, what they keep between rounds is now committed."""
        ...

    def too_large(self) -> Collection[int]:
        """Clients of the last call whose devices said that they have no memory for the task."""
        ...

    def cannot_hold(self, client: int, needed_bytes: int) -> None:
        """From now on `begin` gives its device less memory than `needed_bytes`.

        Until the device says that it has more than when it refused.
        """
        ...

    def clients(self) -> Mapping[int, Batches]:
        """Those whose examples are in this process."""
        ...

    def client_states(self) -> Mapping[int, ClientState]:
        """Committed states that this process holds for its clients; for the checkpoint."""
        ...

    def restore(self, states: Mapping[int, ClientState]) -> None: ...

    def measured_seconds(self) -> Mapping[int, float]:
        """Wall time of each client's half in the last call, where it could be measured."""
        ...

    def troubles(self) -> Mapping[int, str]:
        """Why clients of the last call gave nothing, where that is known."""
        ...

    def notes(self) -> Sequence[str]:
        """What has come up since the last call that the user should know."""
        ...

    def repeated_bytes(self) -> int:
        """Downlink bytes of the last call beyond one message to each client asked."""
        ...


class Held(NamedTuple):
    """What a device says that it holds."""

    examples: int
    classes: int  # of which it has examples


@runtime_checkable
class ToDevices(Protocol):
    """A dispatch to clients that have data of their own."""

    def agree(self) -> Agreed:
        """Before the first step: mean and deviation of what they hold, which tasks then carry."""
        ...

    def held(self) -> Mapping[int, Held]:
        """By client, of those that have joined since this process began."""
        ...


class ClientError(RuntimeError):
    """A client's half of a method failed; the message says in which round, client and seed."""


ClientUpdateFunction = Callable[
    [ClientTask, Batches, Engine, ClientState], tuple[ClientUpdate, ClientState]
]


class LocalDispatch:
    """Runs `client_update` for each task in this process.

    present: the devices of a step, of a fleet; without one all are there, and have no limit.
    """

    def __init__(
        self,
        client_update: ClientUpdateFunction,
        engine: Engine,
        data: Sequence[Batches],
        present: Callable[[int], Sequence[Device]] | None = None,
    ):
        self._client_update = client_update
        self._engine = engine
        self._data = data
        self._present = present
        self._step = 0
        self._here: dict[int, Device] = {}  # by client, in this step
        self._said: dict[int, int | None] = {}  # memory of those, as `begin` gave it
        self._unable: set[int] = set()  # who had too little memory in it, and would have again
        self._too_large: set[int] = set()  # of those, who were asked in the last call
        self._ceilings = Ceilings()
        self._troubles: dict[int, str] = {}
        self._committed: dict[int, ClientState] = {}
        self._pending: dict[int, ClientState] = {}
        self._seconds: dict[int, float] = {}

    def begin(self, store: ClientStore, step: int) -> Sequence[Device]:
        if self._present is None:
            return [Device(client) for client in range(len(self._data))]
        if step != self._step:
            self._step, self._unable = step, set()
        devices = [device for device in self._present(step) if device.id not in self._unable]
        self._here = {device.id: device for device in devices}
        under = self._ceilings.under(devices)
        self._said = {device.id: device.memory_bytes for device in under}
        return under

    def __call__(self, tasks: Sequence[ClientTask], refuse: Refuse) -> Iterator[ClientUpdate]:
        self._pending, self._seconds, self._troubles = {}, {}, {}
        self._too_large = set()
        for task in tasks:
            if self._present is not None and task.client not in self._here:
                self._troubles[task.client] = "is away"
                continue
            began = time.perf_counter()
            held = self._committed.get(task.client, {})
            try:
                with memory_for(_what(task), partial(self._planned_bytes, task)):
                    update, state = self._client_update(
                        task, self._data[task.client], self._engine_of(task.client), held
                    )
            except OutOfMemory:
                raise
            except TooLarge as error:
                self._troubles[task.client] = str(error)
                self._unable.add(task.client)
                self._too_large.add(task.client)
                continue
            except Exception as error:
                line = f"{_what(task)}, seed {task.seed}: {type(error).__name__}: {error}"
                hint = f"; {remedy(line)}" if diverged(line) else ""
                raise ClientError(line + hint) from error
            self._pending[task.client] = state
            self._seconds[task.client] = time.perf_counter() - began
            yield update

    def _engine_of(self, client: int) -> Engine:
        """As a device has it, which looks whether a session fits before it opens one."""
        device = self._here.get(client)
        if device is None or device.memory_bytes is None:
            return self._engine
        dense_way = device.profile is None or device.profile.dense_way
        limited = LimitedEngine(
            self._engine, device.memory_bytes, emulated=True, dense_way=dense_way
        )
        said = self._said[client]
        return limited if said is None else FittingEngine(limited, said)

    def _planned_bytes(self, task: ClientTask) -> int:
        """Of a plain step of the task, as the engine plans it."""
        return step_memory(
            task.spec,
            kept_counts(task.sub_model.masks),
            batch_size=int(task.hparams.get("batch_size", 1)),
            frozen=task.sub_model.frozen,
            sparse=self._engine.arithmetic == "sparse",
        ).peak_bytes

    def acknowledge(self, taken: Iterable[int], refused: Iterable[int]) -> None:
        del refused  # they are in this process, and asked again
        for client in taken:
            state = self._pending.pop(client, {})
            if state:
                self._committed[client] = state
            else:
                self._committed.pop(client, None)

    def too_large(self) -> Collection[int]:
        return self._too_large

    def cannot_hold(self, client: int, needed_bytes: int) -> None:
        self._ceilings.lower(client, needed_bytes)
        self._unable.discard(client)  # of a smaller task it may be able

    def measured_seconds(self) -> Mapping[int, float]:
        return dict(self._seconds)

    def troubles(self) -> Mapping[int, str]:
        return dict(self._troubles)  # any other error in this process ends the run

    def notes(self) -> Sequence[str]:
        return ()

    def repeated_bytes(self) -> int:
        return 0

    def clients(self) -> Mapping[int, Batches]:
        return dict(enumerate(self._data))

    def client_states(self) -> Mapping[int, ClientState]:
        return dict(self._committed)

    def restore(self, states: Mapping[int, ClientState]) -> None:
        if any({"step", "run"} <= state.keys() for state in states.values()):
            raise ValueError(
                "this run's clients are on devices, and so is what they keep: continue it by "
                "submitting its Flower app again with the same 'out'"
            )
        self._committed = dict(states)


def _what(task: ClientTask) -> str:
    return f"round {task.round} ({task.phase}), client {task.client}"
