"""One density for every layer: the smallest weights go, or random ones come back.

The pruning of two baselines of Jiang et al. (PruneFL), arXiv 1909.12326.  OURS: which of equal
magnitudes stays (the first in flat order), that no layer loses its last weight, and that weights
come back at random, since a pruned weight has no magnitude to rank it by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import floor

import numpy as np

from fedlean.core import Masks, Params
from fedlean.patterns.largest import largest
from fedlean.tree import read_only


def kept_count(size: int, density: float) -> int:
    """Weights that a tensor of `size` keeps: density · size rounded, at least 1 of a tensor.

    Raises ValueError unless density is in (0, 1].

    >>> kept_count(10, 0.25), kept_count(10, 0.001), kept_count(0, 0.5)
    (3, 1, 0)
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    return min(size, max(1, floor(density * size + 0.5)))


def keep_largest(params: Params, masks: Masks, density: float, names: Iterable[str]) -> Masks:
    """Masks of `names` with the `kept_count` largest |w| of those in use; never one more.

    params: tensors by name, any shape; only `names` are looked at
    masks: True = in use, in the tensor's shape; a tensor without one is in use as a whole
    density: in (0, 1]; a tensor that keeps fewer already stays as it is

    Raises ValueError naming the tensor for an unknown name, a mask that does not fit or a NaN.

    >>> w = {"fc.weight": np.array([3.0, -1.0, 2.0, 0.0], np.float32)}
    >>> keep_largest(w, {}, 0.5, ["fc.weight"])["fc.weight"]
    array([ True, False,  True, False])
    """
    result = {}
    for name in names:
        if name not in params:
            raise ValueError(f"params lack tensor {name!r}, got {sorted(params)}")
        weights = params[name]
        mask = masks.get(name, np.ones(weights.shape, dtype=bool))
        if mask.shape != weights.shape or mask.dtype != np.bool_:
            raise ValueError(
                f"mask of {name!r} must be bool {weights.shape}, got {mask.dtype} {mask.shape}"
            )
        used = np.flatnonzero(mask)
        sizes = np.abs(weights.ravel()[used])
        if used.size and np.isnan(sizes.max()):
            raise ValueError(f"params[{name!r}] holds NaN: the training diverged")
        kept = np.zeros(weights.shape, dtype=bool)
        kept.flat[used[largest(sizes, kept_count(weights.size, density))]] = True
        result[name] = kept
    return read_only(result)


def without_smallest(values: np.ndarray, size: int, density: float) -> np.ndarray:
    """The same choice on a device: `values` with all but the `kept_count` largest |w| set to 0.

    values: of a tensor of `size` coordinates, all of them or the kept ones alone, any shape

    >>> without_smallest(np.array([3.0, -1.0, 2.0]), size=4, density=0.5)
    array([3., 0., 2.])
    """
    kept = largest(np.abs(values).ravel(), kept_count(size, density))
    return np.where(kept.reshape(values.shape), values, values.dtype.type(0))


def add_random(
    masks: Masks, density: float, *, rng_for: Callable[[str], np.random.Generator]
) -> Masks:
    """Masks that keep `kept_count`, the missing ones drawn uniformly from the pruned.

    A tensor that keeps as many or more already stays as it is.  `rng_for(tensor name)` draws.
    Raises ValueError unless density is in (0, 1].

    >>> masks = {"fc.weight": np.array([True, False])}
    >>> rng_for = lambda name: np.random.Generator(np.random.Philox(0))
    >>> add_random(masks, 1.0, rng_for=rng_for)["fc.weight"]
    array([ True,  True])
    """
    result = {}
    for name, mask in masks.items():
        pruned = np.flatnonzero(~mask)
        missing = kept_count(mask.size, density) - (mask.size - pruned.size)
        result[name] = mask.copy()
        if missing > 0:
            result[name].flat[rng_for(name).choice(pruned, missing, replace=False)] = True
    return read_only(result)
