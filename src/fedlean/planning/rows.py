"""A block of a plan as rows of text, for the terminal and the page alike."""

from __future__ import annotations

from fedlean.planning.records import DevicePlan, MethodPlan, Phase
from fedlean.report.units import human, percent
from fedlean.runtime.method import find_method, hyperparameters

HEADS = ("method, phase", "memory", "down", "up", "a round", "binds")
NOTES = (
    "memory: the peak of a client's work, its process and libraries apart; ! does not fit.",
    "down: after first contact, which also carries the model's description and pattern.",
    "a round: computing and both ways of the link; * asked of one client, or once.",
    "≤: the most; what clients hold is found while a run goes on.",
)


def title(block: DevicePlan) -> str:
    parameters = f"{block.parameters:,} parameters"
    memory, up, down = (
        human(value, "bytes")
        for value in (block.memory_bytes, block.uplink_bytes_per_s, block.downlink_bytes_per_s)
    )
    link = f"{up}/s" if up == down else f"{up}/s up, {down}/s down"
    return f"{block.model} ({parameters}) on {block.device} with {memory}, link {link}"


def heads(block: DevicePlan) -> tuple[str, ...]:
    return HEADS if block.device_steps is None else (*HEADS, "can")


def rows(block: DevicePlan) -> list[tuple[str, ...]]:
    """One for a method of one phase, otherwise one for each below the method's."""
    found: list[tuple[str, ...]] = []
    for one in block.methods:
        if one.planned:
            found += _method(one, block.device_steps is not None)
    return found


def verdicts(block: DevicePlan) -> list[str]:
    """What cannot be seen from the rows: what does not fit, what would, what was not planned."""
    lines = []
    for one in block.methods:
        if said := _verdict(one, block.memory_bytes):
            lines.append(f"{one.method}: {said}")
    return lines


def _method(one: MethodPlan, fleet: bool) -> list[tuple[str, ...]]:
    name = ("≤ " if one.bound else "") + one.method
    knob = one.knob
    if one.settings and knob is not None and knob.value is not None:
        name += f" ({knob.name} {knob.value:g})"
    if len(one.phases) == 1:
        phase = one.phases[0]
        about = f": {phase.about}" if phase.about else ""
        return [_cells(name + about, phase, fleet)]
    nothing = ("",) * (len(HEADS) - 1 + fleet)
    return [
        (name, *nothing),
        *(_cells(f"  {_phase_name(phase, one)}", phase, fleet) for phase in one.phases),
    ]


def _phase_name(phase: Phase, one: MethodPlan) -> str:
    several = len({each.name for each in one.phases}) > 1
    name = f"{phase.name} {phase.about}".strip() if several or not phase.about else phase.about
    return name + ("" if phase.recurring and not phase.one_client else " *")


def _cells(name: str, phase: Phase, fleet: bool) -> tuple[str, ...]:
    cells = (
        name,
        human(phase.memory.peak_bytes, "bytes") + ("" if phase.fits else " !"),
        human(phase.downlink_bytes, "bytes"),
        human(phase.uplink_bytes, "bytes"),
        human(phase.seconds, "seconds"),
        phase.binds,
    )
    return (*cells, percent(phase.share, 0)) if fleet else cells


def _verdict(one: MethodPlan, limit: int) -> str:
    said = []
    if not one.planned:
        return f"not planned: {one.why}"
    if not one.fits:
        knob = one.knob
        least = f", whatever its {knob.name}" if knob and knob.largest is None else ""
        said.append(f"does not fit{least}: {one.why}{_pieces(one)}")
    elif one.knob and one.knob.value is not None and one.knob.largest not in (1.0, None):
        largest = f"{one.knob.name}={one.knob.largest:g}"
        said.append(f"fits up to {largest}, however uneven the layers are kept")
    for phase in one.phases:
        if phase.one_client and not phase.fits:
            needed = human(phase.memory.peak_bytes, "bytes")
            said.append(f"its phase {phase.name} needs one client with {needed}")
            said.extend(_without_initial(one, phase, limit))
    if one.choices:
        shares = ", ".join(f"{name} {percent(share, 0)}" for name, share in one.choices.items())
        said.append(f"devices get {shares}")
    if not one.complete:
        said.append("the walk through its phases took too long and ended early")
    return "; ".join(said)


def _pieces(one: MethodPlan) -> str:
    """A setting that makes the sums of squared gradients smaller, where they are too much."""
    summed = [p for p in one.phases if p.memory.importance_bytes and not (p.fits or p.one_client)]
    if not summed or not _has(one, "importance_budget_bytes") or _in_pieces(one):
        return ""
    most = max(phase.memory.importance_bytes for phase in summed)
    return (
        f" (its sums of squared gradients alone take up to {human(most, 'bytes')}: "
        "importance_budget_bytes sums them in pieces)"
    )


def _without_initial(one: MethodPlan, phase: Phase, limit: int) -> list[str]:
    """What to set instead of initial pruning, where the whole model fits without the sums."""
    if not _has(one, "initial_pruning"):
        return []
    if phase.memory.peak_bytes - phase.memory.importance_bytes > limit:
        return ["without it (initial_pruning=false) all clients begin with the whole model"]
    pieces = "" if _in_pieces(one) else " with an importance_budget_bytes"
    return [f"initial_pruning=false{pieces} would do without that client"]


def _has(one: MethodPlan, setting: str) -> bool:
    return setting in hyperparameters(find_method(one.method))


def _in_pieces(one: MethodPlan) -> bool:
    return any("importance/" in phase.about for phase in one.phases)
