"""Random masks with a given number of weights in each layer: a seed and the counts say it all.

Su et al., "Sanity-checking pruning methods: random tickets can win the jackpot", NeurIPS 2020,
shuffle a mask within its layers: what a criterion says of single weights then goes, and how many it
keeps of each layer stays.  OURS: no unit dies where the counts allow; see `shuffled_masks`.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np

from fedlean.core import Masks, generator
from fedlean.patterns.largest import largest
from fedlean.patterns.unit_grid import UnitGrid, unit_grid
from fedlean.spec import ModelSpec
from fedlean.tree import read_only

_CERTAIN = np.uint64(2**64 - 1)  # above the 63 bits of every other word


def shuffled_masks(spec: ModelSpec, counts: Mapping[str, int], seed: int) -> Masks:
    """Masks of the tensors in `counts`, each with exactly its count of weights kept.

    First every unit gets a weight: outputs and inputs of a layer in random order, joined one to one
    and round again on the shorter side (pixels of the model's input are no units); with fewer
    weights than that, the first of those pairs.  The rest is drawn uniformly.

    A pure function of its arguments, bit for bit the same on every machine: it takes raw words of
    the counter-based generator only, 8 bytes per coordinate of one tensor at a time.  Raises
    ValueError naming the tensor that is not prunable or whose count does not fit.

    >>> from fedlean.models.lenet300 import lenet300
    >>> masks = shuffled_masks(lenet300((1, 8, 8), 10), {"fc3.weight": 100}, seed=0)
    >>> int(masks["fc3.weight"].sum()), bool(masks["fc3.weight"].any(0).all())
    (100, True)
    """
    masks = {}
    for name, count in counts.items():
        grid = unit_grid(spec, name)
        if not 0 <= count <= prod(grid.shape):
            raise ValueError(f"counts[{name!r}] must be in [0, {prod(grid.shape)}], got {count}")
        words = _words(seed, f"{name}/rest", (prod(grid.shape),))
        words[_joined(grid, seed, name)[:count]] = _CERTAIN
        masks[name] = largest(words, count).reshape(spec.param_shapes[name])
    return read_only(masks)


def _joined(grid: UnitGrid, seed: int, name: str) -> np.ndarray:
    """Flat coordinates, each another, that reach all units: as many as the longer side has."""
    groups, outputs, inputs, positions = grid.shape
    pair = np.arange(max(outputs, inputs) if grid.hidden else outputs)
    # orders of (groups, units); the groups take turns, so that the first pairs are of all groups
    rows = np.argsort(_words(seed, f"{name}/outputs", (groups, outputs)), 1, kind="stable")
    columns = np.argsort(_words(seed, f"{name}/inputs", (groups, inputs)), 1, kind="stable")
    position = _words(seed, f"{name}/positions", (len(pair), groups)) % np.uint64(positions)
    at = (
        np.arange(groups)[None, :],
        rows[:, pair % outputs].T,
        columns[:, pair % inputs].T,
        position.astype(np.intp),
    )
    return np.ravel_multi_index(np.broadcast_arrays(*at), grid.shape).ravel()


def _words(seed: int, purpose: str, shape: tuple[int, ...]) -> np.ndarray:
    """uint64 of 63 random bits, in `shape`."""
    bits = generator(seed, 0, 0, f"shuffle/{purpose}").bit_generator
    return (bits.random_raw(prod(shape)) >> np.uint64(1)).reshape(shape)
