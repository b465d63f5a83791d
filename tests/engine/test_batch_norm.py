"""BatchNorm: moments by hand, and when running statistics move."""

from __future__ import annotations

import numpy as np
import pytest
from engine.cases import (
    CONV,
    batch,
    opened,
    start,
)
from federation import same

from fedlean.layers import (
    BatchNorm,
)
from fedlean.spec import sequential

BUFFERS = ("bn.running_mean", "bn.running_var")


def norm_by_hand(x, mean, var, params, eps=1e-5):
    shape = (1, -1, 1, 1) if x.ndim == 4 else (1, -1)
    scaled = (x - mean.reshape(shape)) / np.sqrt(var.reshape(shape) + eps)
    return scaled * params["bn.weight"].reshape(shape) + params["bn.bias"].reshape(shape)


@pytest.mark.parametrize("shape", [(3, 4, 4), (3,)])
def test_batch_norm_by_hand(engine, shape):
    """Training: batch moments, and running ones moved by momentum, the variance unbiased."""
    spec = sequential(shape, [("bn", BatchNorm(momentum=0.3))])
    params = start(spec)
    session = opened(engine, spec, params, batch_size=6)
    x = 2 + 3 * np.random.default_rng(0).standard_normal((6, *shape)).astype(np.float32)
    axes = (0, 2, 3) if len(shape) == 3 else (0,)
    count = x.size // 3

    mean, var = params["bn.running_mean"], params["bn.running_var"]
    out = session.forward(x)["bn"]
    np.testing.assert_allclose(out, norm_by_hand(x, mean, var, params), rtol=1e-4, atol=1e-5)
    assert same(session.params(), params)  # evaluation moves nothing

    out = session.forward(x, training=True)["bn"]
    expected = norm_by_hand(x, x.mean(axes), x.var(axes), params)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    after = session.params()
    np.testing.assert_allclose(
        after["bn.running_mean"], 0.7 * mean + 0.3 * x.mean(axes), rtol=1e-5, atol=1e-6
    )
    unbiased = x.var(axes) * count / (count - 1)
    np.testing.assert_allclose(after["bn.running_var"], 0.7 * var + 0.3 * unbiased, rtol=1e-5)
    assert same(after["bn.weight"], params["bn.weight"])


def test_running_statistics_move_in_training_only(engine):
    session, (x, y) = opened(engine, CONV), batch(CONV)
    before = session.params()
    assert set(before) == set(CONV.tensor_shapes) and set(BUFFERS) <= set(before)
    session.loss(x, y)
    session.forward(x, taps=["bn"])
    assert same(session.params(), before)
    session.step(x, y)
    after = session.params()
    assert all(not same(after[name], before[name]) for name in BUFFERS)
    assert not set(BUFFERS) & set(session.importance())


def test_frozen_running_statistics_do_not_drift(engine):
    """A frozen BatchNorm runs in evaluation mode."""
    frozen = {"bn.weight", "bn.bias", *BUFFERS}
    session, (x, y) = opened(engine, CONV, frozen=frozen), batch(CONV)
    before = session.params()
    evaluated = session.forward(x, taps=["bn"])["bn"].copy()
    trained = session.forward(x, taps=["bn"], training=True)["bn"]
    np.testing.assert_allclose(trained, evaluated, rtol=1e-6, atol=1e-6)
    session.step(x, y)
    after = session.params()
    assert all(same(after[name], before[name]) for name in frozen)
    assert not same(after["conv1.weight"], before["conv1.weight"])
