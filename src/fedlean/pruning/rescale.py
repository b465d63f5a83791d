"""The size of what is left of a pruned layer's weights."""

from __future__ import annotations

from math import sqrt

import numpy as np

from fedlean.core import Masks, Params


def rescale_kept(params: Params, masks: Masks) -> dict[str, np.ndarray]:
    """params · mask, each masked tensor times 1/√d_l, d_l the kept share of its coordinates.

    A unit that keeps d_l of its n inputs then has the variance again that it was initialised with.
    params: dense tensors; those without a mask come back as they are, and pruned coordinates are
    exactly +0.  Raises ValueError naming the mask that does not fit.

    >>> w = {"fc.weight": np.array([3.0, 1.0, 5.0, 7.0], np.float32)}
    >>> rescale_kept(w, {"fc.weight": np.array([True, False, False, False])})["fc.weight"]
    array([6., 0., 0., 0.], dtype=float32)
    """
    scaled = dict(params)
    for name, mask in masks.items():
        if name not in params or params[name].shape != mask.shape or mask.dtype != np.bool_:
            held = params[name].shape if name in params else "no such tensor"
            raise ValueError(
                f"mask of {name!r} is {mask.dtype} {mask.shape}, expected bool in the shape of its "
                f"dense tensor: {held}"
            )
        kept = np.count_nonzero(mask)
        factor = np.float32(sqrt(mask.size / kept) if kept else 0.0)
        scaled[name] = np.where(mask, params[name] * factor, np.float32(0))
    return scaled
