"""From one mask to the next: weights that go, stay and come back.

Jiang et al. (PruneFL), arXiv 1909.12326, state w' of eq. (2): weights that come back start at a
small perturbation of zero.  Its size is unknown; OURS is a normal of `scale` times the root mean
square of the tensor's kept weights.  Invariant: params == params · mask, and no stale value ever
returns (the authors' code restores them).
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite

import numpy as np

from fedlean.core import Masks, Params


def apply_masks(
    params: Params,
    old_masks: Masks,
    new_masks: Masks,
    *,
    scale: float,
    rng_for: Callable[[str], np.random.Generator],
) -> Params:
    """`params` under `new_masks`; tensors without a mask, old or new, pass through as they are.

    Removed weights become exactly 0, weights in both masks stay bit for bit, weights that come back
    are drawn from N(0, (scale · RMS of the weights in both masks)²), in flat order, from
    `rng_for(tensor name)`: 0 when scale is 0 or the tensor has no weight in both.
    A tensor with one mask only counts as dense in the other.
    Raises ValueError naming the tensor for an unknown name or a mask that does not fit.

    >>> w = {"fc.weight": np.array([3.0, -1.0, 0.0], np.float32)}
    >>> old = {"fc.weight": np.array([True, True, False])}
    >>> new = {"fc.weight": np.array([True, False, True])}
    >>> rng_for = lambda name: np.random.Generator(np.random.Philox(0))
    >>> apply_masks(w, old, new, scale=0.0, rng_for=rng_for)["fc.weight"]
    array([3., 0., 0.], dtype=float32)
    """
    if not (isfinite(scale) and scale >= 0):
        raise ValueError(f"scale must be finite and >= 0, got {scale}")
    unknown = sorted((old_masks.keys() | new_masks.keys()) - params.keys())
    if unknown:
        raise ValueError(f"masks of tensors that params lack: {unknown}, got {sorted(params)}")
    result = dict(params)
    for name, weights in params.items():
        if name not in old_masks and name not in new_masks:
            continue
        dense = np.ones(weights.shape, dtype=bool)
        old, new = old_masks.get(name, dense), new_masks.get(name, dense)
        for mask in (old, new):
            if mask.shape != weights.shape or mask.dtype != np.bool_:
                raise ValueError(
                    f"mask of {name!r} must be bool {weights.shape}, got {mask.dtype} {mask.shape}"
                )
        stays = old & new
        moved = _kept(weights, stays)
        back = np.flatnonzero(new & ~old)
        if back.size and scale:
            kept = moved.ravel()[np.flatnonzero(stays)]
            rms = float(np.mean(np.square(kept, dtype=np.float64))) ** 0.5 if kept.size else 0.0
            if rms:  # 0 · a negative draw would be -0.0
                moved.flat[back] = scale * rms * rng_for(name).standard_normal(back.size)
        result[name] = moved
    return result


def _kept(weights: np.ndarray, stays: np.ndarray) -> np.ndarray:
    """`weights` where they stay, bit for bit, and +0 elsewhere; several times faster than where().

    The bits are multiplied as whole numbers: weights * stays would turn negative ones into -0.
    """
    whole = np.dtype(f"u{weights.dtype.itemsize}")
    bits = np.ascontiguousarray(weights).view(whole)
    return np.multiply(bits, stays, dtype=whole).view(weights.dtype)
