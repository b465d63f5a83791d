"""A global top-k: exact counts, the order of ties, and what is pruned stays pruned."""

from __future__ import annotations

import numpy as np
import pytest
from federation import SPEC
from hypothesis import given
from hypothesis import strategies as st

from fedlean.layers import Linear
from fedlean.pruning.density import full_masks
from fedlean.pruning.global_top import count_at, keep_largest
from fedlean.spec import INPUT, ModelSpec, Node

SHAPES = {"a": (2, 3), "b": (4,), "c": (0, 2), "d": (2, 1, 2, 2)}


@given(st.integers(0, 2**32 - 1), st.integers(0, 25))
def test_equals_a_sort_of_everything(seed, count) -> None:
    """By falling score, then by place; a coordinate outside `among` is never chosen."""
    rng = np.random.default_rng(seed)
    scores = {name: rng.integers(0, 4, shape).astype(float) for name, shape in SHAPES.items()}
    among = {name: rng.random(shape) < 0.7 for name, shape in SHAPES.items()}
    places = [(name, i) for name in SHAPES for i in np.ndindex(SHAPES[name]) if among[name][i]]
    chosen = sorted(places, key=lambda place: -scores[place[0]][place[1]])[:count]  # stable
    masks = keep_largest(scores, count, among)
    assert {name: mask.shape for name, mask in masks.items()} == SHAPES
    kept = [(name, i) for name in SHAPES for i in np.ndindex(SHAPES[name]) if masks[name][i]]
    assert sorted(kept) == sorted(chosen)


def test_a_whole_tensor_may_go() -> None:
    """Nothing repairs what the scores decide."""
    scores = {"a": np.full((2, 2), 1.0), "b": np.full(3, 2.0)}
    masks = keep_largest(scores, 3, {name: np.ones(v.shape, bool) for name, v in scores.items()})
    assert not masks["a"].any() and masks["b"].all()


def test_arguments_are_left_alone() -> None:
    scores, among = {"a": np.array([3.0, 1.0])}, {"a": np.array([True, False])}
    kept = keep_largest(scores, 1, among)["a"]
    assert scores["a"].tolist() == [3.0, 1.0] and among["a"].tolist() == [True, False]
    assert not np.shares_memory(kept, among["a"]) and among["a"].flags.writeable


def test_count_is_rounded_down_and_never_0() -> None:
    """840 prunable weights: 0.2 of them are 168, 0.0025 are 2.1."""
    assert sum(mask.size for mask in full_masks(SPEC).values()) == 840
    assert [count_at(d, SPEC) for d in (1.0, 0.2, 0.0025)] == [840, 168, 2]
    with pytest.raises(ValueError, match=r"density 0.001 keeps none .* 840 .* at least 0.0012"):
        count_at(0.001, SPEC)
    rigid = ModelSpec((3,), (Node("fc", Linear(2), (INPUT,), prunable=False),))
    with pytest.raises(ValueError, match="choose a model"):
        count_at(0.5, rigid)
