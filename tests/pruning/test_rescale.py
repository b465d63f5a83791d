"""Kept weights times 1/√d_l."""

from __future__ import annotations

import numpy as np
import pytest

from fedlean.pruning.rescale import rescale_kept


def test_by_hand() -> None:
    """d = 1/4 of a and 2/2 of b: factors 2 and 1; the bias has no mask."""
    params = {
        "a.weight": np.array([[1, -3], [np.nan, -1]], np.float32),
        "b.weight": np.array([5, 6], np.float32),
        "b.bias": np.array([7], np.float32),
    }
    masks = {
        "a.weight": np.array([[False, True], [False, False]]),
        "b.weight": np.array([True, True]),
    }
    scaled = rescale_kept(params, masks)
    assert scaled["a.weight"].tolist() == [[0, -6], [0, 0]]
    assert not np.signbit(scaled["a.weight"])[[0, 1, 1], [0, 0, 1]].any()
    assert scaled["b.weight"].tolist() == [5, 6] and scaled["b.bias"].tolist() == [7]
    assert {value.dtype for value in scaled.values()} == {np.dtype(np.float32)}


def test_a_units_variance_comes_back() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((200, 400)).astype(np.float32)
    mask = rng.random(w.shape) < 0.2
    scaled = rescale_kept({"w": w}, {"w": mask})["w"]
    assert np.square(scaled).sum(1).mean() == pytest.approx(np.square(w).sum(1).mean(), rel=0.05)


def test_an_empty_layer_stays_empty_and_a_wrong_mask_is_named() -> None:
    w = {"w": np.ones(2, np.float32)}
    assert rescale_kept(w, {"w": np.zeros(2, bool)})["w"].tolist() == [0, 0]
    for masks in ({"w": np.ones(3, bool)}, {"w": np.ones(2)}, {"v": np.ones(2, bool)}):
        with pytest.raises(ValueError, match=f"mask of {next(iter(masks))!r}"):
            rescale_kept(w, masks)
