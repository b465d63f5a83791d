"""A federation small enough for every test: four clients, an 8x8 image, three classes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from fedlean import wire
from fedlean.algorithm import Device, FederatedAlgorithm, Server
from fedlean.core import ClientTask, ClientUpdate, Model, Params
from fedlean.cost.profile import load_profile
from fedlean.data.batches import ClientData
from fedlean.data.dataset import Dataset
from fedlean.engine.open import engine_for
from fedlean.engine.protocol import Engine
from fedlean.layers import Conv2d, Flatten, Linear, MaxPool2d, ReLU
from fedlean.models.initialise import init_params
from fedlean.runtime.clientstore import ClientStore
from fedlean.runtime.local import Dispatch, LocalDispatch, Refuse
from fedlean.runtime.record import StepRecord
from fedlean.runtime.rounds import LoopState, run_rounds
from fedlean.spec import ModelSpec, sequential
from fedlean.tree import pack

CLIENTS = 4
ROUNDS = 6
SEED = 11

SPEC: ModelSpec = sequential(
    (1, 8, 8),
    [
        ("conv", Conv2d(4, 3, padding=1)),
        ("relu1", ReLU()),
        ("pool", MaxPool2d(2)),
        ("flat", Flatten()),
        ("fc1", Linear(12)),
        ("relu2", ReLU()),
        ("fc2", Linear(3)),
    ],
)

ENGINE, _ = engine_for(SPEC, None, threads=1)  # what a run takes when none is named


def dataset(seed: int = 0) -> Dataset:
    """Three noisy prototypes: learnable within a few steps."""
    rng = np.random.default_rng(seed)
    prototypes = rng.integers(0, 256, (3, 1, 8, 8))

    def draw(n: int) -> tuple[np.ndarray, np.ndarray]:
        y = rng.integers(0, 3, n)
        y[:3] = [0, 1, 2]
        noisy = 0.6 * prototypes[y] + 0.4 * rng.integers(0, 256, (n, 1, 8, 8))
        return noisy.astype(np.uint8), y.astype(np.int64)

    return Dataset.from_images("prototypes", draw(160), draw(60), classes=3, scale=255.0)


def client_data() -> list[ClientData]:
    """Unequal shares, so that weighting shows."""
    cuts = np.split(np.arange(160), [25, 60, 110])
    whole = dataset()
    return [ClientData(whole, indices) for indices in cuts]


def server(rounds: int = ROUNDS, device: str = "generic") -> Server:
    return Server(SPEC, ENGINE, SEED, rounds, load_profile(device))


def devices() -> list[Device]:
    return [Device(client) for client in range(CLIENTS)]


def params() -> Params:
    return init_params(SPEC, SEED)


def first_model() -> Model:
    return Model(SPEC, params())


def fresh_dispatch(algorithm: FederatedAlgorithm, engine: Engine = ENGINE) -> LocalDispatch:
    return LocalDispatch(algorithm.client_update, engine, client_data())


def nothing_wrong(update: ClientUpdate, task: ClientTask) -> None:
    """The check that every update passes."""


class Around:
    """A dispatch around another: `change` sees the tasks and gives the updates."""

    def __init__(
        self,
        inner: LocalDispatch,
        change: Callable[[Sequence[ClientTask], Iterator[ClientUpdate]], Iterable[ClientUpdate]],
    ):
        self.inner, self.change = inner, change
        self.acknowledge = inner.acknowledge
        self.client_states, self.clients = inner.client_states, inner.clients
        self.restore = inner.restore
        self.measured_seconds = inner.measured_seconds
        self.begin, self.troubles = inner.begin, inner.troubles
        self.repeated_bytes = inner.repeated_bytes
        self.notes = inner.notes
        self.too_large, self.cannot_hold = inner.too_large, inner.cannot_hold

    def __call__(self, tasks: Sequence[ClientTask], refuse: Refuse) -> Iterable[ClientUpdate]:
        return self.change(tasks, self.inner(tasks, refuse))


def over_the_wire(inner: LocalDispatch, store: ClientStore) -> Around:
    """Every task and update as bytes, with what the client is known to hold left out."""
    specs: dict[str, ModelSpec] = {}
    patterns: dict[str, Any] = {}
    frozen: dict[int, dict[str, np.ndarray]] = {}  # by client and tensor, as each keeps them

    def change(
        tasks: Sequence[ClientTask], updates: Iterator[ClientUpdate]
    ) -> Iterable[ClientUpdate]:
        del updates  # the inner dispatch runs on the decoded tasks instead
        arrived = []
        for task in tasks:
            known = store.known(task.client)
            data = wire.encode_task(task, known)
            assert len(data) == wire.task_bytes(task, known)
            held = frozen.setdefault(task.client, {})
            decoded = wire.decode_task(data, specs, patterns, held)
            specs[decoded.spec.hash] = decoded.spec
            masks, values = decoded.sub_model.masks, wire.frozen_params(decoded)
            patterns[wire.pattern_hash(masks)] = masks
            held |= pack(values, masks)
            arrived.append(decoded)
        sent = {task.client: task for task in tasks}
        for update in inner(arrived, nothing_wrong):
            task = sent[update.client]
            data = wire.encode_update(update, task)
            assert len(data) == wire.update_bytes(update, task)
            masks = update.sub_model.masks
            patterns[wire.pattern_hash(masks)] = masks
            yield wire.decode_update(data, task)

    return Around(inner, change)


def run(
    algorithm: FederatedAlgorithm,
    *,
    engine: Engine = ENGINE,
    dispatch: Dispatch | None = None,
    progress: LoopState | None = None,
    rounds: int = ROUNDS,
    watch: Callable[[LoopState, StepRecord], None] | None = None,
    max_update_norm: float | None = None,
    first: Model | None = None,
) -> Any:
    """The final state, of clients on `engine` unless a dispatch is given."""

    def after_step(progress: LoopState, record: StepRecord, last: bool) -> None:
        del last
        if dispatch is None:  # nobody tampers: nothing that a method sends may be refused
            assert not record.refused, record.refused
        if watch is not None:
            watch(progress, record)

    progress = progress or LoopState(algorithm.init(first or first_model()), ClientStore())
    return run_rounds(
        algorithm,
        progress,
        server=server(rounds),
        dispatch=dispatch or fresh_dispatch(algorithm, engine),
        after_step=after_step,
        max_update_norm=max_update_norm,
    ).state


def same(left: Any, right: Any) -> bool:
    """Bit-equality of anything a state or update is made of."""
    if isinstance(left, np.ndarray):
        return (
            isinstance(right, np.ndarray)
            and left.dtype == right.dtype
            and left.shape == right.shape
            and left.tobytes() == right.tobytes()
        )
    if isinstance(left, dict):
        return set(left) == set(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, tuple | list):
        return len(left) == len(right) and all(map(same, left, right))
    if hasattr(left, "__dataclass_fields__"):
        return all(
            same(getattr(left, name), getattr(right, name)) for name in left.__dataclass_fields__
        )
    return left == right


def snapshot(value: Any) -> Any:
    return copy.deepcopy(value)
