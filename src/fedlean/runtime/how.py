"""How a run is carried out: who are its clients, who watches it, where its data comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from fedlean.algorithm import Device, FederatedAlgorithm, Server
from fedlean.data.batches import ClientData
from fedlean.data.dataset import Dataset
from fedlean.data.partition import partition
from fedlean.fleet.fleet import Fleet
from fedlean.runtime.config import RunConfig
from fedlean.runtime.local import Dispatch, LocalDispatch
from fedlean.runtime.notices import about_shares
from fedlean.runtime.together import check_test, check_training

Watch = Callable[[dict[str, Any]], object]  # called with every log entry; False: the run ends early
Say = Callable[[str], None]  # called with a line that is worth knowing


@dataclass(frozen=True)
class Parts:
    """What a dispatch is made of."""

    config: RunConfig  # with a number of clients
    server: Server
    algorithm: FederatedAlgorithm
    dataset: Dataset
    check: Callable[[], None]  # raises Superseded once the run is another process's
    say: Say
    fleet: Fleet | None = None

    def present(self) -> Callable[[int], Sequence[Device]] | None:
        """The fleet's devices at a step; None without a fleet."""
        if self.fleet is None:
            return None
        present = partial(self.fleet.present, self.config.seed, clients=self.config.num_clients)
        return lru_cache(maxsize=1)(present)  # a step may look several times


Connect = Callable[[Parts], tuple[Dispatch, list[str]]]  # and lines about the clients
Load = Callable[[str], Dataset]


def in_process(parts: Parts) -> tuple[Dispatch, list[str]]:
    """The clients are in this process and share the data set out among them."""
    config, dataset = parts.config, parts.dataset
    check_training(dataset)
    check_test(dataset)
    shares = partition(config.partition, dataset, config.num_clients, config.seed)
    data = [ClientData(dataset, indices) for indices in shares]
    dispatch = LocalDispatch(
        parts.algorithm.client_update, parts.server.engine, data, parts.present()
    )
    return dispatch, about_shares(dataset, shares, config.partition)


@dataclass(frozen=True)
class How:
    """How a run is carried out; none of it decides its result."""

    watch: Watch = lambda entry: None
    say: Say = lambda line: None  # gets why the native engine does not serve, and the like
    connect: Connect = in_process  # makes the dispatch to the clients
    load: Load | None = None  # of a data set by its name, by who has it already
    checkpoint_seconds: float | None = None  # between two; 0: one after every step; None: see below
    interruptible: bool = False  # Ctrl-C ends the run early, with what it has reached
    shared: bool = False  # the folder is shared by servers of a Flower app, see `lock`
