"""Importance sums and losses."""

from __future__ import annotations

import numpy as np
import pytest
from engine.cases import (
    CONV,
    LOSSES,
    MLP,
    PLAIN,
    assert_near,
    batch,
    masks_of,
    mlp_by_hand,
    opened,
)
from federation import same

from fedlean.engine.protocol import SGD


def test_importance_is_the_sum_of_squares_of_all_coordinates(engine):
    masks = masks_of(MLP)
    session = opened(engine, MLP, masks=masks, sgd=SGD(0.1, 0.9, 0.01))
    expected = {name: np.zeros(shape) for name, shape in MLP.param_shapes.items()}
    assert same(session.importance(), {n: v.astype(np.float32) for n, v in expected.items()})
    for seed in range(4):
        x, y = batch(MLP, seed=seed)
        important = seed != 1
        if important:
            _, _, gradients, _ = mlp_by_hand(session.params(), x, y, "ce")
            expected = {name: total + gradients[name] ** 2 for name, total in expected.items()}
        session.step(x, y, importance=important)
    got = session.importance()
    assert_near(got, expected)
    assert all(got[name][~mask].any() for name, mask in masks.items())
    got["fc1.weight"][:] = -1  # a copy
    assert (session.importance()["fc1.weight"] >= 0).all()


def test_importance_does_not_change_training(engine):
    masks = masks_of(CONV)
    with_it, without = (
        opened(engine, CONV, masks=masks, sgd=SGD(0.1, 0.9, 0.01)) for _ in range(2)
    )
    for seed in range(3):
        x, y = batch(CONV, seed=seed)
        loss = with_it.step(x, y, importance=True)
        assert loss == pytest.approx(without.step(x, y), rel=1e-6)
    assert_near(with_it.params(), without.params(), 1e-6)


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_is_that_of_the_step_before_its_update(engine, loss, size):
    session = opened(engine, PLAIN, masks=masks_of(PLAIN), loss=loss, batch_size=8)
    for seed in range(3):
        x, y = batch(PLAIN, size, seed)
        before, params = session.loss(x, y), session.params()
        assert same(session.params(), params)  # asking changes nothing
        assert session.step(x, y) == pytest.approx(before, rel=1e-6)
        assert abs(session.loss(x, y) - before) > 1e-4 * before


def test_loss_of_a_batch_is_the_mean_of_its_examples(engine):
    session, (x, y) = opened(engine, PLAIN), batch(PLAIN, 5)
    singles = [session.loss(x[i : i + 1], y[i : i + 1]) for i in range(5)]
    assert session.loss(x, y) == pytest.approx(np.mean(singles), rel=1e-5)
