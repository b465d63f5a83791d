"""Folds over named arrays: the one merge rule, and how statistics are reduced.

Streaming: an update is added and may be dropped at once; memory is two accumulators of the size of
the model however many clients answer.  Sums run in float64 in the order of arrival, so the runtime
feeds updates in cohort order (`fedlean.runtime.order`) and the result does not depend on who
answered first.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from operator import call, is_

import numpy as np

from fedlean.core import ClientUpdate, Masks, Params
from fedlean.reductions import Gathered, Pooled
from fedlean.slices import Index, Place, Weights, place
from fedlean.sums import PIECE, add_scaled, mean_onto

NO_PATTERN = "0" * 32  # the hash of no masks
_PIECE = PIECE
# Of read-only masks while they live: a round counts and hashes the same few thousands of times.
_counted: dict[int, tuple[weakref.ref[np.ndarray], int]] = {}  # by id
_References = tuple[weakref.ref[np.ndarray], ...]
_hashed: dict[tuple[str | int, ...], tuple[_References, str]] = {}  # by names and ids of a set


def apply_mask(params: Params, masks: Masks) -> dict[str, np.ndarray]:
    """params · mask: pruned coordinates are exactly +0, the others unchanged bit for bit."""
    return {
        name: _masked(value, masks[name]) if name in masks else value
        for name, value in params.items()
    }


def _masked(value: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Of float32 the bits as integers times 0 or 1: no branch, which `np.where` has per value."""
    if value.dtype == np.float32 and mask.dtype == np.bool_:
        return np.multiply(value.view(np.uint32), mask).view(np.float32)
    return np.where(mask, value, np.float32(0))


def pack(params: Params, masks: Masks) -> dict[str, np.ndarray]:
    """Masked tensors as their kept values alone (K,), in row-major order; the others as they are.

    >>> pack({"fc.weight": np.array([1.0, 0.0, 3.0])}, {"fc.weight": np.array([True, False, True])})
    {'fc.weight': array([1., 3.])}
    """
    return {
        name: kept_values(value, masks[name])
        if name in masks and not is_packed(value, masks[name])
        else value
        for name, value in params.items()
    }


