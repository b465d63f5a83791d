"""Answers that no server may take, made from an honest one with the project's own pieces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from fedlean.core import ClientTask, ClientUpdate, Statistic, SubModel, Work
from fedlean.methods import fedavg
from fedlean.runtime.remote import envelope as env
from fedlean.runtime.remote.envelope import Envelope, seal, unseal
from fedlean.runtime.remote.worker import Worker
from fedlean.tree import pack

BOMB_BYTES = 60_000_000  # far beyond what an answer may have


@dataclass(frozen=True)
class Attack:
    """update: what is changed before it is encoded; sealed: what is changed in the bytes."""

    reason: str  # what the server's log says
    update: Callable[[ClientUpdate, ClientTask], ClientUpdate] = lambda update, task: update
    sealed: Callable[[bytes], bytes] = lambda data: data


def values(change: Callable[[np.ndarray], np.ndarray]) -> Callable[..., ClientUpdate]:
    def spoil(update: ClientUpdate, task: ClientTask) -> ClientUpdate:
        with np.errstate(all="ignore"):
            changed = {n: change(v).astype(np.float32) for n, v in update.params.items()}
        return replace(update, params=changed)

    return spoil


def own_masks(at_most: int) -> Callable[..., ClientUpdate]:
    """Masks of so many tensors on a dense task, their values packed by them."""

    def change(update: ClientUpdate, task: ClientTask) -> ClientUpdate:
        masks = {
            name: np.arange(update.params[name].size).reshape(update.params[name].shape) % 2 > 0
            for name in [*task.spec.prunable][:at_most]
        }
        return replace(update, params=pack(update.params, masks), sub_model=SubModel(masks=masks))

    return change


def fields(**changed: object) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        honest = unseal(data, expected=(env.UPDATE,))
        return seal(Envelope(env.UPDATE, {**honest.fields, **changed}, honest.body))

    return change


def statistic(update: ClientUpdate, task: ClientTask) -> ClientUpdate:
    return replace(update, statistics={"x\x1b[2J": Statistic({"a": np.ones(3, "f4")}, "sum")})


def claiming(**claims: object) -> Callable[..., ClientUpdate]:
    return lambda update, task: replace(update, **claims)


ATTACKS = {
    "nan": Attack("not finite", values(lambda v: v * np.float32(np.nan))),
    "huge": Attack("beyond", values(lambda v: np.full_like(v, 3e38))),
    "far": Attack("times the median", values(lambda v: v * np.float32(1e9))),
    "a mask": Attack("holds masks of 1 tensors, and was given none", own_masks(1)),
    "masks": Attack("tensors, and was given none", own_masks(99)),
    "nothing": Attack("lacks", claiming(params={})),
    "part": Attack("lacks", lambda u, t: replace(u, params=dict([*u.params.items()][:1]))),
    "work": Attack("claims work of", claiming(work=(Work(2**62, 2**62),))),
    "examples": Attack("when it joined", claiming(num_examples=10**9)),
    "metrics": Attack("metrics", claiming(metrics={f"m{at}": 0.0 for at in range(5000)})),
    "name": Attack("metric", claiming(metrics={"\x1b[2J" * 9: 0.0})),
    "statistic": Attack("statistics", statistic),
    "step": Attack("answered step", sealed=fields(step=10**9)),
    "cut": Attack("digest", sealed=lambda data: data[:-1]),
    "bomb": Attack(f"its reply has {BOMB_BYTES} bytes", sealed=lambda data: bytes(BOMB_BYTES)),
}


def attacked(worker: Worker, content: bytes, attack: Attack) -> bytes:
    """The worker's answer to a task of FedAvg's, spoilt."""
    honest = fedavg.client_update

    def client_update(task, batches, engine, state):
        update, state = honest(task, batches, engine, state)
        return attack.update(update, task), state

    fedavg.client_update = client_update
    try:
        return attack.sealed(worker.answer(content))
    finally:
        fedavg.client_update = honest
