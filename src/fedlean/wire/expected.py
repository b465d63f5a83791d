"""How large an answer will be, before there is one: for what a device may send in a round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np

from fedlean.core import ClientTask, ClientUpdate, StatisticForm, Work
from fedlean.wire.sending import update_bytes

METRICS_BYTES = 256  # room for what an answer says of its losses
FORM_BYTES = 64  # and for what it says of a statistic's tensor beside its name
VALUE_BYTES = 4


def answer_bytes(
    task: ClientTask,
    forms: Mapping[str, StatisticForm],
    works: Sequence[Work] = (),
    *,
    params: bool = True,
) -> int:
    """What an answer to `task` takes at most, its values in float32.

    forms: of the statistics that are asked for; params: whether it holds the trained tensors.  A
    pattern that a client chooses itself, as at PruneFL's start, is not in it.
    """
    shapes = task.spec.tensor_shapes if params else {}
    values = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    plain = ClientUpdate(task.client, 1, values, task.sub_model, work=tuple(works))
    statistics = sum(
        VALUE_BYTES * prod(shape) + len(name.encode()) + FORM_BYTES
        for form in forms.values()
        for name, shape in form.shapes.items()
    )
    return update_bytes(plain, task) + statistics + METRICS_BYTES
