"""Training on activations that were computed once, against computing them at every step."""

from __future__ import annotations

import numpy as np
import pytest
from federation import ENGINE, SPEC, client_data, params, same

from fedlean.core import SubModel
from fedlean.engine.protocol import SGD
from fedlean.freezing.beginning import frozen_beginning, split
from fedlean.freezing.cached import cache
from fedlean.freezing.session import BeginningSession, open_rest
from fedlean.train.sgd import local_sgd

FROZEN = frozenset({"conv.weight", "conv.bias"})
SUB_MODEL = SubModel(frozen=FROZEN)
CUT = split(SPEC, FROZEN)  # at "flat"
DATA = client_data()[1]  # 35 examples


def cached(folder=None, micro_batch=4, data=DATA):
    return cache(ENGINE, CUT, params(), SUB_MODEL, data, micro_batch=micro_batch, folder=folder)


def test_every_example_once_in_the_order_of_the_data():
    """35 examples in passes of 4: the last three places of the last pass go on into another."""
    assert frozen_beginning(SPEC, FROZEN)[-1] == CUT.name == "flat"
    session = ENGINE.open(SPEC, params(), SubModel(), batch_size=35, optimizer=SGD(0.1))
    images = DATA.dataset.normalise(DATA.dataset.x_train[DATA.indices])
    expected = session.forward(images, taps=["flat"])["flat"]
    found = cached()
    assert found.num_examples == 35 and found.features.shape == (35, 64)
    np.testing.assert_array_equal(found.y, DATA.dataset.y_train[DATA.indices])
    np.testing.assert_allclose(found.features, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("given", [{}, {"examples": 7}, {"examples": 99}])
def test_draws_are_those_of_the_data(given):
    """Passes that wrap around, and a restriction to some examples."""
    drawn = cached().draw(steps=9, batch_size=8, seed=5, **given)
    pairs = zip(drawn, DATA.draw(steps=9, batch_size=8, seed=5, **given), strict=True)
    session = ENGINE.open(SPEC, params(), SubModel(), batch_size=8, optimizer=SGD(0.1))
    for (features, y), (x, labels) in pairs:
        np.testing.assert_array_equal(y, labels)
        np.testing.assert_allclose(features, session.forward(x, taps=["flat"])["flat"], rtol=1e-6)
        assert features.flags.c_contiguous and features.dtype == np.float32


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("micro_batch", [1, 16, 64])
def test_training_on_it_is_training_behind_the_beginning(tmp_path, on_disk, micro_batch):
    sgd = SGD(0.1, 0.9)
    found = cached(tmp_path if on_disk else None, micro_batch)
    rest = open_rest(ENGINE, CUT, params(), SUB_MODEL, batch_size=8, optimizer=sgd)
    both = BeginningSession(
        ENGINE, SPEC, params(), SUB_MODEL, batch_size=8, micro_batch=4, optimizer=sgd
    )
    loss = local_sgd(rest, found, steps=6, batch_size=8, seed=3)
    expected = local_sgd(both, DATA, steps=6, batch_size=8, seed=3)
    assert loss == expected
    assert same({**params(), **rest.params()}, both.params())


def test_a_file_is_gone_with_its_holder(tmp_path):
    found = cached(tmp_path)
    assert isinstance(found.features, np.memmap) and not list(tmp_path.iterdir())
    assert found.features_bytes == 4 * 35 * 64 == found.features.nbytes
    np.testing.assert_array_equal(found.features, cached().features)


def test_the_session_of_the_beginning_is_closed():
    held = []

    class Remembering:
        name, arithmetic = ENGINE.name, ENGINE.arithmetic

        def open_forward(self, *given, **named):
            import weakref

            session = ENGINE.open_forward(*given, **named)
            held.append((named["batch_size"], weakref.ref(session)))
            return session

    cache(Remembering(), CUT, params(), SUB_MODEL, DATA, micro_batch=99)
    ((size, session),) = held
    assert size == 35 and session() is None


def test_no_micro_batch():
    with pytest.raises(ValueError, match="micro_batch must be an integer"):
        cached(micro_batch=0)
