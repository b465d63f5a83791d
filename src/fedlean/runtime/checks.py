"""Which updates the server takes.  A refused one is logged with its reason; the round goes on."""

from __future__ import annotations

import numpy as np

from fedlean import wire
from fedlean.core import ClientTask, ClientUpdate, Statistic
from fedlean.tree import is_packed, num_kept

MAX_EXAMPLES = 10**9  # more from one client is a mistake or an attempt to own the mean


def refusal(update: ClientUpdate, task: ClientTask) -> str | None:
    """Why this answer to `task` cannot be merged, or None."""
    if not 1 <= update.num_examples <= MAX_EXAMPLES:
        return f"claims {update.num_examples} examples, expected 1 to {MAX_EXAMPLES}"
    shapes = task.spec.tensor_shapes
    masks = update.sub_model.masks
    if task.sub_model.masks and masks is not task.sub_model.masks:
        sent, held = wire.pattern_hash(masks), wire.pattern_hash(task.sub_model.masks)
        if sent != held:
            return f"trained the pattern {sent[:8]}, expected {held[:8]} ({num_kept(masks)} kept)"
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
    for key, statistic in update.statistics.items():
        if key == "importance" and (reason := _bad_importance(statistic, task)):
            return reason
        for name, values in statistic.tensors.items():
            sliced = name in update.sub_model.index
            if name in shapes and not sliced and values.shape != shapes[name]:
                return f"sent {key} of {name!r} with shape {values.shape}, expected {shapes[name]}"
            if not np.isfinite(values).all():
                return f"sent {key} of {name!r} with values that are not finite"
    return None


def _bad_importance(statistic: Statistic, task: ClientTask) -> str | None:
    """Σ g² is a mean over clients, of every trainable tensor, and never negative."""
    if statistic.reduction != "mean" or statistic.tensors.keys() != task.spec.param_shapes.keys():
        return (
            f"sent importance as a {statistic.reduction} of {len(statistic.tensors)} tensors, "
            f"expected a mean of all {len(task.spec.param_shapes)}"
        )
    if any(bool((values < 0).any()) for values in statistic.tensors.values()):
        return "sent importance below 0, expected sums of squares"
    return None
