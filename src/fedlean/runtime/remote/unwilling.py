"""Clients that will not do a task, and would not if they were asked for the same again."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import NamedTuple

from fedlean import wire
from fedlean.core import ClientTask

REFUSAL_SECONDS = (
    600.0  # until one is asked for the same again: its operator may have acted by then
)


class _Refusal(NamedTuple):
    reason: str
    model: tuple[str, str]  # of the task, as `_model` names it
    until: float  # monotonic seconds


class Unwilling:
    """What clients have refused for good."""

    def __init__(self) -> None:
        self._refusals: dict[int, _Refusal] = {}  # by client

    def note(self, task: ClientTask, reason: str) -> None:
        """The task's client refuses it."""
        until = time.monotonic() + REFUSAL_SECONDS
        self._refusals[task.client] = _Refusal(reason, _model(task), until)

    def among(self, tasks: Mapping[int, ClientTask]) -> dict[int, str]:
        """Of these tasks, by client: who has just refused the same one, and why."""
        now, found = time.monotonic(), dict[int, str]()
        for client, task in tasks.items():
            refusal = self._refusals.get(client)
            if refusal and refusal.model == _model(task) and now < refusal.until:
                found[client] = refusal.reason
        return found


def _model(task: ClientTask) -> tuple[str, str]:
    """What decides whether a device has the memory for a task."""
    return task.spec.hash, wire.pattern_hash(task.sub_model.masks)
