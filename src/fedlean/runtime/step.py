"""One server step: clients are asked until an answer can be merged, a bounded number of times.

Whose update was refused is left out of the next attempt, so that one bad client costs a round its
time and not its result.  A merged state that is none is taken back, and the attempt was in vain.
A task that is beyond what its device has (memory, bytes or seconds of a round) is not sent; where
that leaves nobody, others are asked.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from statistics import median
from typing import Any

from fedlean import wire
from fedlean.algorithm import Device, FederatedAlgorithm, Server
from fedlean.core import ClientTask, ClientUpdate, Work
from fedlean.runtime.checks import Expected, beyond_order, refusal
from fedlean.runtime.clientstore import ClientStore
from fedlean.runtime.heldback import held_back
from fedlean.runtime.ledger import Ledger
from fedlean.runtime.local import Dispatch
from fedlean.runtime.merged import fault, suspects
from fedlean.runtime.moves import LEAST, MaxNorm, Moves, moved
from fedlean.runtime.notices import some
from fedlean.runtime.order import in_cohort_order
from fedlean.runtime.prices import Lack, Prices
from fedlean.runtime.record import StepRecord, nobody_was_asked, smaller

ATTEMPTS = 3  # how often a step asks
CHOICES = 64  # how often it has clients chosen of whom none can hold its task


class Step:
    """Server step `number`; `record` says what happened, `failure` why the run cannot go on."""

    def __init__(
        self,
        algorithm: FederatedAlgorithm,
        server: Server,
        dispatch: Dispatch,
        store: ClientStore,
        number: int,
        max_norm: MaxNorm,
    ):
        self._algorithm, self._server, self._dispatch = algorithm, server, dispatch
        self._store, self._number, self._max_norm = store, number, max_norm
        self._moves = Moves()
        self._prices = Prices(server.profile)  # on the devices of the attempt
        self._ordered: dict[int, Sequence[Work]] = {}  # by client: what the attempt's task takes
        self._choices = 0  # in vain, as CHOICES counts them
        self._lacks: list[Lack] = []  # of the last choice, where it was in vain
        self.record = StepRecord()
        self.failure: str | None = None

    def take(self, state: Any, moves: Moves) -> tuple[Any, Moves]:
        """The state after the step, the same where nobody's answer could be used; and the moves."""
        began, record, after = time.perf_counter(), self.record, state
        self._moves = moves
        while record.attempts < ATTEMPTS and not record.answered:
            # whoever was away may be back, and is waited for
            devices = self._dispatch.begin(self._store, self._number)
            tasks = self._tasks(state, devices)
            self._count(devices, tasks)
            if not tasks:
                if devices and not record.attempts and not record.left_out:
                    after = self._alone(state)
                break
            record.asked_round = tasks[0].round
            if fitting := self._fitting(tasks):
                self._lacks = []
                after = self._attempt(state, fitting)
        if not record.tasks and not record.server_only:
            record.notes.append(nobody_was_asked(record))
        for reasons in (record.refused, record.rejected):
            for client in record.answered:
                reasons.pop(client, None)
        record.notes += self._dispatch.notes()
        record.wall_seconds = time.perf_counter() - began
        phase = record.tasks[0].phase if record.tasks else moves.phase
        return after, moves.after(phase, record.moved) if record.moved else moves

    def _tasks(self, state: Any, devices: Sequence[Device]) -> list[ClientTask]:
        """Without the clients whose updates this step has refused, and those that it left out.

        They would do the same again.  Without a device it is no step of the server's own either.
        After a choice of whom none can hold its task, those that could hold it come first; a method
        may still order something smaller from the others, so that these are asked where there are
        no such devices, CHOICES times in all.
        """
        self._prices, self._ordered = Prices(self._server.profile, devices), {}
        not_again = self.record.rejected.keys() | self.record.left_out.keys()
        left = [device for device in devices if device.id not in not_again]
        if self._lacks:
            left = [one for one in left if _may_take(one, self._lacks)] or left
            if self._choices >= CHOICES:
                self.record.not_chosen = [one.id for one in left]
                return []
        if not left:
            return []
        tasks = self._algorithm.configure(state, left)
        return [task for task in tasks if task.client not in not_again]

    def _count(self, devices: Sequence[Device], tasks: Sequence[ClientTask]) -> None:
        """Of the devices that are there, those that could hold the smallest of the tasks.

        A choice that orders nothing, as when all who could be asked were left out, changes neither.
        """
        if not tasks and self.record.able is not None:
            return
        needs = [
            self._prices.of(task, work).peak_memory_bytes
            for task in tasks
            if (work := self._work(task)) is not None
        ]
        self.record.present = len(devices)
        self.record.able = sum(_has(one, min(needs)) for one in devices) if needs else None

    def _fitting(self, tasks: Sequence[ClientTask]) -> list[ClientTask]:
        """Without those that are beyond what their devices have, which is noted."""
        fitting, lacks = [], []
        for task in tasks:
            lack = self._lack(task)
            if lack is None:
                fitting.append(task)
            else:
                self.record.left_out[task.client] = str(lack)
                lacks.append(lack)
                self.record.smaller = smaller(task)
        self.record.lacks += lacks
        if not fitting:
            self._choices += 1
            self._lacks = lacks
        return fitting

    def _lack(self, task: ClientTask) -> Lack | None:
        work = self._work(task)
        lack = None if work is None else self._prices.lack(task, work)
        known = self._store.known(task.client)
        return lack or self._prices.over_budget(task, work, self._algorithm, known)

    def _work(self, task: ClientTask) -> Sequence[Work] | None:
        """What the task takes, where the method says so."""
        if self._algorithm.work is None:
            return None
        if task.client not in self._ordered:
            self._ordered[task.client] = self._algorithm.work(task)
        return self._ordered[task.client]

    def _alone(self, state: Any) -> Any:
        """A step of the server's own."""
        self.record.server_only = True
        after = self._algorithm.server_update(state, ())
        if wrong := fault(state, after):
            self.failure = f"a step of the server's own went wrong: {wrong}"
            return state
        return after

    def _attempt(self, state: Any, tasks: Sequence[ClientTask]) -> Any:
        record, dispatch = self.record, self._dispatch
        record.attempts += 1
        asked = {task.client: task for task in tasks}
        record.tasks = [*(one for one in record.tasks if one.client not in asked), *tasks]
        ledger = Ledger(tasks, self._store, self._prices)
        answers = self._taken(dispatch(tasks, self._refuse), tasks, ledger)
        after = self._algorithm.server_update(state, answers)
        for _ in answers:  # whatever the method did not read is checked and charged all the same
            pass
        ledger.repeated(dispatch.repeated_bytes())
        record.cost = record.cost.plus(ledger.cost)
        if seconds := dispatch.measured_seconds():
            record.measured_seconds += median(seconds.values())
        if record.answered and (wrong := fault(state, after)):
            self._take_back(wrong)
        for client in dispatch.too_large():
            if (work := self._work(asked[client])) is not None:
                needed = self._prices.of(asked[client], work).peak_memory_bytes
                dispatch.cannot_hold(client, needed)
        dispatch.acknowledge(record.answered, [c for c in asked if c in record.rejected])
        record.refused = {**dispatch.troubles(), **record.refused, **record.rejected}
        return after if record.answered else state

    def _take_back(self, wrong: str) -> None:
        """The merge does not count, and whoever may have spoilt it is left out from now on."""
        record = self.record
        suspected = suspects({client: record.moved[client] for client in record.answered})
        named = some([f"client {client}" for client in suspected])
        record.notes.append(f"lost, and asked again: {wrong}; suspected: {named}")
        lost = dict.fromkeys(record.answered, "its round was lost")
        record.refused = {**lost, **record.refused}
        record.rejected |= dict.fromkeys(suspected, f"is suspected, since {wrong}")
        record.answered, record.metrics = [], {}

    def _refuse(self, update: ClientUpdate, task: ClientTask) -> str | None:
        expected = self._expected(task)
        why = refusal(update, task, expected)
        if why is None:
            self.record.moved[task.client] = far = moved(update, task, expected.forms)
            why = self._moves.bound(self._max_norm, task.phase).exceeded(far)
        if why is not None:
            self.record.rejected[task.client] = why
        return why

    def _expected(self, task: ClientTask) -> Expected:
        return Expected(
            self._algorithm.statistics(task),
            self._work(task),
            self._prices.device(task.client).num_examples,
            self._algorithm.own_masks(task),
        )

    def _taken(
        self, updates: Iterable[ClientUpdate], tasks: Sequence[ClientTask], ledger: Ledger
    ) -> Iterator[ClientUpdate]:
        """The updates that pass the checks, in cohort order, charged and noted as they pass."""
        asked = {task.client: task for task in tasks}
        usable = self._usable(updates, asked, ledger)
        lost = self.record.refused.__setitem__
        if self._needs_all(tasks):
            usable = held_back(usable, tasks, self._too_far(asked), lost)
        sums: dict[str, float] = {}
        weights: dict[str, float] = {}
        for update in in_cohort_order(usable, tasks, lost):
            self.record.answered.append(update.client)
            self._store.acknowledge(asked[update.client], update)
            for key, value in update.metrics.items():
                sums[key] = sums.get(key, 0.0) + update.num_examples * value
                weights[key] = weights.get(key, 0.0) + update.num_examples
            yield replace(update, task=asked[update.client])
        self.record.metrics = {key: total / weights[key] for key, total in sums.items()}

    def _needs_all(self, tasks: Sequence[ClientTask]) -> bool:
        """Whether the bound on these updates can follow from themselves alone."""
        statistics = self._algorithm.statistics(tasks[0])
        known = self._moves.suffice(tasks[0].phase, statistics)
        return self._max_norm is None and not known and len(tasks) >= LEAST

    def _too_far(self, asked: Mapping[int, ClientTask]) -> Any:
        """For updates that have all come: whether a client's moved too far, which is noted."""

        def too_far(client: int) -> bool:
            phase = asked[client].phase
            moves = self._moves.after(phase, self.record.moved)
            why = moves.bound(self._max_norm, phase).exceeded(self.record.moved[client])
            if why is not None:
                self.record.rejected[client] = why
            return why is not None

        return too_far

    def _usable(
        self, updates: Iterable[ClientUpdate], asked: Mapping[int, ClientTask], ledger: Ledger
    ) -> Iterator[ClientUpdate]:
        """The first answer of each client asked, charged; refused ones are noted and left out.

        Before the ordering, which encodes: what cannot travel is refused, not an error.
        """
        seen: set[int] = set()
        for update in updates:
            task = asked.get(update.client)
            if task is None or update.client in seen:
                continue
            seen.add(update.client)
            update = _without_frozen(update)
            reason = self._refuse(update, task)
            try:
                ledger.answer(task, self._payable(update, task) if reason else update)
            except wire.WireError as error:
                reason = reason or str(error)
                with suppress(wire.WireError):  # what can be priced is charged all the same
                    ledger.answer(task, replace(self._payable(update, task), metrics={}))
            if reason is None:
                yield update
            else:
                self.record.rejected[update.client] = reason

    def _payable(self, update: ClientUpdate, task: ClientTask) -> ClientUpdate:
        """A refused update is charged, but for work beyond what was ordered."""
        beyond = beyond_order(update.work, task, self._expected(task).work)
        return update if beyond is None else replace(update, work=())


def _has(device: Device, needed_bytes: float) -> bool:
    return device.memory_bytes is None or device.memory_bytes >= needed_bytes


def _may_take(device: Device, lacks: Sequence[Lack]) -> bool:
    """Whether it has the memory and the bytes that the smallest of these tasks needs.

    How long one takes depends on the device, and is seen when it is chosen.
    """
    memory = min((lack.needs for lack in lacks if lack.of == "memory"), default=0)
    traffic = min((lack.needs for lack in lacks if lack.of == "traffic"), default=0)
    return _has(device, memory) and (device.budget_bytes is None or device.budget_bytes >= traffic)


def _without_frozen(update: ClientUpdate) -> ClientUpdate:
    """As it travels, so that a method sees the same of clients in this process and elsewhere."""
    frozen = update.sub_model.frozen
    if frozen.isdisjoint(update.params):
        return update
    params = {name: value for name, value in update.params.items() if name not in frozen}
    return replace(update, params=params)
