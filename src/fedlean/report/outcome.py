"""The first lines of a page: what came out, in words computed from the data.

Each sentence must stay true when targets are missed, when the other run is the better one, when
there is no simulated clock and when a run has not ended.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedlean.report import units
from fedlean.report.run_folder import (
    Run,
    best,
    final_accuracy,
    first_reaching,
    has_clock,
    run_total,
    total,
)
from fedlean.report.stages import stretches
from fedlean.report.tables import density, labels, mean_memory, peak_memory


def run_outcome(run: Run, targets: Sequence[float]) -> list[str]:
    """Sentences about one run."""
    if not run.rounds:
        return [f"{run.name} has not finished a step yet."]
    final = final_accuracy(run)
    if final is None:
        sentences = [f"{run.name} has not been evaluated yet."]
    else:
        first = _targets_sentence(run, targets)
        last = _end_sentence("It" if first else run.name, run, final)
        sentences = [first, last] if first else [last]
    return sentences + _stages_sentence(run) + unfinished([run])


def _stages_sentence(run: Run) -> list[str]:
    """What training part by part took; nothing for a run without stages."""
    names = {one.stage for one in stretches(run) if one.stage is not None}
    peak, mean = peak_memory(run), mean_memory(run.rounds)
    if not names or peak is None:
        return []
    return [
        f"It trained {len(names)} stage{'' if len(names) == 1 else 's'}; the neediest client's "
        f"modelled peak was {units.human(peak, 'bytes')} at most and "
        f"{units.human(mean, 'bytes')} in the mean over rounds."
    ]


def _targets_sentence(run: Run, targets: Sequence[float]) -> str:
    reached = [target for target in targets if first_reaching(run, target)]
    missed = [target for target in targets if target not in reached]
    parts = []
    if reached:
        parts.append(
            f"{run.name} reached {units.target_text(reached[-1])} {_when(run, reached[-1])}"
        )
    if missed:
        names = " or ".join(units.target_text(target) for target in missed)
        verb = "it did" if reached else f"{run.name} did"
        parts.append(f"{verb} not reach {names} ({_best_text(run, missed[0])})")
    return "; ".join(parts) + "." if parts else ""


def _when(run: Run, target: float, *, clock: bool = True) -> str:
    row = first_reaching(run, target)
    assert row is not None
    if not (clock and has_clock(run)):
        return f"in round {row['round']}"
    amount, unit = units.split(total(row, "simulated_seconds") or 0.0, "seconds")
    return f"after {amount} simulated {unit} (round {row['round']})"


def _best_text(run: Run, target: float) -> str:
    top = best(run)
    if top is None:
        return "never evaluated"
    return f"best {units.short_of(top['accuracy'], target)} in round {top['round']}"


def _end_sentence(subject: str, run: Run, final: float) -> str:
    moved = units.human(run_total(run, "bytes"), "bytes")
    work = units.human(run_total(run, "flops_per_client"), "flops")
    kept = density(run)
    sparse = (
        f", {units.density_text(kept)} of the prunable weights kept" if kept is not None else ""
    )
    return (
        f"{subject} {_ended(run)} at {units.percent(final)} after {_rounds(run.num_rounds)}"
        f"{sparse}; all clients together moved {moved}, each computed {work} on average."
    )


def _ended(run: Run) -> str:
    return "ended" if run.summary else "stands"


def _rounds(count: int) -> str:
    return f"{count} round{'' if count == 1 else 's'}"


def unfinished(runs: Sequence[Run]) -> list[str]:
    """A sentence for every run without a summary."""
    return [
        f"{name} has no summary: it is still running or was interrupted, and its figures end at "
        f"round {run.num_rounds}."
        for name, run in zip(labels(runs), runs, strict=True)
        if run.summary is None
    ]


def comparison_outcome(runs: Sequence[Run], targets: Sequence[float]) -> list[str]:
    """One sentence per run against the first one, then the runs without a summary."""
    names = labels(runs)
    others = list(zip(names, runs, strict=True))[1:]
    sentences = [_against(name, run, names[0], runs[0], targets) for name, run in others]
    return sentences + unfinished(runs)


def _against(name: str, run: Run, base_name: str, base: Run, targets: Sequence[float]) -> str:
    parts = [*_targets_against(name, run, base_name, base, targets)]
    end = _end_against(run, base_name, base)
    if end:
        # After a plain race "it" can only be this run; elsewhere it might be the baseline.
        raced = any(first_reaching(run, t) and first_reaching(base, t) for t in targets)
        parts.append(f"{'it' if raced and len(parts) == 1 else name} {end}")
    return "; ".join(parts or [f"{name} or {base_name} has not been evaluated yet"]) + "."


def _targets_against(
    name: str, run: Run, base_name: str, base: Run, targets: Sequence[float]
) -> list[str]:
    """The highest target that both reached, then what only one of them reached."""
    mine = {target for target in targets if first_reaching(run, target)}
    theirs = {target for target in targets if first_reaching(base, target)}
    parts = []
    if mine & theirs:
        parts.append(_race(name, run, base_name, base, max(mine & theirs)))
    if mine - theirs:
        target = max(mine - theirs)
        only = f"only {name}" if parts else name
        parts.append(
            f"{only} reached {units.target_text(target)}, {_when(run, target)}, and {base_name} "
            f"did not ({_best_text(base, target)})"
        )
    if theirs - mine:
        target = max(theirs - mine)
        parts.append(
            f"{name} did not reach {units.target_text(target)} ({_best_text(run, target)}), "
            f"which {base_name} reached {_when(base, target)}"
        )
    if targets and not mine and not theirs:
        target = min(targets)
        parts.append(
            f"neither {name} ({_best_text(run, target)}) nor {base_name} "
            f"({_best_text(base, target)}) reached {units.target_text(target)}"
        )
    return parts


def _race(name: str, run: Run, base_name: str, base: Run, target: float) -> str:
    mine, theirs = first_reaching(run, target), first_reaching(base, target)
    assert mine is not None and theirs is not None
    clock = has_clock(run) and has_clock(base)
    if clock:
        paid = total(theirs, "simulated_seconds"), total(mine, "simulated_seconds")
        ratio = units.versus(paid[0], paid[1], "sooner than", "later than")
    else:  # rounds are the only clock that both have
        ratio = units.versus(theirs["round"], mine["round"], "fewer rounds than", "the rounds of")
    ratio = "as soon as" if ratio in (None, "same") else ratio
    when = _when(run, target, clock=clock)
    return f"{name} reached {units.target_text(target)} {when}, {ratio} {base_name}"


def _end_against(run: Run, base_name: str, base: Run) -> str:
    mine, theirs = final_accuracy(run), final_accuracy(base)
    if mine is None or theirs is None:
        return ""
    points = f"{100 * abs(mine - theirs):.1f}"
    side = "above" if mine > theirs else "below"
    level = f"level with {base_name}" if points == "0.0" else f"{points} points {side} {base_name}"
    length = ""
    if run.num_rounds != base.num_rounds:
        length = f" after {_rounds(run.num_rounds)} against {base.num_rounds}"
    costs = f"{_bytes_against(run, base)}{_memory_against(run, base)}"
    return f"{_ended(run)} at {units.percent(mine)}, {level}{length}{costs}"


def _bytes_against(run: Run, base: Run) -> str:
    mine, theirs = run_total(run, "bytes"), run_total(base, "bytes")
    if not mine or not theirs:
        return ""
    share = mine / theirs
    if 1 / 1.005 < share < 1.005:
        return ", for the same bytes"
    return (
        f", at {100 * share:.2g}% of its bytes"
        if share < 1
        else f", at {units.times(share)} its bytes"
    )


def _memory_against(run: Run, base: Run) -> str:
    """Of the neediest client; nothing where both need the same to half a hundredth."""
    mine, theirs = peak_memory(run), peak_memory(base)
    if not mine or not theirs or 1 / 1.005 < mine / theirs < 1.005:
        return ""
    share = mine / theirs
    text = f"{100 * share:.2g}% of" if share < 1 else units.times(share)
    return f", with {text} its modelled peak memory"