def kept_values(value: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """value[mask]: (K,), in row-major order.  Faster than NumPy where masks are irregular."""
    flat, out, done = value.reshape(-1), np.empty(kept_count(mask), value.dtype), 0
    for at in _kept_at(mask):
        out[done : done + at.size] = flat[at]
        done += at.size
    return out


def _put_kept(dense: np.ndarray, mask: np.ndarray, values: np.ndarray) -> None:
    """dense[mask] = values (K,), for a `dense` that is whole in memory."""
    flat, done = dense.reshape(-1), 0
    for at in _kept_at(mask):
        flat[at] = values[done : done + at.size]
        done += at.size


def _kept_at(mask: np.ndarray) -> Iterator[np.ndarray]:
    """Flat indices of the kept coordinates: all of them at once would outweigh the values."""
    flat = mask.reshape(-1)
    for start in range(0, flat.size, _PIECE):
        yield np.flatnonzero(flat[start : start + _PIECE]) + start


def is_packed(values: np.ndarray, mask: np.ndarray) -> bool:
    """Whether `values` are the kept ones alone.  Of a full vector both forms are the same."""
    return values.shape != mask.shape and values.shape == (kept_count(mask),)


def unpack(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The dense tensor of kept values (K,), 0 where pruned; `values` itself if it is dense."""
    if not is_packed(values, mask):
        return values
    dense = np.zeros(mask.shape, values.dtype)
    _put_kept(dense, mask, values)
    return dense


def kept_count(mask: np.ndarray) -> int:
    """Kept coordinates of one mask."""
    key = id(mask)
    known = _counted.get(key)
    if known is not None and known[0]() is mask:
        return known[1]
    count = int(np.count_nonzero(mask))
    if fixed(mask):
        _counted[key] = (weakref.ref(mask, lambda _: _counted.pop(key, None)), count)
    return count


def read_only(masks: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The masks, or arrays of another kind, which nobody can change any more: hashed once, then.

    For who makes them, and before anybody else has them: it is these arrays, and the arrays that
    they are views of, that become read-only; what looks at memory of something else is copied.

    >>> read_only({"fc.weight": np.array([True, False])})["fc.weight"].flags.writeable
    False
    """
    made = {}
    for name, mask in masks.items():
        if mask.base is not None and not _owned_by_an_array(mask):
            mask = mask.copy()
        for array in (mask.base, mask):
            if array is not None:
                array.flags.writeable = False
        made[name] = mask
    return made


def fixed(array: np.ndarray) -> bool:
    """Whether its values stay: who makes an array read-only gives up writing by earlier views."""
    # a comparison of one number gives a numpy.bool, no array
    if not isinstance(array, np.ndarray) or array.flags.writeable:
        return False
    return array.base is None or (_owned_by_an_array(array) and not array.base.flags.writeable)


def _owned_by_an_array(view: np.ndarray) -> bool:
    return isinstance(view.base, np.ndarray) and view.base.base is None


def kept_counts(masks: Masks) -> dict[str, int]:
    """Kept coordinates by masked tensor, as `Work.kept` wants them.

    >>> kept_counts({"fc.weight": np.array([True, False, True])})
    {'fc.weight': 2}
    """
    return {name: kept_count(mask) for name, mask in masks.items()}


def num_kept(masks: Masks) -> int:
    """Kept coordinates over all masked tensors."""
    return sum(kept_counts(masks).values())


def pattern_hash(masks: Masks) -> str:
    """32 hex digits over names, shapes and packed bits, whatever the order of the names.

    Raises ValueError naming the mask that is not bool.

    >>> pattern_hash({})
    '00000000000000000000000000000000'
    >>> a, b = np.array([True, False]), np.array([True])
    >>> pattern_hash({"a": a, "b": b}) == pattern_hash({"b": b, "a": a})
    True
    """
    if not masks:
        return NO_PATTERN
    these = (*masks, *map(id, masks.values()))
    known = _hashed.get(these)
    if known is not None and all(map(is_, map(call, known[0]), masks.values())):
        return known[1]
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(masks):
        if masks[name].dtype != np.bool_:
            raise ValueError(f"mask {name!r} must be bool, got {masks[name].dtype}")
        # The shape is in: slices of one tensor can agree in name and bits and differ in shape.
        digest.update(repr((name, tuple(masks[name].shape))).encode("utf-8", "surrogatepass"))
        digest.update(np.packbits(masks[name]).data)
    found = digest.hexdigest()
    if all(map(fixed, masks.values())):
        forget = partial(_forget, these)  # with the first of them that goes
        _hashed[these] = (tuple(weakref.ref(mask, forget) for mask in masks.values()), found)
    return found


def _forget(masks: tuple[str | int, ...], _: weakref.ref[np.ndarray]) -> None:
    _hashed.pop(masks, None)


class _Coverage:
    """Weighted sum of one tensor and, per coordinate, the weight of those who trained it.

    While all clients share one mask object (PruneFL, dense FedAvg) the weight is one number, and
    where they send kept values alone, the sum is of those.  That of slices follows from their axes.
    """

    def __init__(self, values: np.ndarray, shape: tuple[int, ...], mask: np.ndarray | None):
        self.shape = shape
        self.mask = mask
        self.packed = mask is not None and is_packed(values, mask)
        # -0, the neutral element of addition: a lone client's -0 comes back as it was sent
        self.total = np.full(values.shape if self.packed else shape, -0.0)
        self.weight = 0.0  # of those who sent all that `mask` keeps
        self.slices: Weights | None = None  # of those who sent slices without a mask
        self.apart: np.ndarray | None = None  # of those whose masks differ, per coordinate

    def add(
        self, values: np.ndarray, weight: float, mask: np.ndarray | None, place: Place | None
    ) -> None:
        if place is None and mask is self.mask and values.shape == self.total.shape:
            add_scaled(self.total, values, weight)
            self.weight += weight
        elif place is not None and mask is None and self.mask is None:
            place.add(self.total, values, weight)
            self.slices = self.slices or Weights()
            self.slices.add(place, weight)
        else:
            self._add_masked(values, weight, mask, place)

    def _add_masked(
        self, values: np.ndarray, weight: float, mask: np.ndarray | None, place: Place | None
    ) -> None:
        apart = self._set_apart()
        where = place.where if place is not None else np.index_exp[...]
        if mask is not None:
            values = unpack(values, mask)
        covered = np.ones(values.shape, bool) if mask is None else mask
        self.total[where] += np.where(covered, np.multiply(values, weight, dtype=np.float64), 0.0)
        apart[where] += np.where(covered, weight, 0.0)

    def _set_apart(self) -> np.ndarray:
        """The weights per coordinate, into which that of a shared mask goes."""
        if self.apart is None:
            self.apart = np.zeros(self.shape)
        if self.mask is not None:
            total = unpack(self.total, self.mask) if self.packed else self.total
            self.total = np.where(self.mask, total, 0.0)
            self.apart = np.where(self.mask, self.weight, 0.0)
            self.mask, self.packed, self.weight = None, False, 0.0
        return self.apart

    def onto(self, base: np.ndarray) -> np.ndarray:
        """The mean in the base's type where somebody trained, `base` bit for bit elsewhere."""
        if self.slices is not None or self.apart is not None:
            return self._onto_by_coordinate(base)
        if self.weight == 0.0:
            return base
        mean = np.empty(self.total.shape, base.dtype)
        np.divide(self.total, self.weight, out=mean, casting="unsafe")
        if self.mask is None:
            return mean
        merged = base.copy()
        _put_kept(merged, self.mask, mean if self.packed else kept_values(mean, self.mask))
        return merged

    def _onto_by_coordinate(self, base: np.ndarray) -> np.ndarray:
        if not base.size:
            return base
        weights = self.slices.summed() if self.slices is not None else np.zeros((1, 1))
        if self.apart is not None:
            chunks = len(weights)
            weights = (weights + self.apart.reshape(chunks, -1)).reshape(-1, 1)
        return mean_onto(base, self.total, weights.reshape(-1) + self.weight)


class Fold:
    """One round's reduction: `add` every update, then read the results.

    Rule: each coordinate becomes the mean over the clients that trained it, weighted by their
    example counts (p_n in the papers).  A coordinate that nobody trained keeps `base` bit for bit.
    `variances` maps a running variance to its mean: those are pooled, with what lies between the
    clients' means.
    """

    def __init__(self, base: Params, *, variances: Mapping[str, str] | None = None):
        self._base = base
        self._variances = dict(variances or {})
        self._tensors: dict[str, _Coverage] = {}
        self._pooled: dict[str, Pooled] = {}
        self._statistics: dict[str, dict[str, Gathered]] = {}
        self._statistic_weight: dict[str, float] = {}
        self.count = 0

    def add(self, update: ClientUpdate, index: Mapping[str, Index] | None = None) -> None:
        """`index` says of which part of a tensor an update is: per axis a slice or the kept ids.

        A tensor that it does not name is whole.  Of a statistic, what has the name of a tensor that
        it names is of the same part of it; the rest is reduced in the shape in which it comes.
        Raises ValueError when a tensor is not in the model or has another shape, or the index does
        not fit it.
        """
        weight = float(update.num_examples)
        sub = update.sub_model
        for name, values in update.params.items():
            if name in sub.frozen:
                continue
            if name not in self._base:
                raise ValueError(f"client {update.client} sent {name!r}, which the model lacks")
            where = self._place(name, index or {})
            expected = self._base[name].shape if where is None else where.shape
            mask = sub.masks.get(name)
            if values.shape != expected and not (mask is not None and is_packed(values, mask)):
                raise ValueError(
                    f"client {update.client} sent {name!r} with shape {values.shape}, "
                    f"expected {expected}"
                )
            mean = update.params.get(self._variances.get(name, ""))
            if mean is not None and self._variances[name] not in sub.frozen:
                pooled = self._pooled.setdefault(name, Pooled(self._base[name].shape))
                pooled.add(values, mean, weight, where)
                continue
            if name not in self._tensors:
                whole = mask if where is None else None
                self._tensors[name] = _Coverage(values, self._base[name].shape, whole)
            self._tensors[name].add(values, weight, mask, where)
        self._add_statistics(update, weight, index or {})
        self.count += 1

    def _place(self, name: str, index: Mapping[str, Index]) -> Place | None:
        """None: the whole tensor, in its own order."""
        if name not in index:
            return None
        try:
            found = place(index[name], self._base[name].shape)
        except ValueError as error:
            raise ValueError(f"the slice of {name!r}: {error}") from None
        return None if found.is_whole else found

    def _add_statistics(
        self, update: ClientUpdate, weight: float, index: Mapping[str, Index]
    ) -> None:
        for key, statistic in update.statistics.items():
            scale = weight if statistic.reduction == "mean" else 1.0
            sums = self._statistics.setdefault(key, {})
            for name, sent in statistic.tensors.items():
                mask = statistic.masks.get(name)
                values = sent if mask is None else unpack(sent, mask)
                where = self._place(name, index)
                if name not in sums:
                    whole = self._base[name].shape if name in index else values.shape
                    sums[name] = Gathered(whole)
                expected = sums[name].total.shape if where is None else where.shape
                if values.shape != expected:
                    raise ValueError(
                        f"client {update.client} sent {key} of {name!r} with shape "
                        f"{values.shape}, expected {expected}"
                    )
                sums[name].add(values, scale, weight, where)
            if statistic.reduction == "mean":
                self._statistic_weight[key] = self._statistic_weight.get(key, 0.0) + weight

    def params(self) -> dict[str, np.ndarray]:
        merged = dict(self._base)
        for name, coverage in self._tensors.items():
            merged[name] = coverage.onto(self._base[name])
        for name, pooled in self._pooled.items():
            merged[name] = pooled.onto(self._base[name])
        return merged

    def statistic(self, key: str) -> dict[str, np.ndarray]:
        """The reduced tensors (float32), {} when no client sent any.

        Of slices each coordinate is reduced over those who sent it; it is 0 where nobody did.
        """
        weight = self._statistic_weight.get(key)
        sums = self._statistics.get(key, {})
        return {name: one.mean(weight) if weight else one.sum() for name, one in sums.items()}

    def sent(self, key: str) -> dict[str, np.ndarray]:
        """bool in the shape of each tensor of a statistic: which coordinates somebody sent."""
        return {name: one.sent() for name, one in self._statistics.get(key, {}).items()}


def fold(
    base: Params, updates: Iterable[ClientUpdate], *, variances: Mapping[str, str] | None = None
) -> Fold:
    """A `Fold` over all of `updates`, none of which is of a slice."""
    result = Fold(base, variances=variances)
    for update in updates:
        result.add(update)
    return result
