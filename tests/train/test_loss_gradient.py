"""Loss and gradient at the logits by hand, against differences, and against the engine."""

from __future__ import annotations

from math import exp, log

import numpy as np
import pytest
from federation import ENGINE, SPEC, client_data, params

from fedlean.core import SubModel
from fedlean.engine.protocol import SGD
from fedlean.train.loss_gradient import loss_and_gradient


def test_cross_entropy_by_hand():
    """softmax(ln 3, 0) = (3/4, 1/4): loss ln 4/3 for label 0, ln 4 for label 1; mean over two."""
    logits = np.array([[log(3), 0], [log(3), 0]], np.float32)
    value, gradient = loss_and_gradient(logits, np.array([0, 1]), "ce")
    assert value == pytest.approx((log(4 / 3) + log(4)) / 2, rel=1e-6)
    assert gradient == pytest.approx(np.array([[-1 / 8, 1 / 8], [3 / 8, -3 / 8]]))
    assert gradient.dtype == np.float32


def test_bce_by_hand():
    """sigmoid(ln 3) = 3/4, sigmoid(0) = 1/2, one-hot (1, 0): (ln 4/3 + ln 2) / 2; mean over B·C."""
    logits = np.array([[log(3), 0]], np.float32)
    value, gradient = loss_and_gradient(logits, np.array([0]), "bce")
    assert value == pytest.approx((log(4 / 3) + log(2)) / 2, rel=1e-6)
    assert gradient == pytest.approx(np.array([[-1 / 8, 1 / 4]]))


def test_large_logits_do_not_overflow():
    logits = np.array([[1000, -1000]], np.float32)
    for loss in ("ce", "bce"):
        right, gradient = loss_and_gradient(logits, np.array([0]), loss)
        wrong, _ = loss_and_gradient(logits, np.array([1]), loss)
        assert right == 0 and not gradient.any()
        assert wrong == pytest.approx(2000 if loss == "ce" else 1000)
    assert exp(-1000) == 0  # what a naive sigmoid would divide by


@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_gradient_is_the_slope_of_the_loss(loss):
    rng = np.random.default_rng(0)
    logits, y = rng.normal(size=(3, 4)).astype(np.float32), np.array([0, 3, 1])
    _, gradient = loss_and_gradient(logits, y, loss)
    for at in np.ndindex(logits.shape):
        up, down = logits.astype(np.float64), logits.astype(np.float64)
        up[at] += 1e-5
        down[at] -= 1e-5
        slope = (loss_and_gradient(up, y, loss)[0] - loss_and_gradient(down, y, loss)[0]) / 2e-5
        assert gradient[at] == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_forward_backward_apply_is_a_step(loss):
    """The parts with this in between do what `step` does."""
    ((x, y),) = client_data()[0].draw(steps=1, batch_size=4, seed=3)
    whole, parts = (
        ENGINE.open(SPEC, params(), SubModel(), batch_size=4, optimizer=SGD(0.5), loss=loss)
        for _ in range(2)
    )
    value, entering = loss_and_gradient(parts.forward(x, training=True)["fc2"], y, loss)
    parts.apply(parts.backward({"fc2": entering}))
    assert whole.step(x, y) == pytest.approx(value, rel=1e-6)
    for name, expected in whole.params().items():
        np.testing.assert_allclose(parts.params()[name], expected, atol=1e-6)
