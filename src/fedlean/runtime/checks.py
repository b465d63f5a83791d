"""Which updates the server takes.  A refused one is logged with its reason; the round goes on.

An update comes from a stranger: whatever it holds, `refusal` returns, and what it lets pass can be
priced, stored, sent and merged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, prod

import numpy as np

from fedlean import wire
from fedlean.core import ClientTask, ClientUpdate, Statistic, StatisticForm, SubModel, Work
from fedlean.engine.pieces import parts_taken
from fedlean.narrowed import narrowed
from fedlean.printable import printable
from fedlean.spans import span
from fedlean.tree import is_packed, num_kept

MAX_EXAMPLES = 10**9  # more from one client is a mistake or an attempt to own the mean
# Of a value of the model: its square is a float32, and so are means and variances of such values.
MAX_VALUE = 1e18
MAX_STATISTIC = 1e30  # of any other value: the sum over all clients of a run is a float32
MAX_REASON = 400  # characters
MAX_METRICS, MAX_METRIC_NAME = 64, 64
MAX_WORKS = 256
MAX_A_WEIGHT = 64  # values of an optimiser
MAX_WORK_EXAMPLES = 10**12  # of one stretch, where a method does not say what a task takes


@dataclass(frozen=True)
class Expected:
    """What is known of the answer to a task beforehand."""

    forms: Mapping[str, StatisticForm] = field(default_factory=dict)
    work: Sequence[Work] | None = None  # at most; None: the method does not say
    num_examples: int | None = None  # that the client said it has when it joined
    own_masks: bool = False  # whether it may have chosen masks, or be choosing still


def refusal(update: ClientUpdate, task: ClientTask, expected: Expected) -> str | None:
    """Why this answer to `task` cannot be merged; None where it can."""
    checks: tuple[Callable[[], str | None], ...] = (
        lambda: _other_examples(update.num_examples, expected.num_examples),
        lambda: _other_metrics(update.metrics),
        lambda: _other_structure(update.sub_model, task, expected),
        lambda: beyond_order(update.work, task, expected.work),
        lambda: _other_tensors(update, task, expected),
        lambda: _other_statistics(update.statistics, expected.forms),
    )
    reason = next((reason for check in checks if (reason := check()) is not None), None)
    return None if reason is None else printable(reason)[:MAX_REASON]


def remedy(reason: str) -> str:
    """What to do about a refusal that `refusal` gave the `reason` for, or an error of a client."""
    if diverged(reason):
        return "training diverges: try a lower --lr"
    if reason.startswith(("moved the ", "sent the statistic ")):
        return "try a lower --lr, or another --max-update-norm"
    return "the clients answer other tasks than they get: do they run this version of FedLean?"


def diverged(reason: str) -> bool:
    """Whether it speaks of numbers that are none."""
    return any(
        word in reason for word in ("finite", "NaN", "infinity", "values beyond", "grew from")
    )


def _other_examples(claimed: int, known: int | None) -> str | None:
    if not 1 <= claimed <= MAX_EXAMPLES:
        return f"claims {claimed} examples, expected 1 to {MAX_EXAMPLES}"
    if known is not None and claimed > known:
        return f"claims {claimed} examples, it had {known} when it joined"
    return None


def _other_metrics(metrics: Mapping[str, float]) -> str | None:
    if len(metrics) > MAX_METRICS:
        return f"sent {len(metrics)} metrics, expected at most {MAX_METRICS}"
    for name, value in metrics.items():
        if len(name) > MAX_METRIC_NAME or not name.isprintable():
            return f"sent a metric with the name {name[:MAX_METRIC_NAME]!r}: too long or not text"
        if not isfinite(value) or abs(value) > MAX_STATISTIC:
            return f"sent the metric {name} = {value}, which is not finite or beyond reason"
    return None


def _other_structure(held: SubModel, task: ClientTask, expected: Expected) -> str | None:
    """No client changes what it was given; one that may choose masks does so of all weights."""
    given = task.sub_model
    if held.frozen != given.frozen:
        return "holds other frozen tensors than it was given"
    if held.masks is given.masks:
        return None
    if reason := _no_mask(held.masks, task):
        return reason
    if given.masks:
        sent, kept = wire.pattern_hash(held.masks), wire.pattern_hash(given.masks)
        if sent != kept:
            count = num_kept(held.masks)
            return f"trained the pattern {sent[:8]}, expected {kept[:8]} ({count} kept)"
    elif held.masks and not expected.own_masks:
        return f"holds masks of {len(held.masks)} tensors, and was given none"
    elif held.masks and held.masks.keys() != set(task.spec.prunable):
        return f"holds masks of {len(held.masks)} of {len(task.spec.prunable)} prunable tensors"
    return None


def _no_mask(masks: Mapping[str, np.ndarray], task: ClientTask) -> str | None:
    for name, mask in masks.items():
        if name not in task.spec.prunable or mask.shape != task.spec.tensor_shapes[name]:
            return f"holds a mask of {name!r} with shape {mask.shape}, which the model lacks"
        if mask.dtype != np.bool_:
            return f"holds a mask of {name!r} of {mask.dtype}, expected bool"
    return None


def beyond_order(
    work: Sequence[Work], task: ClientTask, ordered: Sequence[Work] | None
) -> str | None:
    """Which claim exceeds the order, if any: what is claimed is charged, and adds to the totals."""
    if len(work) > MAX_WORKS:
        return f"claims {len(work)} stretches of work, expected at most {MAX_WORKS}"
    for one in work:
        if min(vars(one)[name] for name in _COUNTS) < 0:
            return "claims less work than none"
        if one.importance_steps > one.steps:
            return f"claims g² of {one.importance_steps} steps, of {one.steps} that it did"
        for name, kept in one.kept.items():
            if name not in task.spec.tensor_shapes:
                return f"claims work on {name!r}, which the model lacks"
            if not 0 <= kept <= prod(task.spec.tensor_shapes[name]):
                return f"claims work on {kept} weights of {name!r}, which has fewer"
        for other in (_other_taps, _other_span, _other_width):
            if reason := other(one, task, ordered):
                return reason
    if reason := _other_pieces(work, task, ordered):
        return reason
    if ordered is None:
        for what, claimed in _amounts(work).items():
            most = MAX_A_WEIGHT if what == "optimiser values a weight" else MAX_WORK_EXAMPLES
            if claimed > most:
                return f"claims work on {claimed} {what}, expected at most {most}"
        return None
    return _more_than(work, ordered) or _on_more_weights(work, ordered)


def _other_taps(work: Work, task: ClientTask, ordered: Sequence[Work] | None) -> str | None:
    """Where a claim is of layers whose activations no loss was ordered to read."""
    known = task.spec.by_name.keys()
    if ordered is not None:
        known = {tap for one in ordered for tap in one.taps}
    for tap in work.taps:
        if tap not in known:
            return f"claims a loss at {tap!r}, which the task does not order"
    return None


def _other_span(work: Work, task: ClientTask, ordered: Sequence[Work] | None) -> str | None:
    """Where a claim is of a part that was not ordered, or that the task's model does not have."""
    if ordered is not None:
        if (work.begin, work.end) not in {(one.begin, one.end) for one in ordered}:
            return f"claims work {_where(work.begin, work.end)}, which the task does not order"
        return None
    if not (work.begin or work.end):
        return None
    try:
        span(task.spec, work.begin, work.end)
    except ValueError as error:
        return f"claims work on a span of the model that it lacks: {error}"
    return None


