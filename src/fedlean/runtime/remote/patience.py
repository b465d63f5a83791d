"""Which clients are asked less often: those that are silent, or whose updates keep being refused.

A silent client costs a round its whole deadline.  With each miss in a row it is left out of twice
as many steps, and it is asked at once again when it speaks: it was away, or its device started
anew.  Speaking without answering tasks helps LIFTS times in a row, for a device that is killed by
every task, and starts anew each time, speaks well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

MOST_STEPS = 32  # of which a client is left out in a row
LIFTS = 2
FIRST_REFUSAL = 2  # in a row after which a client is left out; one may be an accident


@dataclass
class _Streak:
    """Of one client, since its last update that was taken."""

    misses: int = 0  # deadlines in a row
    refusals: int = 0  # of updates, in a row
    slow: bool = False  # it gave up: it is there, and that it speaks says nothing
    lifts: int = 0
    until: int = 0  # the last step of which it is left out
    steps: int = 0  # of how many that makes
    said: bool = False

    def rest(self, step: int, times: int) -> None:
        self.steps = min(2 ** min(times, MOST_STEPS), MOST_STEPS)
        self.until, self.said = step + self.steps, False


class Patience:
    """For the clients of one run; steps are the server's."""

    def __init__(self, say: Callable[[str], None]):
        self._say = say
        self._streaks: dict[int, _Streak] = {}
        self._notes: list[str] = []

    def missed(self, client: int, step: int, *, slow: bool = False) -> None:
        """No answer at the deadline; `slow`: it says that it gave up."""
        streak = self._of(client)
        streak.rest(step, streak.misses)
        streak.misses += 1
        streak.slow |= slow

    def gave_up(self, client: int) -> None:
        """It says so of a task whose deadline it has missed."""
        self._of(client).slow = True

    def answered(self, client: int) -> None:
        """In time, and not that it lacks something; what its update is worth comes later."""
        if streak := self._streaks.get(client):
            self._streaks[client] = _Streak(refusals=streak.refusals)

    def refused(self, client: int, step: int) -> None:
        """The checks refused its update, or what it sent instead is none."""
        streak = self._of(client)
        streak.refusals += 1
        if streak.refusals >= FIRST_REFUSAL:
            streak.rest(step, streak.refusals - FIRST_REFUSAL)

    def taken(self, client: int) -> None:
        """Its update counts."""
        self._streaks.pop(client, None)

    def spoke(self, client: int) -> bool:
        """It has signed in anew, answered a greeting, or answered a task late.

        Whether that says anything: of one that speaks time and again without answers it does not.
        """
        streak = self._streaks.get(client)
        if not (streak and streak.misses):
            return True
        if streak.slow or streak.lifts >= LIFTS:
            return False
        streak.lifts += 1
        if streak.said and streak.until:
            self._say(f"client {client} is heard again, and asked again")
        streak.until = 0
        return True

    def silent(self, step: int) -> set[int]:
        """Those that would be left out of `step`, and asked again if they spoke."""
        return {
            client
            for client, streak in self._streaks.items()
            if streak.until >= step and streak.misses and not streak.slow and streak.lifts < LIFTS
        }

    def left_out(self, clients: Iterable[int], step: int, *, least: int) -> set[int]:
        """Whom not to ask in `step` of `clients`, which is said; nobody where fewer than `least`
        would be left."""
        here = set(clients)
        out = {c for c in here if c in self._streaks and self._streaks[c].until >= step}
        if len(here) - len(out) < max(1, least):
            return set()
        for client in sorted(out):
            streak = self._streaks[client]
            if not streak.said:
                streak.said = True
                self._note(client, streak)
        return out

    def notes(self) -> list[str]:
        """What came up since the last call."""
        notes, self._notes = self._notes, []
        return notes

    def _note(self, client: int, streak: _Streak) -> None:
        steps = "the next step" if streak.steps == 1 else f"{streak.steps} steps"
        often = streak.misses or streak.refusals
        times = "" if often == 1 else f", {often} times in a row"
        what = "gave no answer in time" if streak.misses else "sent an update that was refused"
        line = f"client {client} {what}{times}: it is left out of {steps}"
        self._say(line)
        self._notes.append(line)

    def _of(self, client: int) -> _Streak:
        return self._streaks.setdefault(client, _Streak())
