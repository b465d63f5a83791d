"""What a step cost: bytes of its messages, operations, and time on the emulated devices.

Bytes are the exact sizes of the encoded messages.  Operations, seconds and memory are those of the
modelled device doing the work that the clients report, initial pruning and full-gradient uploads
included.  Left out: choosing a new mask (Algorithm 2), which the initial client does a dozen times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedlean import wire
from fedlean.core import ClientTask, ClientUpdate, Work
from fedlean.cost.price import cost
from fedlean.cost.profile import Profile
from fedlean.cost.time import link_seconds
from fedlean.runtime.clientstore import ClientStore


@dataclass(frozen=True)
class StepCost:
    """One server step; bytes and operations of all clients, seconds of the slowest."""

    downlink_bytes: int = 0
    uplink_bytes: int = 0
    flops: int = 0
    flops_dense_gradient: int = 0  # with the weights' gradients taken densely, as PruneFL counts
    simulated_seconds: float = 0.0
    compute_seconds: float = 0.0  # of the slowest client
    link_seconds: float = 0.0  # of the slowest client
    peak_memory_bytes: int = 0

    def plus(self, other: StepCost) -> StepCost:
        """A second attempt at the same step: it takes its own time."""
        return StepCost(
            self.downlink_bytes + other.downlink_bytes,
            self.uplink_bytes + other.uplink_bytes,
            self.flops + other.flops,
            self.flops_dense_gradient + other.flops_dense_gradient,
            self.simulated_seconds + other.simulated_seconds,
            self.compute_seconds + other.compute_seconds,
            self.link_seconds + other.link_seconds,
            max(self.peak_memory_bytes, other.peak_memory_bytes),
        )


def _key(work: Work) -> tuple[Any, ...]:
    return tuple(
        tuple(sorted(each.items())) if isinstance(each, Mapping) else each
        for each in vars(work).values()
    )


class Ledger:
    """Charges one attempt at a step: `ask` for the tasks sent, `answer` for each update."""

    def __init__(self, tasks: Sequence[ClientTask], store: ClientStore, profile: Profile):
        self._profile = profile
        self._sent = {
            task.client: wire.task_bytes(task, store.known(task.client)) for task in tasks
        }
        self._prices: dict[tuple[Any, ...], StepCost] = {}
        down = max(self._sent.values(), default=0)
        self.cost = StepCost(downlink_bytes=sum(self._sent.values()))
        # a round of which nobody answers lasts as long as sending it
        self._charge_time(0.0, link_seconds(down, 0, profile))

    def answer(self, task: ClientTask, update: ClientUpdate) -> None:
        up = wire.update_bytes(update, task)
        price = self._price(task, update)
        self.cost = replace(
            self.cost,
            uplink_bytes=self.cost.uplink_bytes + up,
            flops=self.cost.flops + price.flops,
            flops_dense_gradient=self.cost.flops_dense_gradient + price.flops_dense_gradient,
            peak_memory_bytes=max(self.cost.peak_memory_bytes, price.peak_memory_bytes),
        )
        link = link_seconds(self._sent[task.client], up, self._profile)
        self._charge_time(price.compute_seconds, link)

    def _price(self, task: ClientTask, update: ClientUpdate) -> StepCost:
        """Of the work alone.  Clients that did the same work as another are not priced anew."""
        key = (task.spec.hash, task.sub_model.frozen, *map(_key, update.work))
        if key not in self._prices:
            self._prices[key] = self._priced(task, update.work)
        return self._prices[key]

    def _priced(self, task: ClientTask, works: Sequence[Work]) -> StepCost:
        price = cost(task, works, self._profile)
        return StepCost(
            flops=price.flops,
            flops_dense_gradient=price.flops_dense_gradient,
            compute_seconds=price.seconds,
            peak_memory_bytes=price.peak_memory_bytes,
        )

    def repeated(self, downlink_bytes: int) -> None:
        """What clients that had lost something were sent again; its time is not modelled."""
        total = self.cost.downlink_bytes + downlink_bytes
        self.cost = replace(self.cost, downlink_bytes=total)

    def _charge_time(self, compute: float, link: float) -> None:
        """The step lasts as long as its slowest client."""
        if compute + link > self.cost.simulated_seconds:
            self.cost = replace(
                self.cost,
                simulated_seconds=compute + link,
                compute_seconds=compute,
                link_seconds=link,
            )
