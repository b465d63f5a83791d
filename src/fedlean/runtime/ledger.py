"""What a step cost: bytes of its messages, operations, and time on the emulated devices.

Bytes are the exact sizes of the encoded messages.  Operations, seconds and memory are those of the
modelled device doing the work that the clients report, initial pruning and full-gradient uploads
included.  Left out: choosing a new mask (Algorithm 2), which the initial client does a dozen times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedlean import wire
from fedlean.core import ClientTask, ClientUpdate
from fedlean.cost.time import link_seconds
from fedlean.runtime.clientstore import ClientStore
from fedlean.runtime.prices import Prices


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
    memory_utilisation: float | None = None  # mean share of the answering clients' memory
    link_utilisation: float | None = None  # mean share of the step in which their links were busy
    budget_utilisation: float | None = None  # mean share of their `budget_bytes` that travelled

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
            _later(self.memory_utilisation, other.memory_utilisation),
            _later(self.link_utilisation, other.link_utilisation),
            _later(self.budget_utilisation, other.budget_utilisation),
        )


def _later(one: float | None, other: float | None) -> float | None:
    return one if other is None else other


class Ledger:
    """Charges one attempt at a step: `ask` for the tasks sent, `answer` for each update."""

    def __init__(self, tasks: Sequence[ClientTask], store: ClientStore, prices: Prices):
        self._prices = prices
        self._sent = {
            task.client: wire.task_bytes(task, store.known(task.client)) for task in tasks
        }
        self._cost = StepCost(downlink_bytes=sum(self._sent.values()))
        self._memory_shares: list[float] = []  # of those who answered and have a budget
        self._link_seconds: list[float] = []  # of those who answered and have a link of their own
        self._budget_shares: list[float] = []  # of those who answered and have a budget of bytes
        # a round of which nobody answers lasts as long as sending it
        for client, down in self._sent.items():
            self._charge_time(0.0, link_seconds(down, 0, prices.profile(client)))

    @property
    def cost(self) -> StepCost:
        """So far."""
        lasts = self._cost.simulated_seconds
        links = [seconds / lasts for seconds in self._link_seconds if lasts]
        return replace(
            self._cost,
            memory_utilisation=_mean(self._memory_shares),
            link_utilisation=_mean(links),
            budget_utilisation=_mean(self._budget_shares),
        )

    def answer(self, task: ClientTask, update: ClientUpdate) -> None:
        up = wire.update_bytes(update, task)
        price = self._prices.of(task, update.work)
        self._cost = replace(
            self._cost,
            uplink_bytes=self._cost.uplink_bytes + up,
            flops=self._cost.flops + price.flops,
            flops_dense_gradient=self._cost.flops_dense_gradient + price.flops_dense_gradient,
            peak_memory_bytes=max(self._cost.peak_memory_bytes, price.peak_memory_bytes),
        )
        link = link_seconds(self._sent[task.client], up, self._prices.profile(task.client))
        self._charge_time(price.seconds, link)
        device = self._prices.device(task.client)
        if device.memory_bytes:
            self._memory_shares.append(price.peak_memory_bytes / device.memory_bytes)
        if device.profile is not None:
            self._link_seconds.append(link)
        if device.budget_bytes:
            self._budget_shares.append((self._sent[task.client] + up) / device.budget_bytes)

    def repeated(self, downlink_bytes: int) -> None:
        """What clients that had lost something were sent again; its time is not modelled."""
        total = self._cost.downlink_bytes + downlink_bytes
        self._cost = replace(self._cost, downlink_bytes=total)

    def _charge_time(self, compute: float, link: float) -> None:
        """The step lasts as long as its slowest client."""
        if compute + link > self._cost.simulated_seconds:
            self._cost = replace(
                self._cost,
                simulated_seconds=compute + link,
                compute_seconds=compute,
                link_seconds=link,
            )


def _mean(shares: Sequence[float]) -> float | None:
    return sum(shares) / len(shares) if shares else None