def _other_width(work: Work, task: ClientTask, ordered: Sequence[Work] | None) -> str | None:
    """Where a claim is of a slice that was not ordered, or that the task's model does not have."""
    if ordered is not None and work.width not in {one.width for one in ordered}:
        return f"claims work on {work.width:g} of the channels, which the task does not order"
    if work.width == 1:
        return None
    if work.kept:
        return f"claims masks on {work.width:g} of the channels"
    try:
        narrowed(task.spec, work.width)
    except ValueError as error:
        return f"claims work on a slice that the model lacks: {error}"
    return None


def _more_than(work: Sequence[Work], ordered: Sequence[Work]) -> str | None:
    """Each span and each slice is held against the order for it."""
    for part in dict.fromkeys((one.begin, one.end, one.width) for one in work):
        claimed, orders = (
            _amounts([one for one in works if (one.begin, one.end, one.width) == part])
            for works in (work, ordered)
        )
        begin, end, width = part
        where = f" {_where(begin, end)}" if begin or end else ""
        where += f" on {width:g} of the channels" if width != 1 else ""
        for what, most in orders.items():
            if claimed[what] > most:
                return (
                    f"claims work of {claimed[what]} {what}{where}, the task takes at most {most}"
                )
    return None


def _where(begin: str, end: str) -> str:
    return f"from {begin or 'the input'} to {end or 'the output'} of the model"


def _other_pieces(
    work: Sequence[Work], task: ClientTask, ordered: Sequence[Work] | None
) -> str | None:
    """Where g² was summed of what was not asked for, or of what there is not."""
    asked = {_summed(one) for one in ordered or () if one.importance_steps}
    for one in work:
        if not one.importance_steps:
            continue
        if ordered is not None and asked and _summed(one) not in asked:
            return "claims g² of other pieces than it was asked for"
        part = task.spec if one.width == 1 else narrowed(task.spec, one.width)
        part = span(part, one.begin, one.end) if one.begin or one.end else part
        try:
            parts_taken(part, 1, *_summed(one), task.sub_model.frozen)
        except ValueError as error:
            return f"claims g² of no pieces: {error}"
    return None


