"""The largest scores of the whole model, without a unit that loses its last weight.

OURS: NTK-SAP, SNIP and SynFlow keep the largest scores and nothing else, which at low densities
cuts every weight into or out of some units; those then cost memory and compute nothing.
"""

from __future__ import annotations

import numpy as np

from fedlean.core import Masks, Params
from fedlean.patterns.unit_grid import UnitGrid, unit_grid
from fedlean.pruning.global_top import keep_largest
from fedlean.spec import ModelSpec
from fedlean.tree import num_kept


def keep_largest_alive(spec: ModelSpec, scores: Params, count: int, among: Masks) -> Masks:
    """`keep_largest`, but first the best weight of every unit, into it and out of it.

    scores: by prunable weight, floating, >= 0 and without NaN; among: bool, in their shapes

    Exactly `count` are kept, or all of `among` if those are fewer, and none outside of it: a unit
    that is dead there stays dead.  If `count` is too small for all units, the largest of their best
    weights are kept.  Pixels of the model's input are no units.

    >>> from fedlean.layers import Linear
    >>> from fedlean.spec import sequential
    >>> spec = sequential((2,), [("fc", Linear(2))])
    >>> scores = {"fc.weight": np.array([[9.0, 8.0], [1.0, 2.0]])}
    >>> keep_largest_alive(spec, scores, 2, {"fc.weight": np.ones((2, 2), bool)})["fc.weight"]
    array([[ True, False],
           [False,  True]])
    """
    needed = {
        name: _best_of_units(np.where(among[name], values, -1.0), unit_grid(spec, name))
        for name, values in scores.items()
    }
    if num_kept(needed) >= count:
        return keep_largest(scores, count, needed)
    first = {name: np.where(needed[name], np.inf, values) for name, values in scores.items()}
    return keep_largest(first, count, among)


def _best_of_units(scores: np.ndarray, grid: UnitGrid) -> np.ndarray:
    """True at the largest score of each output, then of each hidden input that has none yet.

    scores: in the weight's shape, -1 where pruned; of equal scores the first wins.
    """
    best = np.zeros(grid.shape, bool)
    by_unit = scores.reshape(grid.shape)
    _mark(best, by_unit)
    if grid.hidden:
        _mark(best.swapaxes(1, 2), by_unit.swapaxes(1, 2))
    return best.reshape(scores.shape)


def _mark(best: np.ndarray, scores: np.ndarray) -> None:
    """Set `best` (G, U, V, K) in place at the best score >= 0 of every U that has none yet."""
    groups, units, _, positions = scores.shape
    at = scores.reshape(groups, units, -1).argmax(2)
    group, unit = np.indices((groups, units))
    where = (group, unit, at // positions, at % positions)
    best[where] |= (scores[where] >= 0) & ~best.any((2, 3))
