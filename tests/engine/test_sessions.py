"""What a session owns, copies and repeats."""

from __future__ import annotations

import numpy as np
import pytest
from engine.cases import (
    CONV,
    MLP,
    PLAIN,
    batch,
    masks_of,
    opened,
    start,
)
from federation import same

from fedlean.core import SubModel
from fedlean.engine.protocol import SGD


@pytest.mark.parametrize("size", [1, 3, 7])
def test_batches_of_any_size_up_to_batch_size(engine, size):
    """Images have many values per channel, so BatchNorm trains on one example too."""
    session, (x, y) = opened(engine, CONV, masks=masks_of(CONV), batch_size=7), batch(CONV, size)
    assert np.isfinite(session.step(x, y, importance=True))
    assert np.isfinite(session.loss(x, y))
    assert session.forward(x)["fc"].shape == (size, 3)
    assert all(np.isfinite(value).all() for value in session.params().values())


def test_sessions_own_their_arrays(engine):
    params, (x, y) = start(CONV), batch(CONV)
    kept = {name: value.copy() for name, value in params.items()}
    session = opened(engine, CONV, params)
    session.step(x, y)
    assert same(params, kept)  # training does not write into the caller's arrays
    for value in params.values():
        value[:] = 77
    session.load(kept)
    assert same(session.params(), kept)
    session.load(params)
    for value in params.values():
        value[:] = 5
    assert all((value == 77).all() for value in session.params().values())


def test_params_are_copies(engine):
    session = opened(engine, CONV)
    held = session.params()
    expected = {name: value.copy() for name, value in held.items()}
    for value in held.values():
        value[:] = 9
    assert same(session.params(), expected)
    first = session.params()
    session.step(*batch(CONV))
    assert same(first, expected)


def test_steps_do_not_write_into_the_batch(engine):
    session, (x, y) = opened(engine, CONV, loss="bce"), batch(CONV)
    before = x.copy(), y.copy()
    session.step(x, y, importance=True)
    assert same((x, y), before)


def test_read_only_arrays_are_taken(engine):
    """As arrays decoded from bytes or mapped from a file are."""
    params, (x, y) = start(PLAIN), batch(PLAIN)
    masks = masks_of(PLAIN)
    gradient = np.ones((5, 3), np.float32)
    for array in (*params.values(), *masks.values(), x, y, gradient):
        array.setflags(write=False)
    session = opened(engine, PLAIN, params, masks=masks)
    session.step(x, y)
    session.loss(x, y)
    session.forward(x, training=True)
    session.backward({"fc2": gradient})
    session.apply(params)
    session.forward(x, training=True)
    session.descend({"fc2": gradient})


def test_sessions_do_not_share_state(engine):
    engine, params = engine, start(MLP)
    one, two = (
        engine.open(MLP, params, SubModel(), batch_size=5, optimizer=SGD(0.1, 0.9))
        for _ in range(2)
    )
    one.step(*batch(MLP))
    assert same(two.params(), params)


def test_training_repeats_bit_for_bit(engine):
    ends = []
    for _ in range(2):
        session = opened(engine, CONV, masks=masks_of(CONV), sgd=SGD(0.1, 0.9))
        for seed in range(3):
            session.step(*batch(CONV, seed=seed))
        ends.append(session.params())
    assert same(*ends)
