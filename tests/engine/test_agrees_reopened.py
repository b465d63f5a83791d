"""Loading other parameters and opening with other masks, as reconfigurations do, agrees too."""

from __future__ import annotations

import numpy as np
import pytest
from engine.agreement import SIZES, TOLERANCE, check_training
from engine.cases import CONV, FULL_SGD, NET, batch, masks_of, opened, packed, start
from engine.oracle import Oracle

from fedlean.tree import apply_mask


@pytest.mark.parametrize("form", [dict, packed], ids=["dense", "packed"])
def test_loaded_parameters(engine, form):
    """Momentum goes on, and the proximal term pulls to what was loaded last."""
    masks = masks_of(NET, 0.3)
    session = opened(engine, NET, start(NET, 3), masks=masks, sgd=FULL_SGD)
    oracle = Oracle(NET, start(NET, 3), masks, sgd=FULL_SGD)
    for turn in range(3):
        if turn:
            params = start(NET, 3 + turn)
            session.load(form(params) if form is dict else form(params, masks))
            oracle.load(params)
        for step in range(2):
            x, y = batch(NET, 5, 10 * turn + step)
            want = oracle.step(x, y)
            assert session.step(x, y) == pytest.approx(want, rel=TOLERANCE[engine.name])
    after = oracle.params()
    for name, value in session.params().items():
        near = TOLERANCE[engine.name] * np.abs(after[name]).max()
        np.testing.assert_allclose(value, after[name], rtol=0, atol=near, err_msg=name)


def test_other_masks(engine):
    """Kept, pruned and regrown coordinates, from dense to nearly empty and back."""
    params = start(NET)
    for i, density in enumerate([1.0, 0.5, 0.05, 0.0, 0.2, 0.9]):
        masks = masks_of(NET, density, seed=i)
        params = apply_mask(params, masks)
        session = opened(engine, NET, params, masks=masks, sgd=FULL_SGD)
        oracle = Oracle(NET, params, masks, sgd=FULL_SGD)
        for step in range(2):
            x, y = batch(NET, 5, step)
            want = oracle.step(x, y)
            assert session.step(x, y) == pytest.approx(want, rel=TOLERANCE[engine.name])
        params = session.params()
        for name, value in oracle.params().items():
            near = TOLERANCE[engine.name] * np.abs(value).max()
            np.testing.assert_allclose(params[name], value, rtol=0, atol=near, err_msg=name)


@pytest.mark.parametrize("batch_size", [64, 65])
def test_batches_smaller_than_batch_size(engine, batch_size):
    """What a larger batch left behind does not leak into a smaller one."""
    masks = masks_of(CONV, 0.4)
    session = opened(engine, CONV, masks=masks, sgd=FULL_SGD, batch_size=batch_size)
    oracle = Oracle(CONV, start(CONV), masks, sgd=FULL_SGD)
    for i, size in enumerate([64, *SIZES[::-1], 64, 1]):
        x, y = batch(CONV, size, i)
        assert session.step(x, y) == pytest.approx(oracle.step(x, y), rel=1e-4), size
        assert session.loss(x, y) == pytest.approx(oracle.loss(x, y), rel=1e-4), size


def test_an_importance_step_among_plain_ones(engine):
    session = check_training(engine, NET, size=6, masks=masks_of(NET, 0.1), steps=5)
    assert set(session.importance()) == set(NET.param_shapes)
