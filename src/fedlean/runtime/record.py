"""What happened in one server step, for the log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fedlean.core import ClientTask
from fedlean.runtime.ledger import StepCost
from fedlean.runtime.moves import Moved


@dataclass
class StepRecord:
    """tasks: of the last attempt, after those of earlier ones whose clients were not asked again.

    answered: clients whose updates are in the model, in cohort order.
    """

    tasks: Sequence[ClientTask] = ()
    cost: StepCost = field(default_factory=StepCost)
    answered: list[int] = field(default_factory=list)
    refused: dict[int, str] = field(default_factory=dict)  # why a client gave nothing
    rejected: dict[int, str] = field(default_factory=dict)  # of those: an update came and is wrong
    notes: list[str] = field(default_factory=list)  # what the user should know
    moved: dict[int, Moved] = field(default_factory=dict)  # by client, of sound updates
    metrics: dict[str, float] = field(default_factory=dict)
    attempts: int = 0
    wall_seconds: float = 0.0
    measured_seconds: float = 0.0  # of the median client, all attempts together
