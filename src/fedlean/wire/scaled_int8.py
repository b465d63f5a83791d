"""float32 arrays that are whole numbers from -127 to 127 times one scale: a byte a value.

A sender rounds, the wire then finds that nothing is lost.  The scale has 16 significant bits, so
that its product with a number of 7 bits is exact in float32 and the scale can be read off the
largest value again.
"""

from __future__ import annotations

import numpy as np

STEPS = 127
SCALE_BYTES = 4
_DROPPED = np.uint32(8)  # bits of a float32's 24 that a scale does without
_SMALLEST = 2.0**-100  # below it a scale would lose bits to underflow; rounded to 0


def round_int8(values: np.ndarray) -> np.ndarray:
    """Finite float32 `values` (any shape), each moved by at most max|values| / 254·(1 + 2⁻⁷).

    >>> round_int8(np.array([127.0, -3.25, 0.4], np.float32)).tolist()
    [127.0, -3.0, 0.0]
    """
    values = np.asarray(values, np.float32)
    scale = _rounded_scale(np.abs(values).max(initial=np.float32(0)))
    if not scale:
        return np.zeros(values.shape, np.float32)
    steps = np.clip(np.rint(values / scale), -STEPS, STEPS)
    return (steps * scale + np.float32(0)).astype(np.float32)  # no -0


def fits_int8(array: np.ndarray) -> bool:
    """Whether `to_int8` loses no bit of a float32 array that is not all zero."""
    if array.dtype != np.float32 or not array.size:
        return False
    largest = np.abs(array).max()
    if not largest > 0 or not np.isfinite(largest) or _rounded_scale(largest) * STEPS != largest:
        return False
    scale, steps = to_int8(array)
    same = from_int8(scale, steps).view(np.uint32)
    return np.array_equal(same, np.ascontiguousarray(array).view(np.uint32))


def to_int8(array: np.ndarray) -> tuple[np.float32, np.ndarray]:
    """The scale and the steps, int8 in the array's shape, of one that `fits_int8`."""
    scale = _rounded_scale(np.abs(array).max())
    return scale, np.rint(array / scale).astype(np.int8)


def from_int8(scale: np.float32, steps: np.ndarray) -> np.ndarray:
    """float32 again, exactly."""
    return steps.astype(np.float32) * scale


def _rounded_scale(largest: np.float32) -> np.float32:
    """largest / 127 to 16 significant bits; 0 where the values are too small."""
    scale = np.float32(largest / np.float32(STEPS))
    if not scale > _SMALLEST:
        return np.float32(0)
    bits = scale.view(np.uint32) + (np.uint32(1) << (_DROPPED - np.uint32(1)))
    return (bits >> _DROPPED << _DROPPED).view(np.float32)
