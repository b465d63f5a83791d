"""Clients that replay what they missed: they get a round's scalars instead of the next model.

Both halves.  The server keeps the scalars of the last rounds, and whose model each client keeps;
the client keeps the model and the optimiser's moments, and takes the missed steps itself, bit for
bit those of the server (`forward_updates`).
"""

# K directions

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from fedlean.core import (
    Batches,
    ClientState,
    ClientTask,
    ClientUpdate,
    Scalar,
    Statistic,
)
from fedlean.train.forward_round import SLOPES
from fedlean.train.forward_updates import (
    Entry,
    Held,
    Rule,
    Space,
    groups,
    log_arrays,
    read_log,
    replay,
)
from fedlean.tree import pack

MAX_LOG_ROUNDS = 1000  # of scalars that the server keeps for those who missed rounds
LOST = "lost_state"  # metric of a client that has not the model it is asked to go on from
Log = tuple[np.ndarray, ...]  # of the last rounds in a row, float32 (1 + K,): lr, averaged slopes


# --- the server ---


def replaying(rule: Rule, run_seed: int, round: int) -> dict[str, Scalar]:
    """Settings of a task about the model after `round`, for clients that replay up to it."""
    return {
        "optimizer": rule.optimizer,
        "momentum": rule.momentum,
        "run_seed": run_seed,
        "round": round,
    }


def from_what_it_keeps(
    task: ClientTask, whole: Held, log: Log, at: int | None, round: int
) -> ClientTask:
    """`task` of the model after `round`, for a client that keeps the model after round `at`.

    It gets the rounds since.  Where it keeps none, or one that the log does not reach, it gets
    `whole`: the task's own parameters, and the optimiser beside them.
    """
    if at is None or at < round - len(log):
        return replace(task, arrays=whole.moments, hparams={**task.hparams, "steps": whole.steps})
    missed = log[len(log) - (round - at) :]
    entries = [Entry(at + 1 + i, float(line[0]), line[1:]) for i, line in enumerate(missed)]
    arrays = {"log": log_arrays(entries)} if entries else {}
    return replace(task, params={}, arrays=arrays, hparams={**task.hparams, "from": at})


def logged(log: Log, entry: Entry, model: Held) -> Log:
    """With one more round; the oldest go where the model itself is shorter."""
    line = np.concatenate([np.array([entry.lr], np.float32), entry.scalars])
    tensors = [model.params, *model.moments.values()]
    size_bytes = sum(value.nbytes for group in tensors for value in group.values())
    rounds = max(1, min(MAX_LOG_ROUNDS, size_bytes // line.nbytes))
    return (*log, line)[-rounds:]


def within_reach(held: Mapping[str, int], log: Log, round: int) -> dict[str, int]:
    """Of the clients' rounds those from which `log` leads to `round`."""
    return {client: at for client, at in held.items() if at >= round - len(log)}


# --- the client ---


def replays(task: ClientTask) -> bool:
    """Whether the task is for a client that keeps its model."""
    return "run_seed" in task.hparams


def replayed(task: ClientTask, client_state: ClientState) -> Held | None:
    """The model that the task is about; None where it starts from one that is not here."""
    h, masks = task.hparams, task.sub_model.masks
    if task.params:
        return Held(pack(task.params, masks), task.arrays, int(h["steps"]))
    if "round" not in client_state or int(client_state["round"]) != int(h["from"]):
        return None
    rule = Rule(h["optimizer"], float(h["momentum"]))  # type: ignore[arg-type]  # it checks
    held = Held(
        _group(client_state, "params"),
        {group: _group(client_state, group) for group in groups(rule)},
        int(client_state["steps"]),
    )
    space = Space(task.spec.param_shapes, masks, h["kind"])  # type: ignore[arg-type]
    entries = read_log(task.arrays.get("log", {}))
    return replay(held, entries, seed=int(h["run_seed"]), space=space, rule=rule)


def kept_for_later(held: Held, task: ClientTask) -> dict[str, np.ndarray]:
    """The client's state until its next task."""
    arrays = {
        f"{group}/{name}": value
        for group, tensors in {"params": held.params, **held.moments}.items()
        for name, value in tensors.items()
    }
    counters = {"round": int(task.hparams["round"]), "steps": held.steps}
    return arrays | {name: np.array(value) for name, value in counters.items()}


def _group(state: ClientState, group: str) -> dict[str, np.ndarray]:
    prefix = f"{group}/"
    return {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }


def lost(task: ClientTask, batches: Batches) -> ClientUpdate:
    """Says that the model is not here; the slopes that it must hold count for nothing."""
    slopes = np.zeros(int(task.hparams["directions"]), np.float32)
    return ClientUpdate(
        task.client,
        batches.num_examples,
        {},
        task.sub_model,
        {SLOPES: Statistic({SLOPES: slopes}, "mean")},
        metrics={LOST: 1.0},
    )


def has_lost(update: ClientUpdate) -> bool:
    return bool(update.metrics.get(LOST, 0.0))
