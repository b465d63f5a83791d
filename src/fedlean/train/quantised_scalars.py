"""The few numbers that a client sends, rounded to what is to travel.

They stay float32 in memory; the wire finds that fewer bytes hold them (`fedlean.wire`).
"""

from __future__ import annotations

import numpy as np

from fedlean.train.zeroth_order import Form
from fedlean.wire import round_int8

_LARGEST_HALF = 65504.0


def rounded(values: np.ndarray, form: Form) -> np.ndarray:
    """Finite `values` (any shape) as float32 that `form` holds: 4, 2 or 1 byte each.

    fp16 clips to ±65504.  int8 takes one scale for all, so that no value moves by more than 1/254
    of the largest (and 1% of that).

    >>> rounded(np.array([127.0, 3.4]), "int8").tolist()
    [127.0, 3.0]
    """
    values = np.asarray(values, np.float32)
    if form == "int8":
        return round_int8(values)
    if form == "fp16":
        clipped = np.clip(values, -_LARGEST_HALF, _LARGEST_HALF)
        return clipped.astype(np.float16).astype(np.float32)
    return values
