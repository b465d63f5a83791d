"""Each criterion keeps the weights it says, as many as the density asks for."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from federation import ENGINE, SPEC, params, same

from fedlean.patterns.shuffled import shuffled_masks
from fedlean.pruning.density import full_masks
from fedlean.pruning.foresight import Criterion, Scoring, foresight_masks, shuffled_as
from fedlean.pruning.node_perturbation import node_gradient
from fedlean.pruning.ntk_pruning import prune_by_ntk
from fedlean.pruning.synaptic_flow import prune_by_flow
from fedlean.tree import kept_counts, num_kept

SCORING = Scoring(steps=2, examples=8)


def masks_by(criterion, density: float = 0.5, scoring: Scoring = SCORING, seed: int = 3):
    found, mask_seed = foresight_masks(ENGINE, SPEC, params(), density, criterion, scoring, seed)
    if mask_seed is not None:  # which, with the counts, is all that has to be sent
        assert same(found, shuffled_masks(SPEC, kept_counts(found), mask_seed))
    assert (mask_seed is not None) == (criterion in ("ntk_shuffled", "water_filling", "random"))
    return found


@pytest.mark.parametrize("criterion", get_args(Criterion))
def test_density_is_met_and_a_seed_decides(criterion):
    masks = masks_by(criterion)

    assert masks.keys() == set(SPEC.prunable)
    assert num_kept(masks) == 420 and same(masks, masks_by(criterion))
    by_weights = criterion in ("synflow", "magnitude")
    assert same(masks, masks_by(criterion, seed=4)) == by_weights


def test_criteria_are_those_of_their_modules():
    ntk = prune_by_ntk(ENGINE, SPEC, 0.5, steps=2, examples=8, seed=3)
    assert same(masks_by("ntk"), ntk)
    by_nodes = prune_by_ntk(
        ENGINE, SPEC, 0.5, steps=2, examples=8, seed=3, difference=node_gradient
    )
    assert same(masks_by("node_ntk"), by_nodes)
    assert same(masks_by("synflow"), prune_by_flow(SPEC, params(), 0.5, 100))
    every = np.concatenate([abs(params()[name]).ravel() for name in SPEC.prunable])
    kept = np.concatenate([masks_by("magnitude")[name].ravel() for name in SPEC.prunable])
    assert every[kept].min() >= every[~kept].max()


def test_counts_of_layers():
    """36 + 768 + 36 weights: by water filling the small ones stay whole, at random all halve."""
    assert list(kept_counts(masks_by("water_filling")).values()) == [36, 348, 36]
    assert list(kept_counts(masks_by("random")).values()) == [18, 384, 18]
    shuffled, ntk = masks_by("ntk_shuffled"), masks_by("ntk")
    assert kept_counts(shuffled) == kept_counts(ntk) and not same(shuffled, ntk)
    assert same(shuffled, shuffled_as(SPEC, ntk, 3)[0])


def test_the_schedule_ends_at_the_density():
    assert SCORING.density_after(1, 0.25) == 0.5 and SCORING.density_after(2, 0.25) == 0.25


def test_no_weights_left_is_refused():
    with pytest.raises(ValueError, match="density"):
        masks_by("random", 1e-4)
    assert num_kept(full_masks(SPEC)) == 840
