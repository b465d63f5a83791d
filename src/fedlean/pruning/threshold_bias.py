"""FIARSE's threshold-controlled biased gradient, as a factor on what SGD moves a weight by.

Wu et al. (FIARSE), NeurIPS 2024, arXiv 2407.19389, eq. (3): with M the mask of |w| >= θ,

    g ⊙ M ⊙ (1 + 2·|w|·θ / (|w| + θ)²)

(The text of the paper was not at hand: formula and mask are those of the authors' code, the number
of the equation is as public re-implementations cite it.)
A weight at the threshold moves 1.5 times as far as its gradient says, a large one hardly more than
that, and one below the threshold not at all.  The factor comes from the derivative that stands in
for that of the mask, 2θ / (|w| + θ)².
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedlean.core import Params
from fedlean.patterns.largest import blocks


def thresholds(kept: Params, *, of_all: bool) -> dict[str, float]:
    """θ by tensor: the smallest |w| of it, or `of_all` tensors together.

    kept: the kept values (K,) of each tensor; where there are none, θ is 0

    >>> kept = {"a": np.array([-2.0, 3.0]), "b": np.array([1.0]), "c": np.array([])}
    >>> thresholds(kept, of_all=False), thresholds(kept, of_all=True)
    ({'a': 2.0, 'b': 1.0, 'c': 0.0}, {'a': 1.0, 'b': 1.0, 'c': 1.0})
    """
    own = {
        name: float(np.abs(values).min()) if values.size else None for name, values in kept.items()
    }
    least = min((each for each in own.values() if each is not None), default=0.0)
    return {name: least if of_all else each or 0.0 for name, each in own.items()}


def bias(start: Params, end: Params, threshold: Mapping[str, float]) -> None:
    """`end` becomes start + M ⊙ factor ⊙ (end - start), in place; θ = 0 leaves it as it is.

    start, end: float32 of the same shape (K,) by tensor, end writeable; the factor is that at
    `start`

    >>> end = {"w": np.array([3.0, -5.0, 9.0], np.float32)}
    >>> bias({"w": np.array([2.0, -6.0, 0.5], np.float32)}, end, {"w": 2.0})
    >>> end["w"].tolist()  # 2 + 1.5 · 1, -6 + (1 + 24/64) · 1, and below the threshold
    [3.5, -4.625, 0.5]
    """
    for name, least in threshold.items():
        if not least:
            continue
        for at in blocks(len(start[name])):
            _bias(start[name][at], end[name][at], np.float32(least))


def without_fallen(values: np.ndarray, least: float, out: np.ndarray) -> None:
    """values ⊙ M into `out`: float32 (K,), +0 where |values| is below the threshold `least`."""
    for at in blocks(len(values)):
        np.multiply(values[at], np.abs(values[at]) >= np.float32(least), out=out[at])
        out[at] += np.float32(0)  # -0 becomes +0


def _bias(start: np.ndarray, end: np.ndarray, least: np.float32) -> None:
    sizes = np.abs(start)
    share = sizes / (sizes + least)  # in [1/2, 1] where the mask is True
    factor = 1 + 2 * share * (1 - share)
    factor[sizes < least] = 0
    end -= start
    end *= factor
    end += start
