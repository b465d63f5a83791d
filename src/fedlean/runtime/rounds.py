"""The round loop, the same for every method and every dispatch.

configure -> dispatch -> checks -> server_update -> evaluate -> log -> checkpoint.  It knows no
method and no transport; `step` has what happens in one step.  A round to which nobody gave an
answer that can be used does not count: it is said, and asked again in the next step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from fedlean.algorithm import FederatedAlgorithm, Server
from fedlean.runtime.checks import remedy
from fedlean.runtime.clientstore import ClientStore
from fedlean.runtime.local import Dispatch
from fedlean.runtime.moves import MaxNorm, Moves
from fedlean.runtime.record import StepRecord, nobody_was_asked
from fedlean.runtime.step import Step

EMPTY_STEPS = 10  # unanswered steps in a row after which the run stops
REFUSED_STEPS = 3  # the same for steps whose every update was refused: what is wrong stays wrong
MAX_REASON = 200  # characters of a refusal in an error


class RunFailed(RuntimeError):
    """The federation gives nothing that can be used; the run can be resumed."""


@dataclass(frozen=True)
class LoopState:
    """Everything that the loop carries from step to step, beside the clients' own states."""

    state: Any
    store: ClientStore
    step: int = 0  # server steps done
    empty_steps: int = 0  # unanswered in a row
    refused_steps: int = 0  # in a row in which everybody's update came and was refused
    moves: Moves = field(default_factory=Moves)  # that bound the next ones


def run_rounds(
    algorithm: FederatedAlgorithm,
    progress: LoopState,
    *,
    server: Server,
    dispatch: Dispatch,
    after_step: Callable[[LoopState, StepRecord, bool], bool | None],
    max_update_norm: MaxNorm = None,
) -> LoopState:
    """Steps until `algorithm.done`; `after_step(progress, record, last)` logs and checkpoints.

    It may end the loop early: it returns False.

    max_update_norm: see `moves`.  Raises RunFailed after EMPTY_STEPS steps without an answer or
    REFUSED_STEPS whose every update was refused, ClientError from the dispatch.
    """
    while not algorithm.done(progress.state):
        step = Step(algorithm, server, dispatch, progress.store, progress.step + 1, max_update_norm)
        state, moves = step.take(progress.state, progress.moves)
        record = step.record
        empty = not (record.answered or record.server_only)
        asked = bool(record.tasks)
        refused = empty and asked and all(task.client in record.rejected for task in record.tasks)
        progress = replace(
            progress,
            state=state,
            step=progress.step + 1,
            empty_steps=progress.empty_steps + 1 if empty else 0,
            refused_steps=progress.refused_steps + 1 if refused else 0,
            moves=moves,
        )
        failure = step.failure or _failure(progress, record)
        record.notes += [failure] if failure else []
        go_on = after_step(progress, record, algorithm.done(state))
        if failure:
            raise RunFailed(failure)
        if go_on is False:
            break
    return progress


def _failure(progress: LoopState, record: StepRecord) -> str | None:
    """Why the run cannot go on after this step, if it cannot."""
    if progress.refused_steps >= REFUSED_STEPS:
        client, reason = next(iter(record.rejected.items()))
        return (
            f"every update was refused {REFUSED_STEPS} times in a row, the last of them in "
            f"round {record.tasks[0].round} (client {client}: {reason[:MAX_REASON]}): "
            f"{remedy(reason)}"
        )
    return _unanswered(record) if progress.empty_steps >= EMPTY_STEPS else None


def _unanswered(record: StepRecord) -> str:
    if not record.tasks:
        remedy = (
            f"{record.smaller}train a smaller model, batch or density, or give the devices more "
            "(in --fleet, or by the --memory-limit of a node)"
        )
        if not record.lacks:
            remedy = "see which devices are there and when in --fleet"
        why = nobody_was_asked(record)
        return f"{EMPTY_STEPS} steps without an answer; in the last {why}: {remedy}"
    why = [f"client {client}: {reason[:MAX_REASON]}" for client, reason in record.refused.items()]
    return (
        f"round {record.tasks[0].round} was asked in {EMPTY_STEPS} steps, of {len(record.tasks)} "
        f"clients in the last, without an answer that can be used "
        f"({why[0] if why else 'none of them said why'})"
    )
