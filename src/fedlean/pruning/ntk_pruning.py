"""Pruning by NTK scores in steps: the step that server and clients share, and the data-free loop.

Wang, Li and Sun, NTK-SAP, ICLR 2023: T steps, after step t the top d^(t/T) of all weights by |s_j|
are kept, and a pruned weight never comes back.
"""

from __future__ import annotations

import numpy as np

from fedlean.core import Masks, Params, derive_seed
from fedlean.engine.protocol import Engine
from fedlean.pruning.density import full_masks
from fedlean.pruning.global_top import count_at, keep_largest
from fedlean.pruning.keep_alive import keep_largest_alive
from fedlean.pruning.ntk import Difference, gaussian_inputs, ntk_scores
from fedlean.pruning.prune_steps import density_after
from fedlean.spec import ModelSpec
from fedlean.tree import num_kept


def prune_step(
    spec: ModelSpec, scores: Params, masks: Masks, density: float, *, keep_units: bool = True
) -> Masks:
    """The weights with the largest |s_j| among `masks`: floor(density · prunable weights).

    scores: signed, of all prunable weights, summed over clients; what they say of pruned weights
    is not looked at.  With `keep_units` (OURS) no unit loses its last weight while `density` has
    enough for all.  Raises ValueError when the density keeps no weight, or the scores name none.
    """
    count = count_at(density, spec)
    sizes = {}
    for name in spec.prunable:
        sizes[name] = np.where(masks[name], np.abs(scores[name]), 0)
    if not all(np.isfinite(size).all() for size in sizes.values()):
        raise ValueError("NTK scores hold NaN or infinity, expected finite numbers")
    if not any(size.any() for size in sizes.values()):
        raise ValueError(
            f"all NTK scores of the {num_kept(masks)} weights left are 0: no path from input to "
            "output is left (choose a higher density or more steps), the signal vanishes in a "
            "model this deep (choose init 'he'), or epsilon is lost beside the weights (0.01 is "
            "usual)"
        )
    if keep_units:
        return keep_largest_alive(spec, sizes, count, masks)
    return keep_largest(sizes, count, masks)


def prune_by_ntk(
    engine: Engine,
    spec: ModelSpec,
    density: float,
    *,
    steps: int = 20,
    draws: int = 1,
    examples: int = 256,
    epsilon: float = 0.01,
    seed: int = 0,
    init: str = "pytorch",
    keep_units: bool = True,
    difference: Difference | None = None,
) -> Masks:
    """NTK-SAP on Gaussian inputs: masks of all prunable weights, without data and without clients.

    Each step scores what is left on `draws` models and batches of `examples`, other ones each time.
    density in (0, 1], of all prunable weights together; difference: as in `ntk_scores`.  Raises
    ValueError.
    """
    masks = full_masks(spec)
    for step in range(1, steps + 1):
        density_now = density_after(step, steps, density, "geometric")
        if count_at(density_now, spec) == num_kept(masks):
            continue
        step_seed = derive_seed(seed, 0, step, "ntk/step")
        found = ntk_scores(
            engine,
            spec,
            masks,
            gaussian_inputs(spec, examples, draws, step_seed),
            step_seed,
            epsilon=epsilon,
            init=init,
            batch_size=examples,
            difference=difference,
        )
        masks = prune_step(spec, found.scores, masks, density_now, keep_units=keep_units)
    return masks
