"""Folds over named arrays: the one merge rule, and how statistics are reduced.

Streaming: an update is added and may be dropped at once; memory is two accumulators of the size of
the model however many clients answer.  Sums run in float64 in the order of arrival, so the runtime
feeds updates in cohort order (`fedlean.runtime.order`) and the result does not depend on who
answered first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from fedlean.core import ClientUpdate, Masks, Params


def apply_mask(params: Params, masks: Masks) -> dict[str, np.ndarray]:
    """params · mask: pruned coordinates are exactly +0, the others unchanged bit for bit."""
    return {
        name: np.where(masks[name], value, np.float32(0)) if name in masks else value
        for name, value in params.items()
    }


def num_kept(masks: Masks) -> int:
    """Kept coordinates over all masked tensors."""
    return sum(int(np.count_nonzero(mask)) for mask in masks.values())


class _Coverage:
    """Weighted sum of one tensor and, per coordinate, the weight of those who trained it.

    While all clients share one mask object (PruneFL, dense FedAvg) the weight is one number.
    """

    def __init__(self, shape: tuple[int, ...]):
        self.total = np.zeros(shape, np.float64)
        self.weight: float | np.ndarray = 0.0
        self.mask: np.ndarray | None = None

    def add(
        self,
        values: np.ndarray,
        weight: float,
        mask: np.ndarray | None,
        index: tuple[np.ndarray, ...] | None,
    ) -> None:
        uniform = index is None and not isinstance(self.weight, np.ndarray)
        if uniform and (self.weight == 0.0 or mask is self.mask):
            self.mask = mask
            self.total += np.multiply(values, weight, dtype=np.float64)
            self.weight += weight
            return
        self._promote()
        assert isinstance(self.weight, np.ndarray)
        where = np.ix_(*index) if index is not None else np.index_exp[...]
        covered = np.ones(values.shape, bool) if mask is None else mask
        self.total[where] += np.where(covered, np.multiply(values, weight, dtype=np.float64), 0.0)
        self.weight[where] += np.where(covered, weight, 0.0)

    def _promote(self) -> None:
        """From one weight to a weight per coordinate."""
        if isinstance(self.weight, np.ndarray):
            return
        covered = np.ones(self.total.shape, bool) if self.mask is None else self.mask
        self.total = np.where(covered, self.total, 0.0)
        self.weight = np.where(covered, self.weight, 0.0)

    def mean(self, base: np.ndarray) -> np.ndarray:
        """The covered mean; `base` where nobody trained."""
        if isinstance(self.weight, np.ndarray):
            weight, covered = self.weight, self.weight > 0
            mean = np.divide(self.total, weight, out=np.zeros_like(self.total), where=covered)
        elif self.weight == 0.0:
            return base
        else:
            mean, covered = self.total / self.weight, self.mask
        mean = mean.astype(base.dtype)
        return mean if covered is None else np.where(covered, mean, base)


class Fold:
    """One round's reduction: `add` every update, then read the results.

    Rule (design D5): each coordinate becomes the mean over the clients that trained it, weighted by
    their example counts (p_n in the papers); a coordinate nobody trained keeps `base` bit for bit.
    `variances` maps a running variance to its mean: those are merged by first and second moment.
    """

    def __init__(self, base: Params, *, variances: Mapping[str, str] | None = None):
        self._base = base
        self._variances = dict(variances or {})
        self._tensors: dict[str, _Coverage] = {}
        self._statistics: dict[str, dict[str, np.ndarray]] = {}
        self._statistic_weight: dict[str, float] = {}
        self.count = 0

    def add(self, update: ClientUpdate) -> None:
        """Raises ValueError when a tensor is not in the model or has another shape."""
        weight = float(update.num_examples)
        sub = update.sub_model
        for name, values in update.params.items():
            if name in sub.frozen:
                continue
            if name not in self._base:
                raise ValueError(f"client {update.client} sent {name!r}, which the model lacks")
            index = sub.index.get(name)
            expected = self._base[name].shape if index is None else tuple(map(len, index))
            if values.shape != expected:
                raise ValueError(
                    f"client {update.client} sent {name!r} with shape {values.shape}, "
                    f"expected {expected}"
                )
            if name in self._variances:
                values = values + update.params[self._variances[name]] ** 2
            coverage = self._tensors.setdefault(name, _Coverage(self._base[name].shape))
            coverage.add(values, weight, sub.masks.get(name), index)
        self._add_statistics(update, weight)
        self.count += 1

    def _add_statistics(self, update: ClientUpdate, weight: float) -> None:
        for key, statistic in update.statistics.items():
            scale = weight if statistic.reduction == "mean" else 1.0
            sums = self._statistics.setdefault(key, {})
            for name, values in statistic.tensors.items():
                term = np.multiply(values, scale, dtype=np.float64)
                if name in sums:
                    sums[name] += term
                else:
                    sums[name] = term
            mean_weight = weight if statistic.reduction == "mean" else 0.0
            self._statistic_weight[key] = self._statistic_weight.get(key, 0.0) + mean_weight

    def params(self) -> dict[str, np.ndarray]:
        merged = {
            name: self._tensors[name].mean(value) if name in self._tensors else value
            for name, value in self._base.items()
        }
        for variance, mean in self._variances.items():
            if variance in self._tensors:
                spread = merged[variance] - merged[mean] ** 2
                merged[variance] = np.maximum(spread, np.float32(0))
        return merged

    def statistic(self, key: str) -> dict[str, np.ndarray]:
        """The reduced tensors (float32), {} when no client sent any."""
        divisor = self._statistic_weight.get(key, 0.0) or 1.0
        sums = self._statistics.get(key, {})
        return {name: (total / divisor).astype(np.float32) for name, total in sums.items()}


def fold(
    base: Params, updates: Iterable[ClientUpdate], *, variances: Mapping[str, str] | None = None
) -> Fold:
    """A `Fold` over all of `updates`."""
    result = Fold(base, variances=variances)
    for update in updates:
        result.add(update)
    return result
