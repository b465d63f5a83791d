"""Local SGD against a session and batches that write down what they are asked."""

from __future__ import annotations

import federation
import numpy as np

from fedlean.core import SubModel
from fedlean.engine.protocol import SGD
from fedlean.train.sgd import local_sgd


class Drawn:
    num_examples = 10

    def __init__(self):
        self.asked = []

    def draw(self, *, steps, batch_size, seed, examples=None):
        self.asked.append((steps, batch_size, seed, examples))
        for step in range(steps):
            yield np.full((batch_size, 1), step, np.float32), np.full(batch_size, step, np.int64)


class Stepped:
    """Losses 0, 1, 2, ..."""

    def __init__(self):
        self.calls = []

    def step(self, x, y, *, importance=False):
        self.calls.append((x.shape, int(x[0, 0]), int(y[0]), importance))
        return float(len(self.calls) - 1)


def test_calls_and_mean_loss():
    session, batches = Stepped(), Drawn()
    mean = local_sgd(session, batches, steps=4, batch_size=3, seed=7)
    assert batches.asked == [(4, 3, 7, None)]
    assert session.calls == [((3, 1), i, i, False) for i in range(4)]
    assert mean == 1.5 and type(mean) is float


def test_importance_and_examples_are_passed_on():
    session, batches = Stepped(), Drawn()
    local_sgd(session, batches, steps=2, batch_size=5, seed=1, importance=True, examples=6)
    assert batches.asked == [(2, 5, 1, 6)]
    assert [call[-1] for call in session.calls] == [True, True]


def test_no_steps():
    session = Stepped()
    loss = local_sgd(session, Drawn(), steps=0, batch_size=5, seed=1)
    assert loss == 0.0 and type(loss) is float
    assert session.calls == []


def open_session():
    return federation.ENGINE.open(
        federation.SPEC, federation.params(), SubModel(), batch_size=8, optimizer=SGD(0.05)
    )


def test_equals_steps_by_hand():
    data = federation.client_data()[1]
    session, by_hand = open_session(), open_session()
    mean = local_sgd(session, data, steps=5, batch_size=8, seed=3)
    losses = [by_hand.step(x, y) for x, y in data.draw(steps=5, batch_size=8, seed=3)]
    assert mean == float(np.mean(losses))
    assert federation.same(session.params(), by_hand.params())


def test_importance_leaves_training_as_it_is():
    data = federation.client_data()[0]
    with_importance, plain = open_session(), open_session()
    local_sgd(with_importance, data, steps=4, batch_size=8, seed=3, importance=True)
    local_sgd(plain, data, steps=4, batch_size=8, seed=3)
    assert federation.same(with_importance.params(), plain.params())
    assert all((sums >= 0).all() for sums in with_importance.importance().values())
    assert sum(sums.sum() for sums in with_importance.importance().values()) > 0
    assert sum(sums.sum() for sums in plain.importance().values()) == 0
