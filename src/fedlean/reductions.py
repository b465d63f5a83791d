"""Reductions beside the weighted mean of parameters: pooled variances, and statistics of slices."""

from __future__ import annotations

import numpy as np

from fedlean.slices import Place, Weights
from fedlean.sums import mean_onto


class Pooled:
    """The variance of all examples, from each client's mean and variance.

    Σ w (v + (m - M)²) / Σ w, updated as M moves: E[x²] - E[x]² loses a variance beside a large
    mean.  (Chan, Golub and LeVeque, Updating formulae ..., 1979, eq. 2.1.)
    """

    def __init__(self, shape: tuple[int, ...]):
        self.weight, self.mean, self.total = np.zeros(shape), np.zeros(shape), np.zeros(shape)

    def add(
        self,
        variance: np.ndarray,
        mean: np.ndarray,
        weight: float,
        place: Place | None,
    ) -> None:
        where = place.where if place is not None else np.index_exp[...]
        before = self.weight[where]
        after, off = before + weight, mean.astype(np.float64) - self.mean[where]
        self.total[where] += np.multiply(variance, weight, dtype=np.float64)
        self.total[where] += off**2 * (before * weight / after)
        self.mean[where] += off * (weight / after)
        self.weight[where] = after

    def onto(self, base: np.ndarray) -> np.ndarray:
        """In the base's type where somebody trained, `base` bit for bit elsewhere."""
        covered = self.weight > 0
        merged = np.divide(self.total, self.weight, out=np.zeros_like(self.total), where=covered)
        return np.where(covered, merged.astype(base.dtype), base)


class Gathered:
    """One tensor of a statistic, summed in the shape of the whole one wherever its parts lie."""

    def __init__(self, shape: tuple[int, ...]):
        self.total = np.full(shape, -0.0)  # the neutral element of addition
        self.weight = 0.0  # of those who sent the whole tensor
        self.slices: Weights | None = None  # of those who sent parts of it

    def add(self, values: np.ndarray, scale: float, weight: float, place: Place | None) -> None:
        """`scale` is the factor of the values, `weight` what they count in a mean."""
        if place is None:
            self.total += np.multiply(values, scale, dtype=np.float64)
            self.weight += weight
            return
        place.add(self.total, values, scale)
        self.slices = self.slices or Weights()
        self.slices.add(place, weight)

    def mean(self, weight: float) -> np.ndarray:
        """float32.  Of slices by coordinate over those who sent it, 0 where nobody did.

        weight: of all who sent the statistic, which a tensor that came whole is divided by
        """
        if self.slices is None:
            return (self.total / weight).astype(np.float32)
        return mean_onto(np.zeros(self.total.shape, np.float32), self.total, self._weights())

    def sum(self) -> np.ndarray:
        """float32; +0 where nobody sent a coordinate."""
        total = self.total if self.slices is None else self.total + 0.0
        return total.astype(np.float32)

    def sent(self) -> np.ndarray:
        """bool, True where somebody sent a coordinate."""
        if self.slices is None:
            return np.ones(self.total.shape, bool)
        held = self._weights() > 0
        return np.repeat(held, self.total.size // held.size).reshape(self.total.shape)

    def _weights(self) -> np.ndarray:
        """Of each of the chunks into which the tensor falls, (n,)."""
        assert self.slices is not None
        return self.slices.summed().reshape(-1) + self.weight
