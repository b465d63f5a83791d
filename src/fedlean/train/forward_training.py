"""Training by forward passes as its methods share it: its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlean.algorithm import Device, Server
from fedlean.core import derive_seed
from fedlean.engine.directions import Kind
from fedlean.engine.protocol import Loss
from fedlean.train.cohort import check_cohort, sample_cohort
from fedlean.train.forward_round import ForwardRound
from fedlean.train.forward_updates import Optimizer, Rule
from fedlean.train.schedule import Schedule
from fedlean.train.zeroth_order import Differences, Form


@dataclass(frozen=True)
class ForwardTraining:
    """The settings of zeroth-order training and of its cohort, by the same names in every method.

    lr: of the server's optimiser.
    lr_half_life_rounds, lr_schedule, lr_warmup_rounds: as in `LocalSGD`.
    optimizer: "adam", "momentum" or "normalised"; see `forward_updates.Rule`.
    momentum: of the optimizer "momentum".
    directions: K, along which a client takes the slope of its loss.
    sigma: σ, how far along them it goes.
    kind: of the directions: "gaussian", "sign" (±1) or "rank1".
    differences: "forward", K + 1 evaluations of each example, or "central", 2K.
    batch_size: B, examples of a client's round.
    micro_batch: of them at once in memory, 0: all.
    cohort: clients a round, drawn anew each round; None: all.
    loss: "ce" or "bce", as in `LocalSGD`.
    scalars: in which the slopes go up: "fp32", "fp16" or "int8".
    """

    lr: float = 0.01
    lr_half_life_rounds: float = 0.0
    lr_schedule: str = "constant"
    lr_warmup_rounds: int = 0
    optimizer: Optimizer = "adam"
    momentum: float = 0.9
    directions: int = 50
    sigma: float = 1e-3
    kind: Kind = "gaussian"
    differences: Differences = "forward"
    batch_size: int = 32
    micro_batch: int = 0
    cohort: int | None = None
    loss: Loss = "ce"
    scalars: Form = "fp32"

    def check(self, server: Server) -> None:
        """Raises ValueError naming what is out of range or does not go with another setting."""
        self.schedule.check()
        check_cohort(self.cohort, server)
        _ = self.rule, self.asked  # these check themselves
        if self.optimizer == "normalised" and self.directions == 1:
            raise ValueError(
                "optimizer='normalised' divides by the standard deviation of a round's slopes, and "
                "one has none: take directions=2 or more, or another optimizer"
            )

    @property
    def rule(self) -> Rule:
        return Rule(self.optimizer, self.momentum)

    @property
    def asked(self) -> ForwardRound:
        """What clients are asked in a round, of all tensors that are not frozen."""
        return ForwardRound(
            self.batch_size,
            self.micro_batch,
            self.loss,
            self.directions,
            self.sigma,
            self.kind,
            self.differences,
            self.scalars,
            "zeroth",
        )

    def clients(self, server: Server, devices: Sequence[Device], round: int) -> list[int]:
        """Ids of the cohort of `round`, ascending."""
        return sample_cohort(devices, self.cohort, seed=server.seed, round=round)

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.lr, self.lr_half_life_rounds, self.lr_schedule, self.lr_warmup_rounds)

    def rate(self, rounds_done: int) -> float:
        """The learning rate in the round after so many."""
        return self.schedule.rate(rounds_done)


def run_seed(server: Server) -> int:
    """From which the directions of all rounds follow."""
    return derive_seed(server.seed, 0, 0, "zeroth order")


def unused(settings: Mapping[str, Any]) -> dict[str, str]:
    """Of these settings, those without effect beside the others, and why."""
    optimizer = settings["optimizer"]
    return {} if optimizer == "momentum" else {"momentum": f"optimizer is {optimizer!r}"}
