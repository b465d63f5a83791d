"""Walks a method through a short run with one kind of device, and notes what its clients are asked.

The method's own `configure` and `server_update` run as in a run, its client's half on an engine
that computes nothing.  As that trains nothing, what it returns need not be merged: the server is
given answers whose tensors are all frozen, which a merge leaves as they are, bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedlean import wire
from fedlean.algorithm import Device, FederatedAlgorithm
from fedlean.core import ClientState, ClientTask, ClientUpdate, Model, Work
from fedlean.planning.dry import DryBatches, DryEngine
from fedlean.runtime.clientstore import ClientStore

SECONDS = 30.0  # after which a walk ends with what it has seen
TRAIN = "train"


@dataclass(frozen=True)
class Kind:
    """What one client is asked in steps that are alike, and what crosses its link."""

    phase: str
    task: ClientTask  # of the first such step
    works: tuple[Work, ...]  # the most that it takes
    statistics: tuple[str, ...]  # what goes up beside the parameters
    downlink_first_bytes: int  # in the first such step: the model's description, a new pattern
    downlink_bytes: int  # afterwards
    uplink_bytes: int
    one_client: bool  # asked of one device only, of several that are there
    algorithm: FederatedAlgorithm
    state: Any  # of the method, in which its `configure` gave the task
    key: Any  # kinds with the same one are the same


@dataclass(frozen=True)
class Walk:
    kinds: tuple[Kind, ...]  # in the order in which they come
    complete: bool  # or the time was over


def walk(
    algorithm: FederatedAlgorithm,
    model: Model,
    devices: Sequence[Device],
    *,
    engine: DryEngine,
    batches: DryBatches,
    until: int,
    steps: int,
    seconds: float = SECONDS,
    new_masks: bool = False,
    merged: bool = True,
) -> Walk:
    """Kinds of steps of the first device that is asked, up to training round `until`, in `steps`.

    devices: two or more, all alike, so that it shows what is asked of one only.  new_masks: no
    client holds the pattern of its next task; merged: the server is given answers (`Rehearsal`).
    Raises what the method raises.
    """
    walker = _Walker(algorithm, devices, engine, batches, until, new_masks, merged)
    state, ends = algorithm.init(model), time.monotonic() + seconds
    for _ in range(steps):
        if walker.last or algorithm.done(state):
            break
        if time.monotonic() > ends:
            return Walk(tuple(walker.kinds.values()), complete=False)
        after = walker.step(state)
        if after is state and not walker.answered:
            break
        state = after
    return Walk(tuple(walker.kinds.values()), complete=True)


class _Walker:
    def __init__(
        self,
        algorithm: FederatedAlgorithm,
        devices: Sequence[Device],
        engine: DryEngine,
        batches: DryBatches,
        until: int,
        new_masks: bool,
        merged: bool,
    ):
        self._new_masks, self._merged = new_masks, merged
        self._algorithm, self._devices = algorithm, devices
        self._engine, self._batches, self._until = engine, batches, until
        self._store = ClientStore()
        self._held: dict[int, ClientState] = {}
        self._moved: set[str] = set()  # tensors that were trained since they were sent frozen
        # what tasks alike share -> the key of their kind, and the answer without its values
        self._seen: dict[Any, tuple[Any, ClientUpdate]] = {}
        self.kinds: dict[Any, Kind] = {}
        self.answered = False  # whether the last step was
        self.last = False

    def step(self, state: Any) -> Any:
        """The state after the next step."""
        for mask in state.masks.values():
            mask.flags.writeable = False  # as in a run, so that it is hashed once
        self.answered = False
        tasks = self._algorithm.configure(state, self._devices)
        if not tasks:
            return self._algorithm.server_update(state, ())
        task = tasks[0]
        self.last = task.phase == TRAIN and task.round >= self._until
        down = wire.task_bytes(task, self._known(task))
        self._move(task)
        ordered = self._algorithm.work(task) if self._algorithm.work else None
        alike = (*_alike(task, ordered), *sorted(self._algorithm.statistics(task)))
        if alike in self._seen:
            key, answer = self._seen[alike]
            self.kinds[key] = replace(self.kinds[key], downlink_bytes=down)
            self._store.acknowledge(task, answer)
            if self.last:
                return state
            after = self._algorithm.server_update(state, ())  # nobody answered: the same, sooner
            if (after.round, after.phase) != (state.round, state.phase):
                return after
        update = self._answer(task)
        self._note(state, task, update, down, ordered, len(tasks) == 1 < len(self._devices), alike)
        if self.last:
            return state
        self.answered = True
        if not self._merged:
            return self._algorithm.server_update(state, ())
        nothing = replace(update.sub_model, frozen=frozenset(task.spec.tensor_shapes))
        merged = replace(update, task=task, sub_model=nothing)
        return self._algorithm.server_update(state, iter([merged]))

    def _known(self, task: ClientTask) -> wire.Known:
        """What need not be sent: not those frozen values that a run would have changed since.

        Here nothing is trained, so that they have the hash which the client holds.
        """
        known = self._held_by(task.client)
        frozen = wire.frozen_params(task)
        moved = {name: frozen[name] for name in self._moved & frozen.keys()}
        hashes = wire.frozen_hashes(moved, task.sub_model.masks)
        return replace(known, frozen=known.frozen.difference(hashes.values()))

    def _held_by(self, client: int) -> wire.Known:
        known = self._store.known(client)
        return replace(known, patterns=frozenset()) if self._new_masks else known

    def _move(self, task: ClientTask) -> None:
        self._moved -= wire.frozen_params(task).keys()
        self._moved |= task.spec.tensor_shapes.keys() - task.sub_model.frozen

    def _answer(self, task: ClientTask) -> ClientUpdate:
        held = self._held.get(task.client, {})
        update, self._held[task.client] = self._algorithm.client_update(
            task, self._batches, self._engine, held
        )
        return update

    def _note(
        self,
        state: Any,
        task: ClientTask,
        update: ClientUpdate,
        down: int,
        ordered: Sequence[Work] | None,
        one_client: bool,
        alike: Any,
    ) -> None:
        works = tuple(update.work if ordered is None else ordered)
        statistics = tuple(sorted(update.statistics))
        up = wire.update_bytes(update, task)
        self._store.acknowledge(task, update)
        key = (_model(task), _key(works), statistics)
        self._seen[alike] = key, replace(update, params={}, statistics={})
        if key in self.kinds:
            kind = self.kinds[key]
            most = max(up, kind.uplink_bytes)
            self.kinds[key] = replace(kind, downlink_bytes=down, uplink_bytes=most)
            return
        again = wire.task_bytes(task, self._held_by(task.client))
        self.kinds[key] = Kind(
            task.phase,
            task,
            works,
            statistics,
            down,
            again,
            up,
            one_client,
            self._algorithm,
            state,
            key,
        )


def _model(task: ClientTask) -> tuple[Any, ...]:
    sub_model = task.sub_model
    return task.phase, task.spec.hash, wire.pattern_hash(sub_model.masks), sub_model.frozen


def _alike(task: ClientTask, works: Sequence[Work] | None) -> tuple[Any, ...]:
    """What two tasks share of which the second brings nothing new."""
    said = {k: v for k, v in task.hparams.items() if isinstance(v, str | bool)}
    carried = (bool(task.params), *sorted(task.arrays))
    return (*_model(task), carried, tuple(sorted(said.items())), _key(works or ()))


def _key(works: Sequence[Work]) -> tuple[Any, ...]:
    return tuple(repr(work) for work in works)


def together(walks: Sequence[Walk]) -> Walk:
    """Several walks as one; of a kind that comes in two, the first, with the most that goes up."""
    kinds: dict[Any, Kind] = {}
    for kind in (kind for one in walks for kind in one.kinds):
        first = kinds.get(kind.key, kind)
        most = max(first.uplink_bytes, kind.uplink_bytes)
        kinds[kind.key] = replace(first, uplink_bytes=most)
    return Walk(tuple(kinds.values()), all(one.complete for one in walks))
