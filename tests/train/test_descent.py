"""Local descent on losses of one's own, against steps of the engine and against its parts."""

from __future__ import annotations

from functools import partial

import federation
import numpy as np
import pytest
from federation import ENGINE, SPEC, client_data, params, same

from fedlean.core import SubModel
from fedlean.engine.protocol import SGD
from fedlean.layers import Flatten, Linear
from fedlean.models.initialise import init_params
from fedlean.spec import INPUT, Node
from fedlean.submodels.stages import graft
from fedlean.train.descent import local_descent
from fedlean.train.losses import distillation, exits_cross_entropy, mutual_distillation
from fedlean.train.sgd import local_sgd

EXIT = [Node("exit_flat", Flatten(), (INPUT,)), Node("exit", Linear(3), ("exit_flat",))]
EXITS = graft(SPEC, EXIT, at="pool")
SGD_ = SGD(0.1, 0.9)


def opened(spec=SPEC, given=None):
    start = init_params(spec, 1) if given is None else given
    return ENGINE.open(spec, start, SubModel(), batch_size=8, optimizer=SGD_)


def test_cross_entropy_is_local_sgd():
    data = client_data()[1]
    own, engine = opened(given=params()), opened(given=params())
    loss = partial(exits_cross_entropy, exits=["fc2"])
    found = local_descent(own, data, loss, steps=5, batch_size=8, seed=3)
    expected = local_sgd(engine, data, steps=5, batch_size=8, seed=3)
    assert found == pytest.approx(expected, rel=1e-5)
    for name, value in engine.params().items():
        np.testing.assert_allclose(own.params()[name], value, atol=1e-5)


def test_exits_in_steps_by_hand():
    data = client_data()[0]
    looped, by_hand = opened(EXITS), opened(EXITS)
    loss = partial(mutual_distillation, exits=["exit", "fc2"])
    given = {"steps": 4, "batch_size": 8, "seed": 3, "examples": 9}
    found = local_descent(looped, data, loss, taps=["exit"], **given)
    values = []
    for x, y in data.draw(**given):
        value, gradients = loss(by_hand.forward(x, taps=["exit"], training=True), y)
        by_hand.descend(gradients)
        values.append(value)
    assert found == pytest.approx(np.mean(values)) and same(looped.params(), by_hand.params())
    first = opened(EXITS).params()
    assert not np.array_equal(looped.params()["exit.weight"], first["exit.weight"])


def test_a_teacher_beside():
    """The student comes to say what the teacher says, and no gradient goes to the teacher."""
    data = client_data()[0]
    teacher = ENGINE.open_forward(SPEC, params(), SubModel(), batch_size=8)
    student = opened()
    loss = partial(distillation, student="fc2", teacher="said")

    def said(x):
        return {"said": teacher.forward(x)["fc2"]}

    values = [
        local_descent(student, data, loss, steps=10, batch_size=8, seed=3, beside=said)
        for _ in range(8)
    ]
    assert values[-1] < 0.5 * values[0]
    assert same(teacher.params(), params())
    with pytest.raises(ValueError, match="'fc2' is the name of a tap and of what comes beside"):
        local_descent(
            student, data, loss, steps=1, batch_size=8, seed=3, beside=lambda x: {"fc2": x}
        )


def test_no_steps():
    loss = partial(exits_cross_entropy, exits=["fc2"])
    session = opened(given=federation.params())
    found = local_descent(session, client_data()[0], loss, steps=0, batch_size=8, seed=1)
    assert found == 0.0 and same(session.params(), federation.params())
