"""Masks before training, of a model that has seen no data: one criterion or another.

The criteria are those of their own modules; the last four are controls for the first, which is what
`methods/ntk_zo.py` takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

import numpy as np

from fedlean.core import Masks, Params, derive_seed
from fedlean.engine.protocol import Engine
from fedlean.patterns.shuffled import shuffled_masks
from fedlean.pruning.density import full_masks
from fedlean.pruning.equal_density import kept_count
from fedlean.pruning.global_top import count_at, keep_largest
from fedlean.pruning.node_perturbation import node_gradient, node_scores
from fedlean.pruning.ntk import gaussian_inputs
from fedlean.pruning.ntk_pruning import prune_by_ntk, prune_step
from fedlean.pruning.prune_steps import density_after
from fedlean.pruning.synaptic_flow import prune_by_flow
from fedlean.pruning.water_filling import water_filling
from fedlean.spec import ModelSpec
from fedlean.tree import kept_counts

Criterion = Literal[
    "ntk", "ntk_shuffled", "node_ntk", "node", "water_filling", "random", "synflow", "magnitude"
]
SYNFLOW_STEPS = 100


@dataclass(frozen=True)
class Scoring:
    """How NTK and node-perturbation scores are taken.

    steps: T; draws: models and batches of `examples` inputs per step; epsilon: ε of either; init:
    the scheme of `init_params`; keep_units: no unit loses its last weight.
    """

    steps: int = 20
    draws: int = 1
    examples: int = 256
    epsilon: float = 0.01
    init: str = "pytorch"
    keep_units: bool = True

    def density_after(self, step: int, density: float) -> float:
        """d^(t/T)."""
        return density_after(step, self.steps, density, "geometric")


def foresight_masks(
    engine: Engine,
    spec: ModelSpec,
    params: Params,
    density: float,
    criterion: Criterion,
    scoring: Scoring,
    seed: int,
    *,
    synflow_steps: int = SYNFLOW_STEPS,
) -> tuple[Masks, int | None]:
    """Masks of all prunable weights at `density` of them together; `params` are dense.

    And, where they are random ones, the seed that `shuffled_masks` makes them from.

    ntk            the largest |s_j| of NTK-SAP on Gaussian inputs, in T steps
    ntk_shuffled   as many of each layer as "ntk" keeps, at random
    node_ntk       as "ntk", the scores by forward passes only; in convolutions an approximation
    node           the largest scores of node perturbation, in T steps: forward passes only
    water_filling  min(n_l, c) of each layer, at random
    random         the same share of each layer, at random
    synflow        Tanaka et al., NeurIPS 2020, in `synflow_steps` steps (paper: 100)
    magnitude      the largest |w| of all

    Raises ValueError, also when the density keeps no weight.
    """
    count = count_at(density, spec)
    sizes = {name: prod(spec.param_shapes[name]) for name in spec.prunable}
    if criterion in ("ntk", "ntk_shuffled", "node_ntk"):
        masks = prune_by_ntk(
            engine,
            spec,
            density,
            steps=scoring.steps,
            draws=scoring.draws,
            examples=scoring.examples,
            epsilon=scoring.epsilon,
            seed=seed,
            init=scoring.init,
            keep_units=scoring.keep_units,
            difference=node_gradient if criterion == "node_ntk" else None,
        )
        return shuffled_as(spec, masks, seed) if criterion == "ntk_shuffled" else (masks, None)
    if criterion == "node":
        return _prune_by_nodes(engine, spec, density, scoring, seed), None
    if criterion == "water_filling":
        return shuffled_masks(spec, water_filling(sizes, count), seed), seed
    if criterion == "random":
        counts = {name: kept_count(size, density) for name, size in sizes.items()}
        return shuffled_masks(spec, counts, seed), seed
    if criterion == "synflow":
        return prune_by_flow(spec, params, density, synflow_steps), None
    weights = {name: np.abs(params[name]) for name in spec.prunable}
    return keep_largest(weights, count, full_masks(spec)), None


def shuffled_as(spec: ModelSpec, masks: Masks, seed: int) -> tuple[Masks, int]:
    """Random masks with as many weights in each tensor as `masks` have, and their seed."""
    counts: Mapping[str, int] = kept_counts(masks)
    own = derive_seed(seed, 0, 0, "shuffle")
    return shuffled_masks(spec, counts, own), own


def _prune_by_nodes(
    engine: Engine, spec: ModelSpec, density: float, scoring: Scoring, seed: int
) -> Masks:
    masks = full_masks(spec)
    for step in range(1, scoring.steps + 1):
        step_seed = derive_seed(seed, 0, step, "node/step")
        inputs = gaussian_inputs(spec, scoring.examples, scoring.draws, step_seed)
        scores = node_scores(
            engine, spec, masks, inputs, step_seed, bump=scoring.epsilon, init=scoring.init
        )
        masks = prune_step(
            spec,
            scores,
            masks,
            scoring.density_after(step, density),
            keep_units=scoring.keep_units,
        )
    return masks
