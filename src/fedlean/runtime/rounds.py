"""The round loop, the same for every method and every dispatch.

configure -> dispatch -> checks -> server_update -> evaluate -> log -> checkpoint.  It knows no
method and no transport.  A round to which nobody answers is said, asked again a bounded number of
times, and then given up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from fedlean import wire
from fedlean.core import ClientTask, ClientUpdate, FederatedAlgorithm, Server
from fedlean.runtime.checks import refusal, remedy
from fedlean.runtime.clientstore import ClientStore
from fedlean.runtime.ledger import Ledger, StepCost
from fedlean.runtime.local import Dispatch, Refuse
from fedlean.runtime.order import in_cohort_order

ATTEMPTS = 3  # how often an unanswered round is asked
EMPTY_STEPS = 10  # unanswered rounds in a row after which the run stops
REFUSED_STEPS = 3  # the same for rounds whose every update was refused: what is wrong stays wrong
MAX_REASON = 200  # characters of a refusal in an error


class RunFailed(RuntimeError):
    """The federation gives nothing that can be used; the run can be resumed."""


@dataclass
class StepRecord:
    """What happened in one server step, for the log."""

    tasks: Sequence[ClientTask]
    cost: StepCost = field(default_factory=StepCost)
    answered: list[int] = field(default_factory=list)
    refused: dict[int, str] = field(default_factory=dict)  # why a client gave nothing
    rejected: dict[int, str] = field(default_factory=dict)  # of those: an update came and is wrong
    notes: list[str] = field(default_factory=list)  # what the user should know
    metrics: dict[str, float] = field(default_factory=dict)
    attempts: int = 0
    wall_seconds: float = 0.0
    measured_seconds: float = 0.0  # of the median client, all attempts together


@dataclass(frozen=True)
class Progress:
    """Everything that the loop carries from step to step, beside the clients' own states."""

    state: Any
    store: ClientStore
    step: int = 0  # server steps done
    empty_steps: int = 0  # unanswered in a row
    refused_steps: int = 0  # in a row in which updates came and all were refused


def run_rounds(
    algorithm: FederatedAlgorithm,
    progress: Progress,
    *,
    server: Server,
    dispatch: Dispatch,
    after_step: Callable[[Progress, StepRecord, bool], None],
    max_update_norm: float | None = None,
) -> Progress:
    """Steps until `algorithm.done`; `after_step(progress, record, last)` logs and checkpoints.

    Raises RunFailed after EMPTY_STEPS steps without an answer or REFUSED_STEPS whose every update
    was refused, ClientError from the dispatch.
    """
    while not algorithm.done(progress.state):
        for mask in progress.state.masks.values():
            mask.flags.writeable = False  # so that it is hashed once and not for every message
        state, record = _step(algorithm, progress, server, dispatch, max_update_norm)
        empty = bool(record.tasks) and not record.answered
        refused = empty and bool(record.rejected)
        progress = replace(
            progress,
            state=state,
            step=progress.step + 1,
            empty_steps=progress.empty_steps + 1 if empty else 0,
            refused_steps=progress.refused_steps + 1 if refused else 0,
        )
        failure = _failure(progress, record)
        record.notes += [failure] if failure else []
        after_step(progress, record, algorithm.done(state))
        if failure:
            raise RunFailed(failure)
    return progress


def _failure(progress: Progress, record: StepRecord) -> str | None:
    """Why the run cannot go on after this step, if it cannot."""
    if progress.refused_steps >= REFUSED_STEPS:
        client, reason = next(iter(record.rejected.items()))
        return (
            f"every update of {REFUSED_STEPS} rounds in a row was refused, the last of them in "
            f"round {record.tasks[0].round} (client {client}: {reason[:MAX_REASON]}): "
            f"{remedy(reason)}"
        )
    return _unanswered(record) if progress.empty_steps >= EMPTY_STEPS else None


def _unanswered(record: StepRecord) -> str:
    why = [f"client {client}: {reason[:MAX_REASON]}" for client, reason in record.refused.items()]
    return (
        f"no usable answer in {EMPTY_STEPS} rounds in a row, the last of them round "
        f"{record.tasks[0].round}, which asked {len(record.tasks)} clients "
        f"({why[0] if why else 'none of them said why'})"
    )


def _step(
    algorithm: FederatedAlgorithm,
    progress: Progress,
    server: Server,
    dispatch: Dispatch,
    max_update_norm: float | None,
) -> tuple[Any, StepRecord]:
    began = time.perf_counter()
    devices = dispatch.begin(progress.store, progress.step + 1)
    tasks = algorithm.configure(progress.state, devices)
    record = StepRecord(tasks)
    state = progress.state

    def refuse(update: ClientUpdate, task: ClientTask) -> str | None:
        why = refusal(update, task, algorithm.statistics(task), max_update_norm)
        if why is not None:
            record.rejected[task.client] = why
        return why

    if not tasks:
        state = algorithm.server_update(state, ())
    unheard = {task.client for task in tasks}
    while unheard and record.attempts < ATTEMPTS and not record.answered:
        record.attempts += 1
        if record.attempts > 1:  # whoever was away may be back, and is waited for
            dispatch.begin(progress.store, progress.step + 1)
        ledger = Ledger(tasks, progress.store, server.device)
        answers = _taken(dispatch(tasks, refuse), refuse, record, ledger, progress.store)
        state = algorithm.server_update(progress.state, answers)
        for _ in answers:  # whatever the method did not read is checked and charged all the same
            pass
        ledger.repeated(dispatch.repeated_bytes())
        record.cost = record.cost.plus(ledger.cost)
        if seconds := dispatch.measured_seconds():
            record.measured_seconds += median(seconds.values())
        dispatch.acknowledge(record.answered)
        record.refused = {**dispatch.troubles(), **record.refused, **record.rejected}
        unheard -= record.rejected.keys()  # what is wrong with an update is so again
    for reasons in (record.refused, record.rejected):
        for client in record.answered:
            reasons.pop(client, None)
    record.notes += dispatch.notes()
    record.wall_seconds = time.perf_counter() - began
    return state, record


def _taken(
    updates: Iterable[ClientUpdate],
    refuse: Refuse,
    record: StepRecord,
    ledger: Ledger,
    store: ClientStore,
) -> Iterator[ClientUpdate]:
    """The updates that pass the checks, in cohort order, charged and noted as they pass."""
    asked = {task.client: task for task in record.tasks}
    usable = _usable(updates, asked, refuse, record, ledger)
    sums: dict[str, float] = {}
    weights: dict[str, float] = {}
    for update in in_cohort_order(usable, record.tasks):
        task = asked[update.client]
        record.answered.append(update.client)
        store.acknowledge(task, update)
        for key, value in update.metrics.items():
            sums[key] = sums.get(key, 0.0) + update.num_examples * value
            weights[key] = weights.get(key, 0.0) + update.num_examples
        yield update
    record.metrics = {key: total / weights[key] for key, total in sums.items()}


def _usable(
    updates: Iterable[ClientUpdate],
    asked: Mapping[int, ClientTask],
    refuse: Refuse,
    record: StepRecord,
    ledger: Ledger,
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
        reason = refuse(update, task)
        try:
            ledger.answer(task, update)
        except wire.WireError as error:
            reason = reason or str(error)
            with suppress(wire.WireError):  # what can be priced is charged all the same
                ledger.answer(task, replace(update, metrics={}))
        if reason is None:
            yield update
        else:
            record.rejected[update.client] = reason
