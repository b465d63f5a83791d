"""Which clients take part in a round, and their tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from fedlean.algorithm import Device, Server
from fedlean.core import (
    ClientTask,
    Model,
    Scalar,
    SubModel,
    derive_seed,
    generator,
)
from fedlean.train.hyperparameters import at_least


def sample_cohort(
    devices: Sequence[Device], size: int | None, *, seed: int, round: int
) -> list[int]:
    """Ids of `size` clients, uniformly without replacement, ascending; None or too large: all.

    A pure function of (seed, round) and the devices present.
    """
    ids = sorted(device.id for device in devices)
    if size is None or size >= len(ids):
        return ids
    drawn = generator(seed, round, 0, "cohort").choice(len(ids), size, replace=False)
    return sorted(ids[position] for position in drawn)


def devices_of(devices: Sequence[Device], ids: Iterable[int]) -> list[Device]:
    """The devices with these ids, in their order."""
    by_id = {device.id: device for device in devices}
    return [by_id[each] for each in ids]


def cohort_tasks(
    server: Server,
    clients: Sequence[int],
    *,
    round: int,
    phase: str,
    model: Model,
    hparams: Mapping[str, Scalar],
    frozen: frozenset[str] = frozenset(),
) -> list[ClientTask]:
    """One task for each of `clients`, all of the same model; each draws with a seed of its own.

    frozen: tensors that none of them moves.
    """
    # one for all, so that it is hashed and sent once
    sub_model = SubModel(masks=model.masks, frozen=frozen)
    return [
        ClientTask(
            round,
            phase,
            client,
            derive_seed(server.seed, round, client, phase),
            model.spec,
            model.params,
            sub_model,
            hparams,
        )
        for client in clients
    ]


def check_cohort(size: int | None, server: Server) -> None:
    """Raises ValueError unless a cohort of `size` (None: all) can be drawn from the clients."""
    if size is None:
        return
    at_least("cohort", size, 1)
    if server.clients is not None and size > server.clients:
        raise ValueError(
            f"a cohort of {size} cannot be drawn from {server.clients} clients: choose --cohort "
            f"from 1 to {server.clients}"
        )


def check_client(name: str, client: int, server: Server) -> None:
    """Raises ValueError unless `client`, a setting of that name, is one of the clients."""
    at_least(name, client, 0)
    if server.clients is not None and client >= server.clients:
        raise ValueError(f"{name} must be from 0 to {server.clients - 1}, got {client}")
