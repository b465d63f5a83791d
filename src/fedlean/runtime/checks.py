"""Which updates the server takes.  A refused one is logged with its reason; the round goes on."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedlean import wire
from fedlean.core import ClientTask, ClientUpdate, Statistic, StatisticForm, SubModel
from fedlean.tree import is_packed, num_kept, unpack

MAX_EXAMPLES = 10**9  # more from one client is a mistake or an attempt to own the mean


def refusal(
    update: ClientUpdate,
    task: ClientTask,
    forms: Mapping[str, StatisticForm],
    max_norm: float | None = None,
) -> str | None:
    """Why this answer to `task`, which asks for statistics of these `forms`, cannot be merged.

    max_norm: largest Euclidean norm of (values sent - values asked with), over all tensors; where
    the task carried no values (a client that goes on from its own) there is nothing to hold against
    it.
    """
    if not 1 <= update.num_examples <= MAX_EXAMPLES:
        return f"claims {update.num_examples} examples, expected 1 to {MAX_EXAMPLES}"
    shapes = task.spec.tensor_shapes
    masks = update.sub_model.masks
    if task.sub_model.masks and masks is not task.sub_model.masks:
        sent, held = wire.pattern_hash(masks), wire.pattern_hash(task.sub_model.masks)
        if sent != held:
            return f"trained the pattern {sent[:8]}, expected {held[:8]} ({num_kept(masks)} kept)"
    if reason := _other_structure(update.sub_model, task):
        return reason
    for name, mask in masks.items():
        if name not in task.spec.prunable or (
            name not in update.sub_model.index and mask.shape != shapes[name]
        ):
            return f"holds a mask of {name!r} with shape {mask.shape}, which the model lacks"
    missing = sorted(shapes.keys() - update.params.keys() - update.sub_model.frozen)
    if update.params and missing and not update.sub_model.index:
        return f"lacks {', '.join(missing[:3])}"
    for name, values in update.params.items():
        if name not in shapes:
            return f"sent {name!r}, which the model lacks"
        packed = name in masks and is_packed(values, masks[name])
        if name not in update.sub_model.index and values.shape != shapes[name] and not packed:
            return f"sent {name!r} with shape {values.shape}, expected {shapes[name]}"
        if not np.isfinite(values).all():
            return f"sent {name!r} with values that are not finite"
        if name in masks and not packed and bool(((values != 0) > masks[name]).any()):
            return f"sent {name!r} with values outside its mask"
    if max_norm is not None and (norm := _moved(update, task)) > max_norm:
        return f"moved the model by {norm:.3g}, the bound is {max_norm:g}"
    if update.statistics.keys() != forms.keys():
        sent, asked = (", ".join(sorted(keys)) or "none" for keys in (update.statistics, forms))
        return f"sent the statistics {sent}, expected {asked}"
    for key, form in forms.items():
        if reason := _not_of(form, update.statistics[key]):
            return f"sent {key} {reason}"
    return None


def remedy(reason: str) -> str:
    """What to do about a refusal that `refusal` gave the `reason` for, or an error of a client."""
    if diverged(reason):
        return "training diverges: try a lower --lr"
    if reason.startswith("moved the model"):
        return "try a lower --lr, or a higher --max-update-norm"
    return "the clients answer other tasks than they get: do they run this version of FedLean?"


def diverged(reason: str) -> bool:
    """Whether it speaks of numbers that are none."""
    return any(word in reason for word in ("finite", "NaN", "infinity"))


def _other_structure(held: SubModel, task: ClientTask) -> str | None:
    """No client changes what it was given but for masks, and those of all weights or of none."""
    given = task.sub_model
    if held.frozen != given.frozen or held.output_module != given.output_module:
        return "holds other frozen tensors or another output module than it was given"
    if held.index.keys() != given.index.keys() or any(
        len(held.index[name]) != len(given.index[name])
        or not all(map(np.array_equal, held.index[name], given.index[name]))
        for name in given.index
    ):
        return "holds another slice than it was given"
    if held.masks and not given.masks and held.masks.keys() != set(task.spec.prunable):
        return f"holds masks of {len(held.masks)} of {len(task.spec.prunable)} prunable tensors"
    return None


def _moved(update: ClientUpdate, task: ClientTask) -> float:
    """Norm of the difference, of tensors that both the task and the update carry alike."""
    squares = 0.0
    masks = task.sub_model.masks
    for name, sent in update.params.items():
        if name not in task.params:
            continue
        asked = task.params[name]
        if sent.shape != asked.shape:  # one is packed
            sent, asked = unpack(sent, masks[name]), unpack(asked, masks[name])
        squares += float(np.sum(np.square(sent - asked, dtype=np.float64)))
    return squares**0.5


def _not_of(form: StatisticForm, statistic: Statistic) -> str | None:
    """How `statistic` differs from the form that was asked for."""
    if statistic.reduction != form.reduction:
        return f"as a {statistic.reduction}, expected a {form.reduction}"
    if statistic.tensors.keys() != form.shapes.keys():
        return f"of {len(statistic.tensors)} tensors, expected {', '.join(sorted(form.shapes)[:3])}"
    for name, values in statistic.tensors.items():
        if values.shape != form.shapes[name]:
            return f"of {name!r} with shape {values.shape}, expected {form.shapes[name]}"
        if values.dtype.kind != "f" or not np.isfinite(values).all():
            return f"of {name!r} with values that are not finite numbers"
        if form.non_negative and bool((values < 0).any()):
            return f"of {name!r} below 0, expected sums of squares"
        if bool((np.abs(values) > form.limit).any()):
            return f"of {name!r} with values beyond ±{form.limit:g}"
    return None
