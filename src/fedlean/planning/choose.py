"""Which method to take on a device, by a plain rule, which is ours (docs/plan.md states it)."""

from __future__ import annotations

from collections.abc import Sequence

from fedlean.planning.records import MethodPlan
from fedlean.report.units import human, percent

PLAIN = "fedavg"  # of equals the one with the fewest parts


def recommend(methods: Sequence[MethodPlan]) -> tuple[str | None, str]:
    """(method, the reason in a sentence); none where nothing fits."""
    able = [one for one in methods if one.able]
    if not able:
        planned = [one for one in methods if one.planned]
        if not planned:
            return None, "No method could be planned for this model."
        least = min(planned, key=lambda one: one.needs_bytes)
        return None, (
            f"Nothing fits: {least.method} needs the least, {human(least.needs_bytes, 'bytes')}; "
            "smaller batches, a smaller model or more memory would help."
        )
    most = max(one.share or 0 for one in able)
    best, why = _best([one for one in able if (one.share or 0) == most], methods)
    if most in (0, 1):
        return best, why + (" All devices of the fleet can take part." if most else "")
    return best, f"{why} Only {percent(most, 0)} of the fleet's devices can take part in all of it."


def _best(able: Sequence[MethodPlan], methods: Sequence[MethodPlan]) -> tuple[str, str]:
    """Of those in which as many devices can take part."""
    able = [one for one in able if one.lone_fits] or able
    whom = "" if able[0].share is None else " all devices"
    backward = [one for one in able if not one.typical.forward_only]
    if not backward:
        best = min(able, key=_cost)
        return best.method, (
            f"{best.method}: only forward passes fit{whom}; they take many more rounds than "
            "backpropagation would."
        )
    whole = [one for one in backward if _whole(one)]
    if not whole:
        short = any(one.planned and _whole(one) for one in methods)
        return _most_kept(backward, f"the whole model does not fit{whom}; " if short else "")
    plain = min(whole, key=_cost)
    if plain.typical.binds != "link":
        return plain.method, (
            f"{plain.method}: the whole model fits, and computing takes longer than sending: "
            "pruning would cost accuracy before it saves much."
        )
    known = [one for one in backward if not one.bound]
    best = min(known, key=_cost)
    if best.method == plain.method:
        return plain.method, f"{plain.method}: the whole model fits, and nothing is quicker."
    return best.method, (
        f"{_named(best)}: the whole model fits, but sending it takes longer than computing; of "
        f"what fits, this takes the least time a round, {best.typical.seconds:.3g} s instead of "
        f"{plain.typical.seconds:.3g} s."
    )


def _most_kept(able: Sequence[MethodPlan], why: str) -> tuple[str, str]:
    best = min(able, key=lambda one: (-round(one.typical.model_share, 3), *_cost(one)))
    where = " on the median device" if len(best.choices) > 1 else ""
    lone = "" if best.lone_fits else ", if one larger device does what is asked of one client"
    return best.method, (
        f"{_named(best)}: {why}of what fits, this keeps the most of the model, "
        f"{100 * best.typical.model_share:.3g}%{where}{lone}."
    )


def _named(one: MethodPlan) -> str:
    knob = one.knob
    if knob is None or knob.value in (None, 1.0):  # with 1 nothing is pruned
        return one.method
    return f"{one.method} with {knob.name}={knob.value:g}"


def _whole(one: MethodPlan) -> bool:
    """Whether every client holds all of the model in every phase."""
    if len(one.choices) > 1:  # devices of the fleet get different parts
        return False
    return not one.bound and all(phase.model_share >= 1 for phase in one.phases)


def _cost(one: MethodPlan) -> tuple[float, bool, int, str]:
    """Seconds of a round to two figures; of equals the plain one, then the fewest phases."""
    seconds = float(f"{one.typical.seconds:.2g}")
    return seconds, one.method != PLAIN, len(one.phases), one.method
