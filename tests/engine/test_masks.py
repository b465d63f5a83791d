"""Pruned and frozen coordinates, and packed values."""

from __future__ import annotations

import numpy as np
import pytest
from engine.cases import (
    CONV,
    MLP,
    assert_near,
    batch,
    masks_of,
    opened,
    packed,
    positive_zeros,
    start,
)
from federation import same

from fedlean.engine.protocol import SGD
from fedlean.layers import Linear
from fedlean.spec import sequential
from fedlean.tree import apply_mask


@pytest.mark.parametrize("sgd", [SGD(0.1), SGD(0.1, 0.9, 0.1)])
def test_masked_coordinates_are_exactly_zero(engine, sgd):
    masks = masks_of(CONV)
    dirty = start(CONV)
    for name, mask in masks.items():  # a mask is not a multiplication
        dirty[name][~mask] = np.resize(np.float32([-1, np.nan, np.inf, -0.0]), (~mask).sum())
    session = opened(engine, CONV, dirty, masks=masks, sgd=sgd)
    assert positive_zeros(session.params(), masks)
    for seed in range(4):
        session.step(*batch(CONV, seed=seed), importance=seed % 2 == 0)
        assert positive_zeros(session.params(), masks)
    rng = np.random.default_rng(0)
    for _ in range(3):
        gradients = {
            name: rng.standard_normal(shape).astype(np.float32)
            for name, shape in CONV.param_shapes.items()
        }
        session.apply(gradients)
        assert positive_zeros(session.params(), masks)
    session.load(dirty)
    assert positive_zeros(session.params(), masks)
    session.step(*batch(CONV))
    assert positive_zeros(session.params(), masks)
    assert all(np.isfinite(value).all() for value in session.params().values())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_masked_coordinates_are_zero_even_when_training_diverges(engine, momentum):
    """NaN·0 is NaN: gradients that are not finite must not enter where there is no weight."""
    huge = SGD(1e30, momentum)
    masks = masks_of(MLP)
    session = opened(engine, MLP, masks=masks, sgd=huge)
    for seed in range(4):
        session.step(*batch(MLP, seed=seed), importance=True)
        assert positive_zeros(session.params(), masks)
    assert not all(np.isfinite(value).all() for value in session.params().values())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_frozen_tensors_keep_every_bit(engine, momentum):
    frozen = {"conv1.weight", "conv1.bias", "gn.weight", "fc.bias", "conv2.weight"}
    masks = masks_of(CONV)
    params = apply_mask(start(CONV), masks)
    session = opened(engine, CONV, params, masks=masks, frozen=frozen, sgd=SGD(0.1, momentum, 0.1))
    for seed in range(3):
        session.step(*batch(CONV, seed=seed), importance=True)
    session.apply({name: np.ones(shape, np.float32) for name, shape in CONV.param_shapes.items()})
    after = session.params()
    for name in CONV.param_shapes:
        assert same(after[name], params[name]) == (name in frozen), name
    assert set(session.importance()) == set(CONV.param_shapes) - frozen


def test_frozen_gradients_are_left_out(engine):
    session, (x, _) = opened(engine, MLP, frozen={"fc1.weight"}), batch(MLP)
    session.forward(x, training=True)
    gradients = session.backward({"fc2": np.ones((5, 4), np.float32)})
    assert set(gradients) == {"fc1.bias", "fc2.weight", "fc2.bias"}


def test_frozen_layer_trains_the_others_as_without(engine):
    """Freezing changes nothing else in the same step."""
    x, y = batch(MLP)
    free, held = opened(engine, MLP), opened(engine, MLP, frozen={"fc1.weight"})
    assert free.step(x, y) == pytest.approx(held.step(x, y), rel=1e-6)
    free_after, held_after = free.params(), held.params()
    del free_after["fc1.weight"], held_after["fc1.weight"]
    assert_near(held_after, free_after, 1e-6)


# Packed values


def test_packed_by_hand(engine):
    """Row-major in the mask: 1 and 4 of [[1, 2], [3, 4]]."""
    spec = sequential((2,), [("fc", Linear(2))])
    masks = {"fc.weight": np.array([[True, False], [False, True]])}
    bias = np.array([5, 6], np.float32)
    dense = {"fc.weight": np.array([[1, 2], [3, 4]], np.float32), "fc.bias": bias}
    session = opened(engine, spec, dense, masks=masks)
    kept = {"fc.weight": np.array([1, 4], np.float32), "fc.bias": bias}
    assert same(session.params(packed=True), kept)
    moved = {"fc.weight": np.array([7, 8], np.float32), "fc.bias": bias}
    session.load(moved)
    assert same(session.params()["fc.weight"], np.array([[7, 0], [0, 8]], np.float32))
    assert same(session.params(packed=True), moved)
    x = np.array([[1, 10]], np.float32)
    np.testing.assert_allclose(session.forward(x)["fc"], [[12, 86]])


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
def test_packed_is_dense_in_another_form(engine, density):
    """In and out, of `open` and of `load`, bit for bit through training."""
    masks, sgd = masks_of(CONV, density), SGD(0.1, 0.9, 0.01, clip_norm=1.0, proximal=0.1)
    first, second = start(CONV, 0), start(CONV, 5)
    sent = packed(first, masks)
    one = opened(engine, CONV, first, masks=masks, sgd=sgd)
    other = opened(engine, CONV, sent, masks=masks, sgd=sgd)
    assert same(one.params(packed=True), sent)
    for params in (first, second):
        one.load(params)
        other.load(packed(params, masks))
        for seed in range(2):
            x, y = batch(CONV, seed=seed)
            assert one.step(x, y) == other.step(x, y)
        after = other.params()
        assert same(one.params(), after)
        assert same(one.params(packed=True), packed(after, masks))


def test_packed_params_are_copies(engine):
    masks = masks_of(CONV)
    session = opened(engine, CONV, masks=masks)
    expected = session.params()
    for value in session.params(packed=True).values():
        value[:] = 9
    assert same(session.params(), expected)


def test_the_pattern_is_that_of_open(engine):
    """What the caller does to its mask later does not matter."""
    masks = masks_of(CONV)
    kept = {name: mask.copy() for name, mask in masks.items()}
    session = opened(engine, CONV, masks=masks)
    for mask in masks.values():
        mask[:] = True
    session.load(packed(start(CONV), kept))
    session.step(*batch(CONV))
    assert positive_zeros(session.params(), kept)
    assert session.params(packed=True)["fc.weight"].shape == (kept["fc.weight"].sum(),)
