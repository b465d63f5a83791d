"""What a method is, and what its server half may know: read this after `core`.

It stands above the engines and the cost model, because a method computes with the one and chooses
by the other; `core`, which those are written in, knows neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from fedlean.core import (
    Batches,
    ClientState,
    ClientTask,
    ClientUpdate,
    Masks,
    Model,
    Params,
    StatisticForm,
    Work,
)
from fedlean.cost.profile import Profile
from fedlean.engine.protocol import Engine
from fedlean.spec import ModelSpec


@dataclass(frozen=True)
class Device:
    """One client of the federation, as the server knows it.

    memory_bytes: what it may hold of models, gradients and activations at once, the process and its
    libraries apart.  budget_bytes: what may travel for it in a round, both ways.  budget_seconds:
    what a round may take it, computing and both ways of the link.
    """

    id: int
    num_examples: int | None = None  # as it said when it joined
    profile: Profile | None = None  # its own; `profile_of` says which one counts
    memory_bytes: int | None = None  # None: no limit is known, here and below
    budget_bytes: int | None = None
    budget_seconds: float | None = None


def profile_of(device: Device, fallback: Profile) -> Profile:
    """The profile that counts for a device: its own, else `fallback`, the server's.

    Its memory is the device's, where that is known; of none, a byte, as a profile has some.
    """
    profile = fallback if device.profile is None else device.profile
    if device.memory_bytes is None or device.memory_bytes == profile.memory_bytes:
        return profile
    return replace(profile, memory_bytes=max(1, device.memory_bytes))


@dataclass(frozen=True)
class Server:
    """What the server half of a method may know about the run."""

    spec: ModelSpec
    engine: Engine
    seed: int
    rounds: int
    profile: Profile  # the time model of the devices that have none of their own
    init: str = "pytorch"  # how the run's first model was drawn (`models.initialise`)
    clients: int | None = None  # how many there are; None: not known
    given: bool = False  # whether the run starts from a model that there was, not from a drawn one
    # inputs that the server itself has, in batches (x, y) of which y is not to be used; None: none
    inputs: Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]] | None = None


class State(Protocol):
    """A method's state: a frozen dataclass of numbers, strings, arrays, tuples and mappings.

    `params` are of the whole model.  A state may have `extra`, tensors that clients train in some
    stages only.
    """

    @property
    def round(self) -> int: ...  # training rounds completed
    @property
    def phase(self) -> str: ...
    @property
    def params(self) -> Params: ...
    @property
    def masks(self) -> Masks: ...


class FederatedAlgorithm(NamedTuple):
    """A method: four functions and a stop predicate, built by `method(server, **settings)`.

    A method whose clients send statistics says in `statistics` which ones a task asks for; `work`
    is the most that a task takes, against which clients' claims are held (None: it is not known).
    `model` says what of a state is evaluated and saved; None: the run's whole model, with the
    state's `params` and `masks`.  `report` gives what the log says of a state beside that, finite
    numbers by name: what a rule has measured, say.  `sends_params` says whether the answers to a
    task hold the tensors that it trains, or statistics alone.  `own_masks` says to which tasks a
    client may answer with masks that it has chosen, or with no values as long as it is choosing.
    """

    init: Callable[[Model], Any]  # of the model that the run starts from
    configure: Callable[[Any, Sequence[Device]], list[ClientTask]]  # [] = server-only step
    client_update: Callable[
        [ClientTask, Batches, Engine, ClientState], tuple[ClientUpdate, ClientState]
    ]
    server_update: Callable[[Any, Iterable[ClientUpdate]], Any]
    done: Callable[[Any], bool]
    statistics: Callable[[ClientTask], Mapping[str, StatisticForm]] = lambda task: {}
    work: Callable[[ClientTask], tuple[Work, ...]] | None = None
    model: Callable[[Any], Model] | None = None
    report: Callable[[Any], Mapping[str, float]] | None = None
    sends_params: Callable[[ClientTask], bool] = lambda task: True
    own_masks: Callable[[ClientTask], bool] = lambda task: False
