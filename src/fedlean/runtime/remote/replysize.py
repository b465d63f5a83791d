"""How many bytes an honest answer to a task may have, before any of it is here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

from fedlean.core import ClientTask, StatisticForm
from fedlean.wire.fields import MAX_JSON_BYTES

Statistics = Callable[[ClientTask], Mapping[str, StatisticForm]]  # what a task asks for

_TENSOR_BYTES = 5  # per value of the model: an fp32, and a byte for masks and names
_STATISTIC_BYTES = 9  # per value: the widest float, and a byte for the pattern of those sent
_ENVELOPE_BYTES = 1 << 15  # around an update, or the reason why there is none
_FIELDS_BYTES = MAX_JSON_BYTES + 1024  # metrics, work and the table of statistics, and a header
_UNKNOWN_BYTES = 32  # per value of the model, where nobody says which statistics are asked for


def reply_bytes(task: ClientTask, statistics: Statistics | None) -> int:
    """An upper bound: every tensor of the whole model, its masks, and what `statistics` names."""
    values = sum(map(prod, task.spec.tensor_shapes.values()))
    room = _ENVELOPE_BYTES + _FIELDS_BYTES
    if statistics is None:
        return room + _UNKNOWN_BYTES * values
    asked = sum(prod(shape) for form in statistics(task).values() for shape in form.shapes.values())
    return room + _TENSOR_BYTES * values + _STATISTIC_BYTES * asked
