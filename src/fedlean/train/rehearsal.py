"""How a plan walks through a method: the shortest runs in which clients do all they ever do.

A module-level `rehearsals(settings) -> Sequence[Rehearsal]` beside a method says it; without one
the method is walked through as `Rehearsal()` says.  It changes when things come, and what the
server computes on its own, never what a client is sent, does or sends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedlean.core import Scalar


@dataclass(frozen=True)
class Rehearsal:
    """A run of `rounds`, of which the last that is walked is round `until` of phase "train".

    What the server would make of the answers to that is not asked.  settings: in place of the
    user's own of these names.  steps: at most so many are walked.  density: the run starts from a
    model that keeps this share of every prunable tensor; None: of all weights.  one_batch: a
    client's half computes much on each batch and nothing that depends on how many there are.
    bound: what clients hold follows from the data while a run goes on, and the walk shows the most.
    new_masks: a client's mask is another one in every round, and travels each time, though weights
    that are not trained would choose the same again.
    merged: whether what the server makes of answers shows in what it asks next; otherwise it is
    walked as if nobody answered, where a merge would take long.
    """

    settings: Mapping[str, Scalar | None] = field(default_factory=dict)
    rounds: int = 5
    until: int = 5
    steps: int = 400
    density: float | None = None
    one_batch: bool = False
    bound: bool = False
    new_masks: bool = False
    merged: bool = True
