"""The stages of a run of progressive training, as its log tells them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from fedlean.report.run_folder import Row, Run

MAX_BORDERS = 30  # more changes of the stage than a plot can show


@dataclass(frozen=True)
class Stretch:
    """Consecutive steps of one stage."""

    stage: str | None  # None where other steps than those of stages were
    name: str  # of the stage, after its phase where the stages have several
    begin: int  # rounds completed before
    end: int  # and after it
    rows: tuple[Row, ...]


def stretches(run: Run) -> list[Stretch]:
    """All steps of the run, in order; [] where no step names a stage."""
    keys: list[tuple[str, str | None]] = []
    for row in run.rounds:
        # a step that asked nobody has no tasks to say the stage: it belongs to the one before
        idle = keys and not row.get("cohort")
        keys.append(keys[-1] if idle else (str(row.get("phase")), row.get("stage")))
    phases = {phase for phase, stage in keys if stage is not None}
    if not phases:
        return []
    found, begin = [], 0
    for key, group in groupby(zip(keys, run.rounds, strict=True), key=lambda pair: pair[0]):
        rows = tuple(row for _, row in group)
        end = rows[-1]["round"]
        name = _name(*key, several=len(phases) > 1)
        found.append(Stretch(key[1], name, begin, end, rows))
        begin = end
    return found


def _name(phase: str, stage: str | None, *, several: bool) -> str:
    if stage is None:
        return phase
    return f"{phase} {stage}" if several else stage


def take_turns(found: Sequence[Stretch]) -> bool:
    """Whether the stage changes too often for borders, as where each round is another's."""
    changes, names = len(found) - 1, {one.name for one in found}
    return changes > MAX_BORDERS or changes > 2 * len(names)


def bordered(run: Run) -> list[Stretch]:
    """`stretches` where plots show their borders; [] where there are none, or too many."""
    found = stretches(run)
    return [] if len(found) < 2 or take_turns(found) else found


def stages_notes(names: Sequence[str], runs: Sequence[Run]) -> list[str]:
    """What a reader has to know about the plots; a run's name stands in `names`."""
    notes = []
    if any(bordered(run) for run in runs):
        notes.append(
            "Dotted lines are where the next stage of training begins."
            if len(runs) == 1
            else "Ticks above a plot are where the run of their colour begins its next stage."
        )
    for name, run in zip(names, runs, strict=True):
        found = stretches(run)
        if len(found) > 1 and take_turns(found):
            notes.append(
                f"In {name} stages take turns, {len(found) - 1} changes in {run.num_rounds} "
                "rounds: the plots show no borders."
            )
    return notes
