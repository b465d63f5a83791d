"""A part of a model as a model of its own, with the map back to the whole one.

What a client holds is `Cut.spec`, an ordinary `ModelSpec`.  `Cut.index` never travels: the server
takes a client's tensors by it and merges the answers through it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedlean.core import Masks, Params
from fedlean.layers import Shape
from fedlean.spec import ModelSpec
from fedlean.tree import read_only

Axis = slice | np.ndarray  # kept ids: slice(start, stop) where they are contiguous, else int64 (K,)
Index = Mapping[str, tuple[Axis, ...]]  # tensor name -> kept ids along each of its axes


@dataclass(frozen=True, eq=False)
class Cut:
    """`spec` is `full` with some channels or layers gone; tensors keep their names.

    `index` has every tensor of `spec`, with one entry per axis: which ids of the full tensor are
    there, in which order.  Raises ValueError naming the tensor where these do not fit together.
    """

    spec: ModelSpec
    index: Index
    full: ModelSpec

    def __post_init__(self) -> None:
        for name in self.spec.tensor_shapes.keys() ^ self.index.keys():
            where = (
                "spec, not in index" if name in self.spec.tensor_shapes else "index, not in spec"
            )
            raise ValueError(f"tensor {name!r} of a cut is in its {where}")
        for name, shape in self.spec.tensor_shapes.items():
            if name not in self.full.tensor_shapes:
                raise ValueError(f"tensor {name!r} of a cut is not in the full model")
            full = self.full.tensor_shapes[name]
            if not _fits(self.index[name], shape, full):
                raise ValueError(
                    f"the index of tensor {name!r} must pick {shape} of {full}, got "
                    f"{self.index[name]!s:.200}"
                )

    def take(self, params: Params) -> dict[str, np.ndarray]:
        """The tensors of `spec` out of those of the full model; others are ignored.

        What is whole is the array that was given, the rest is C-contiguous.  Raises ValueError
        naming the tensor that is missing or has not its shape in the full model.
        """
        if missing := [name for name in self.index if name not in params]:
            raise ValueError(
                f"tensor {missing[0]!r} is missing: params must hold every tensor of the cut, "
                f"{len(self.index)} in all"
            )
        return {name: self._taken("tensor", name, params[name]) for name in self.index}

    def put(self, params: Params, values: Params) -> dict[str, np.ndarray]:
        """The full model's tensors with `values` in the places of the cut: the inverse of `take`.

        values: tensors of `spec`, some or all.  What is changed is copied, the rest is the array
        that was given.  Raises ValueError naming the tensor that has not its shape.
        """
        full = dict(params)
        for name, value in values.items():
            if value.shape != self.spec.tensor_shapes[name]:
                raise ValueError(
                    f"tensor {name!r} must have the cut's shape {self.spec.tensor_shapes[name]}, "
                    f"got {value.shape}"
                )
            full[name] = full[name].copy()
            full[name][np.ix_(*map(ids_of, self.index[name]))] = value
        return full

    def take_masks(self, masks: Masks) -> dict[str, np.ndarray]:
        """The masks of `spec` out of the full model's; a tensor without one stays without.

        What is whole is the array that was given, the rest is read-only.  Raises ValueError naming
        the mask that has not its tensor's shape in the full model.
        """
        taken = {
            name: self._taken("mask of", name, masks[name]) for name in self.index & masks.keys()
        }
        # copies: a slice can be a view of the full model's mask
        cut = {name: mask.copy() for name, mask in taken.items() if mask is not masks[name]}
        return {**taken, **read_only(cut)}

    def compose(self, inner: Cut) -> Cut:
        """`inner`, a cut of `spec`, as a cut of the full model.

        Raises ValueError where `inner` was made of another model.
        """
        if inner.full != self.spec:
            raise ValueError(
                f"the inner cut must be one of the model {self.spec.hash}, which this cut gives; "
                f"it is one of {inner.full.hash}"
            )
        index = {
            name: tuple(map(_composed, self.index[name], axes))
            for name, axes in inner.index.items()
        }
        return Cut(inner.spec, index, self.full)

    def _taken(self, what: str, name: str, value: np.ndarray) -> np.ndarray:
        full = self.full.tensor_shapes[name]
        if value.shape != full:
            raise ValueError(
                f"{what} {name!r} must have the full model's shape {full}, got {value.shape}"
            )
        if self.spec.tensor_shapes[name] == full and all(map(_is_slice, self.index[name])):
            return value  # the same object: hashes and counts of masks are remembered by it
        for axis, ids in enumerate(self.index[name]):
            if isinstance(ids, slice):
                value = value[(slice(None),) * axis + (ids,)]
            else:
                value = value.take(ids, axis=axis)
        return np.ascontiguousarray(value)


def whole(spec: ModelSpec) -> Cut:
    """All of the model.

    >>> from fedlean.models.mlp import mlp_13_7
    >>> whole(mlp_13_7((1, 8, 8), 10)).index["fc1.weight"]
    (slice(0, 13, None), slice(0, 64, None))
    """
    return Cut(spec, whole_index(spec), spec)


def whole_index(spec: ModelSpec) -> dict[str, tuple[Axis, ...]]:
    """Every id of every tensor of `spec`."""
    return {n: tuple(slice(0, side) for side in shape) for n, shape in spec.tensor_shapes.items()}


def axis_of(ids: np.ndarray) -> Axis:
    """Ids (K,) as a slice where they are contiguous and ascending.

    >>> axis_of(np.array([2, 3, 4])), axis_of(np.array([0, 3]))
    (slice(2, 5, None), array([0, 3]))
    """
    if np.array_equal(ids, np.arange(ids[0], ids[0] + ids.size)):
        return slice(int(ids[0]), int(ids[-1]) + 1)
    return ids.astype(np.int64)


def ids_of(axis: Axis) -> np.ndarray:
    """The ids (K,) of an axis."""
    return np.arange(axis.start, axis.stop) if isinstance(axis, slice) else axis


def num_ids(axis: Axis) -> int:
    return axis.stop - axis.start if isinstance(axis, slice) else axis.size


def _is_slice(axis: Axis) -> bool:
    return isinstance(axis, slice)


def _composed(outer: Axis, inner: Axis) -> Axis:
    if isinstance(outer, slice):
        if isinstance(inner, slice):
            return slice(outer.start + inner.start, outer.start + inner.stop)
        return inner + outer.start
    return axis_of(outer[inner])


def _fits(axes: tuple[Axis, ...], shape: Shape, full: Shape) -> bool:
    return len(axes) == len(shape) == len(full) and all(
        num_ids(axis) == side and _within(axis, of)
        for axis, side, of in zip(axes, shape, full, strict=True)
    )


def _within(axis: Axis, count: int) -> bool:
    """Whether the ids are different ones of `count`."""
    if isinstance(axis, slice):
        return axis.step is None and 0 <= axis.start < axis.stop <= count
    return bool((axis >= 0).all() and (axis < count).all() and np.unique(axis).size == axis.size)
