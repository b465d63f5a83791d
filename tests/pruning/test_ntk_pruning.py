"""Steps of NTK-SAP: the schedule, what is kept, and what never comes back."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fedlean.engine.open import open_engine
from fedlean.layers import Linear, ReLU
from fedlean.pruning import ntk_pruning
from fedlean.pruning.density import full_masks
from fedlean.pruning.global_top import count_at
from fedlean.pruning.ntk_pruning import prune_by_ntk, prune_step
from fedlean.spec import sequential
from fedlean.tree import num_kept

ENGINE = open_engine("torch", 1)
TWO = sequential((2,), [("fc1", Linear(2)), ("relu", ReLU()), ("fc2", Linear(1))])
MLP = sequential(
    (16,),
    [
        ("fc1", Linear(24)),
        ("relu1", ReLU()),
        ("fc2", Linear(12)),
        ("relu2", ReLU()),
        ("fc3", Linear(4)),
    ],
)


def test_a_step_by_hand() -> None:
    """Of |s| = 5 6 / 0 1 and 3 2 four are kept, the pruned 6 not among them: 5 1 3 2.

    Half of six weights is three: without care for units 5 3 2, and fc1[1] dies; with it 5 1 and,
    of fc2's two, which are its input's only ones, the larger.
    """
    signed = {
        "fc1.weight": np.array([[-5.0, 6.0], [0.0, 1.0]]),
        "fc2.weight": np.array([[3.0, -2.0]]),
    }
    masks = {**full_masks(TWO), "fc1.weight": np.array([[True, False], [True, True]])}
    four = prune_step(TWO, signed, masks, 4 / 6)
    assert four["fc1.weight"].tolist() == [[True, False], [False, True]]
    assert four["fc2.weight"].tolist() == [[True, True]]
    plain = prune_step(TWO, signed, masks, 0.5, keep_units=False)
    assert plain["fc1.weight"].tolist() == [[True, False], [False, False]]
    assert plain["fc2.weight"].tolist() == [[True, True]]


def test_what_is_said_of_pruned_weights_is_not_looked_at() -> None:
    masks = {**full_masks(TWO), "fc1.weight": np.array([[False, True], [True, True]])}
    signed = {"fc1.weight": np.array([[np.nan, 1], [1, 1]]), "fc2.weight": np.ones((1, 2))}
    assert num_kept(prune_step(TWO, signed, masks, 0.7)) == 4


def test_refusals() -> None:
    zero = {name: np.zeros(TWO.param_shapes[name]) for name in TWO.prunable}
    with pytest.raises(ValueError, match="all NTK scores of the 6 weights left are 0"):
        prune_step(TWO, zero, full_masks(TWO), 0.5)
    with pytest.raises(ValueError, match="NaN or infinity"):
        prune_step(TWO, {**zero, "fc2.weight": np.full((1, 2), np.inf)}, full_masks(TWO), 0.5)
    with pytest.raises(ValueError, match="keeps none"):
        prune_by_ntk(ENGINE, TWO, 0.1, steps=1)


def test_densities_follow_the_schedule_and_pruned_weights_stay_pruned(monkeypatch) -> None:
    """After step t floor(d^(t/T) · weights) are kept, each a subset of those before."""
    seen = []

    def spied(engine, spec, masks, *rest, **settings):
        seen.append(masks)
        return scores(engine, spec, masks, *rest, **settings)

    scores = ntk_pruning.ntk_scores
    monkeypatch.setattr(ntk_pruning, "ntk_scores", spied)
    seen.append(prune_by_ntk(ENGINE, MLP, 0.1, steps=5, examples=16))
    counts = [count_at(0.1 ** (step / 5), MLP) for step in range(6)]
    assert [num_kept(masks) for masks in seen] == counts
    for before, after in itertools.pairwise(seen):
        assert not any((after[name] & ~before[name]).any() for name in after)


def test_no_unit_dies_unless_units_are_not_kept() -> None:
    kept = prune_by_ntk(ENGINE, MLP, 0.1, steps=4, examples=16, seed=2)
    assert all(mask.any(1).all() for mask in kept.values())
    assert kept["fc2.weight"].any(0).all() and kept["fc3.weight"].any(0).all()
    plain = prune_by_ntk(ENGINE, MLP, 0.1, steps=4, examples=16, seed=2, keep_units=False)
    assert not all(mask.any(1).all() for mask in plain.values())
    assert num_kept(kept) == num_kept(plain) == count_at(0.1, MLP)


def test_a_seed_is_one_pattern() -> None:
    def run(**settings):
        return prune_by_ntk(ENGINE, MLP, 0.3, **{"steps": 3, "examples": 8, "seed": 1} | settings)

    def same(a, b) -> bool:
        return all(np.array_equal(a[name], b[name]) for name in a)

    assert same(run(), run())
    for changed in ({"seed": 2}, {"draws": 2}, {"steps": 2}, {"examples": 9}):
        assert not same(run(), run(**changed)), changed
    assert all(mask.all() for mask in prune_by_ntk(ENGINE, MLP, 1.0, steps=2).values())
