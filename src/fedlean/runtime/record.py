"""What happened in one server step, for the log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fedlean.core import ClientTask
from fedlean.runtime.ledger import StepCost
from fedlean.runtime.moves import Moved
from fedlean.runtime.prices import Lack


@dataclass
class StepRecord:
    """tasks: of the last attempt, after those of earlier ones whose clients were not asked again.

    present: devices that were there when tasks were last ordered; able: those of them that could
    hold the smallest of these, None where the method does not say what tasks take.
    answered: clients whose updates are in the model, in cohort order.  asked_round: of the tasks,
    those for clients that were left out among them; None where there was none.
    """

    tasks: Sequence[ClientTask] = ()
    cost: StepCost = field(default_factory=StepCost)
    present: int = 0
    able: int | None = None
    answered: list[int] = field(default_factory=list)
    left_out: dict[int, str] = field(default_factory=dict)  # why a client got no task
    not_chosen: list[int] = field(default_factory=list)  # who was left when it stopped looking
    lacks: list[Lack] = field(default_factory=list)  # of those, of what
    smaller: str = ""  # what would make their tasks smaller, where it is not the same for all
    refused: dict[int, str] = field(default_factory=dict)  # why a client gave nothing
    rejected: dict[int, str] = field(default_factory=dict)  # of those: an update came and is wrong
    notes: list[str] = field(default_factory=list)  # what the user should know
    moved: dict[int, Moved] = field(default_factory=dict)  # by client, of sound updates
    metrics: dict[str, float] = field(default_factory=dict)
    attempts: int = 0
    asked_round: int | None = None
    server_only: bool = False  # a step of the server's own
    wall_seconds: float = 0.0
    measured_seconds: float = 0.0  # of the median client, all attempts together


_LACKS = (
    ("memory", "smallest", "", "device has"),
    ("traffic", "smallest", " of traffic", "budget is"),
    ("time", "quickest", "", "budget is"),
)


def smaller(task: ClientTask) -> str:
    """What makes a stage of progressive training smaller; "" of another task."""
    if "stage" not in task.hparams:
        return ""
    parts = "divide the model into more parts (--set ends=..., or the model's blocks=unit), "
    together = task.hparams.get("beginning") == "together" and task.sub_model.frozen
    return parts + ("run what is frozen in pieces (--set beginning=pieces), " if together else "")


def nobody_was_asked(record: StepRecord) -> str:
    """Why a step sent no task, in a sentence."""
    if not record.lacks:
        return "nobody was asked: no device is there"
    others = f"; {len(record.not_chosen)} others were not chosen" if record.not_chosen else ""
    why = ", ".join(
        f"the {smallest} task needs {lacks[0].shown(min(lack.needs for lack in lacks))}{of} and "
        f"the largest {largest} {lacks[0].shown(max(lack.has for lack in lacks))}"
        for kind, smallest, of, largest in _LACKS
        if (lacks := [lack for lack in record.lacks if lack.of == kind])
    )
    return (
        f"nobody was asked: no task fits its device: {len(record.left_out)} left out, {why}{others}"
    )