def _summed(work: Work) -> tuple[int, int]:
    return work.piece_bytes, work.first_piece if work.piece_bytes else 0


def _on_more_weights(work: Sequence[Work], ordered: Sequence[Work]) -> str | None:
    """Where all of the order is about masked tensors, so is every claim."""
    if not all(one.kept for one in ordered):
        return None
    for name in {name for one in ordered for name in one.kept}:
        most = max(one.kept.get(name, 0) for one in ordered)
        for one in work:
            if (one.steps or one.forward_examples) and one.kept.get(name, most + 1) > most:
                return f"claims work on all weights of {name!r}, or on more than the {most} kept"
    return None


_COUNTS = (
    "steps",
    "batch_size",
    "importance_steps",
    "forward_examples",
    "optimizer_floats",
    "beside",
    "held_examples",
    "piece_bytes",
    "first_piece",
    "held_floats",
)


def _amounts(work: Sequence[Work]) -> dict[str, int]:
    """Everything in which work is priced."""
    trained = sum(one.steps * one.batch_size for one in work)
    return {
        "steps": sum(one.steps for one in work),
        "importance steps": sum(one.importance_steps for one in work),
        "examples": trained + sum(one.forward_examples for one in work),
        "examples a step": max((one.batch_size for one in work if one.steps), default=0),
        "examples at once": max((one.batch_size for one in work), default=0),
        "optimiser values a weight": max((one.optimizer_floats for one in work), default=0),
        "stretches beside it": max((one.beside for one in work), default=0),
        "activations held": max((one.held_examples for one in work), default=0),
        "floats held": max((one.held_floats for one in work), default=0),
    }


def _other_tensors(update: ClientUpdate, task: ClientTask, expected: Expected) -> str | None:
    """All that are not frozen; none at all where statistics are the answer, or masks not yet."""
    held, masks = update.sub_model, update.sub_model.masks
    missing = sorted(task.spec.tensor_shapes.keys() - update.params.keys() - held.frozen)
    if missing and (update.params or not (expected.forms or expected.own_masks)):
        return f"lacks {', '.join(missing[:3])}"
    for name, values in update.params.items():
        if name not in task.spec.tensor_shapes:
            return f"sent {name!r}, which the model lacks"
        packed = name in masks and is_packed(values, masks[name])
        shape = task.spec.tensor_shapes[name]
        if values.shape != shape and not packed:
            return f"sent {name!r} with shape {values.shape}, expected {shape}"
        if values.dtype != np.float32:
            return f"sent {name!r} with values of {values.dtype}, expected float32"
        if reason := _no_numbers(values, MAX_VALUE):
            return f"sent {name!r} with {reason}"
        if name in masks and not packed and bool(((values != 0) > masks[name]).any()):
            return f"sent {name!r} with values outside its mask"
        if name in task.spec.variances and values.size and values.min() < 0:
            return f"sent {name!r} with values below 0, expected variances"
    return None


def _no_numbers(values: np.ndarray, most: float) -> str | None:
    """What is wrong with them.  NaN passes no comparison."""
    if values.dtype.kind != "f":
        return f"values of {values.dtype}, expected floating point"
    if not values.size or (-most <= float(values.min()) and float(values.max()) <= most):
        return None
    if not np.isfinite(values).all():
        return "values that are not finite"
    return f"values beyond ±{most:g}"


def _other_statistics(
    sent: Mapping[str, Statistic], forms: Mapping[str, StatisticForm]
) -> str | None:
    if sent.keys() != forms.keys():
        names, asked = (", ".join(sorted(keys))[:200] or "none" for keys in (sent, forms))
        return f"sent the statistics {names}, expected {asked}"
    for key, form in forms.items():
        if reason := _not_of(form, sent[key]):
            return f"sent {key} {reason}"
    return None


def _not_of(form: StatisticForm, statistic: Statistic) -> str | None:
    """How `statistic` differs from the form that was asked for."""
    if statistic.reduction != form.reduction:
        return f"as a {statistic.reduction}, expected a {form.reduction}"
    if statistic.tensors.keys() != form.shapes.keys():
        return f"of {len(statistic.tensors)} tensors, expected {', '.join(sorted(form.shapes)[:3])}"
    for name, values in statistic.tensors.items():
        shape, mask = form.shapes[name], statistic.masks.get(name)
        if mask is not None and (mask.shape != shape or mask.dtype != np.bool_):
            return f"of {name!r} with a mask of {mask.dtype} {mask.shape}, expected bool {shape}"
        if values.shape != shape and (mask is None or not is_packed(values, mask)):
            return f"of {name!r} with shape {values.shape}, expected {shape}"
        if reason := _no_numbers(values, min(form.limit, MAX_STATISTIC)):
            return f"of {name!r} with {reason}"
        if form.non_negative and values.size and values.min() < 0:
            return f"of {name!r} below 0, expected sums of squares"
    return None
