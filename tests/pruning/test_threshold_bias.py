"""FIARSE's factor: against the derivative that it comes from, and at its ends."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedlean.patterns.largest import BLOCK
from fedlean.pruning.threshold_bias import bias, thresholds, without_fallen


class Mask(torch.autograd.Function):
    """|w| >= θ, with 2θ/(|w| + θ)² where it is True for its derivative by |w|."""

    @staticmethod
    def forward(ctx, sizes, least):
        ctx.save_for_backward(sizes, least)
        return (sizes >= least).to(sizes.dtype)

    @staticmethod
    def backward(ctx, *entering):
        sizes, least = ctx.saved_tensors
        return entering[0] * (sizes >= least) * 2 * least / (sizes + least) ** 2, None


@pytest.mark.parametrize("least", [0.01, 0.5, 3.0])
def test_the_factor_is_the_derivative_of_a_weight_times_its_mask(least):
    """d(w·M(|w|))/dw by autograd, times a gradient that comes from the loss."""
    rng = np.random.default_rng(0)
    start = rng.normal(size=500).astype(np.float32)
    g = rng.normal(size=500).astype(np.float32)
    w = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    effective = w * Mask.apply(w.abs(), torch.tensor(least, dtype=torch.float64))
    (effective * torch.tensor(g)).sum().backward()
    end = start - g  # a plain step at rate 1
    bias({"w": start}, {"w": end}, {"w": least})
    assert w.grad is not None
    np.testing.assert_allclose(end, start - w.grad.numpy(), rtol=1e-5, atol=1e-6)
    assert (end == start).any() or least < 0.1


def test_it_is_half_more_at_the_threshold_and_next_to_nothing_far_above():
    start = np.array([2.0, -2.0, 2e6, 1e-30], np.float32)
    end = start + np.array([1.0, 1.0, 8.0, 1.0], np.float32)
    bias({"w": start}, {"w": end}, {"w": 2.0})
    assert end.tolist() == [3.5, -0.5, 2e6 + 8, np.float32(1e-30)]


def test_tiny_weights_neither_overflow_nor_vanish():
    start = np.array([1e-38, 1e-30], np.float32)
    end = start + np.float32(1)
    bias({"w": start}, {"w": end}, {"w": 1e-38})
    np.testing.assert_allclose(end, [1.5, 1.0], rtol=1e-6)


def test_without_a_threshold_nothing_changes():
    start = np.array([0.0, 1.0], np.float32)
    end = np.array([0.3, -0.7], np.float32)
    before = end.copy()
    bias({"w": start}, {"w": end}, {"w": 0.0})
    assert end.tobytes() == before.tobytes()


def test_blocks_do_not_show():
    rng = np.random.default_rng(1)
    start = rng.normal(size=2 * BLOCK + 7).astype(np.float32)
    moved = start + rng.normal(size=start.size).astype(np.float32)
    whole, parts = moved.copy(), []
    bias({"w": start}, {"w": whole}, {"w": 0.3})
    for at in range(0, start.size, 1000):
        end = moved[at : at + 1000].copy()
        bias({"w": start[at : at + 1000]}, {"w": end}, {"w": 0.3})
        parts.append(end)
    assert whole.tobytes() == np.concatenate(parts).tobytes()
    held = np.empty_like(whole)
    without_fallen(whole, 0.3, held)
    assert np.array_equal(held, np.where(abs(whole) >= np.float32(0.3), whole, 0))
    assert not np.signbit(held[held == 0]).any()


def test_the_smallest_that_is_kept_is_the_threshold():
    kept = {"a": np.array([-0.5, 2.0], np.float32), "b": np.array([0.25, 8.0], np.float32)}
    assert thresholds(kept, of_all=False) == {"a": 0.5, "b": 0.25}
    assert thresholds(kept, of_all=True) == {"a": 0.25, "b": 0.25}
    assert thresholds({}, of_all=True) == {}
