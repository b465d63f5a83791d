"""Uneven splits of kept weights over layers, for masks whose split is not known beforehand.

A layer is stored densely, pruned weights and a byte of mask for each too, from a density of its own
(`engine.native_storage`); below that a kept weight has an index.  A mask of so many weights takes
the most memory where its layers lie just below that density or just at it, and none is whole.
Where memory asks for the smaller of the two forms, it is where both take about as much.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import ceil, prod

from fedlean.core import Work
from fedlean.engine.native_storage import (
    FLOAT_BYTES,
    OFFSET_BYTES,
    SPARSE_CONV_BELOW,
    SPARSE_LINEAR_BELOW,
    START_BYTES,
)
from fedlean.layers import Linear
from fedlean.spec import ModelSpec


def uneven(work: Work, spec: ModelSpec) -> Iterator[Work]:
    """`work` with as many kept weights, split over its masked tensors in 16 other ways.

    Tensors are filled one after another, from the first, the last, the largest or the smallest on:
    up to just below where they are stored densely, just up to there, to all but one, or to where
    both forms take as much; then all of them, with what is left, to all but one, and wholly.
    """
    sizes = {name: prod(spec.tensor_shapes[name]) for name in work.kept}
    total = sum(work.kept.values())
    dense_from = {name: _dense_from(spec, name, size) for name, size in sizes.items()}
    below = {name: max(0, least - 1) for name, least in dense_from.items()}
    but_one = {name: size - 1 for name, size in sizes.items()}
    either = {
        name: _either(work.optimizer_floats, spec, name, size) for name, size in sizes.items()
    }
    orders = (
        list(sizes),
        list(reversed(sizes)),
        sorted(sizes, key=lambda name: -sizes[name]),
        sorted(sizes, key=lambda name: sizes[name]),
    )
    for order in orders:
        for level in (below, dense_from, but_one, either):
            left, kept = total, dict.fromkeys(sizes, 0)
            for upto in (level, but_one, sizes):
                if not left:
                    break
                for name in order:
                    more = min(left, max(0, upto[name] - kept[name]))
                    kept[name] += more
                    left -= more
            yield replace(work, kept=kept)


def _dense_from(spec: ModelSpec, name: str, size: int) -> int:
    layer = spec.by_name[name.rsplit(".", 1)[0]].layer
    share = SPARSE_LINEAR_BELOW if isinstance(layer, Linear) else SPARSE_CONV_BELOW
    return ceil(share * size)


def _either(optimizer_floats: int, spec: ModelSpec, name: str, size: int) -> int:
    """A mask against offsets, and for a convolution's second order another and a place."""
    layer = spec.by_name[name.rsplit(".", 1)[0]].layer
    values = FLOAT_BYTES * (1 + optimizer_floats)
    index = OFFSET_BYTES if isinstance(layer, Linear) else 2 * OFFSET_BYTES + START_BYTES
    return ceil((values + 1) / (values + index) * size)
