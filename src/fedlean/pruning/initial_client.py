"""Which client prunes alone at first: one that can hold the dense model.

OURS: PruneFL (arXiv 1909.12326) says that it is selected, "e.g. a trusted one with much data".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedlean.algorithm import Device
from fedlean.core import Scalar
from fedlean.cost.way import work_memory_bytes
from fedlean.pruning.initial_pruning import most_work
from fedlean.spec import ModelSpec


def first_that_fits(spec: ModelSpec, h: Mapping[str, Scalar], devices: Sequence[Device]) -> int:
    """The lowest id of a device that has the memory for initial pruning, as far as that is known.

    h: hyper-parameters of its task.  Where none has it, the one that has most: a task for it is not
    sent, and the step says what it lacks.
    """
    needed = work_memory_bytes(spec, most_work(h))
    fitting = [d.id for d in devices if d.memory_bytes is None or d.memory_bytes >= needed]
    if fitting:
        return min(fitting)
    return max(devices, key=lambda device: (device.memory_bytes or 0, -device.id)).id
