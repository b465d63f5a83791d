"""float32 arrays whose values all have 16 bits: the upper half of a float32, range kept.

Statistics such as Σ g² span more decades than float16 has; to eight bits of precision they are
known well enough.  A sender rounds, the wire then finds that two bytes a value lose nothing.
"""

from __future__ import annotations

import numpy as np

_LOW_BITS = np.uint32(0xFFFF)


def round_bfloat16(values: np.ndarray) -> np.ndarray:
    """Float32 `values` (any shape) rounded to the nearest bfloat16, to even in a tie; float32.

    Of finite values beyond bfloat16's largest comes infinity; not a number stays so.

    >>> round_bfloat16(np.array([1.0, 1.00390625, 1.01171875], np.float32)).tolist()
    [1.0, 1.0, 1.015625]
    """
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + (odd + np.uint32(0x7FFF))) & ~_LOW_BITS
    return np.where(np.isnan(values), np.float32(np.nan), rounded.view(np.float32))


def fits_bfloat16(array: np.ndarray) -> bool:
    """Whether every value of a float32 array is a bfloat16, and there is one."""
    if array.dtype != np.float32 or not array.size:
        return False
    bits = np.ascontiguousarray(array).view(np.uint32)
    return not int(np.bitwise_or.reduce(bits, axis=None)) & int(_LOW_BITS)


def to_halves(array: np.ndarray) -> np.ndarray:
    """The upper halves, uint16 in the array's shape, of one that `fits_bfloat16`."""
    return (np.ascontiguousarray(array).view(np.uint32) >> np.uint32(16)).astype("<u2")


def from_halves(halves: np.ndarray) -> np.ndarray:
    """float32 again, exactly."""
    return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)
