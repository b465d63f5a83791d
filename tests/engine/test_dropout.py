"""What a Dropout drops follows from the session's seed, the pass and the layer alone."""

from __future__ import annotations

import numpy as np
import pytest
from engine.cases import batch, start

from fedlean.core import ClientTask, SubModel
from fedlean.engine.open import open_engine
from fedlean.engine.protocol import SGD
from fedlean.layers import Conv2d, Dropout, Flatten, GlobalAvgPool, Linear, ReLU
from fedlean.spec import sequential
from fedlean.train.local_sgd import open_session

SPEC = sequential(
    (2, 9, 8),
    [
        ("conv", Conv2d(20, 3, padding=1)),
        ("channels", Dropout(0.5, channels=True)),
        ("relu", ReLU()),
        ("pool", GlobalAvgPool()),
        ("drop", Dropout(0.25)),
        ("fc", Linear(3)),
    ],
)
FACTORS = sequential((40, 5, 5), [("drop", Dropout(0.3)), ("flat", Flatten()), ("fc", Linear(2))])
CHANNELS = sequential(
    (40, 5, 5), [("drop", Dropout(0.3, channels=True)), ("flat", Flatten()), ("fc", Linear(2))]
)


def opened(engine, spec=SPEC, *, seed=0, size=33):
    return engine.open(
        spec, start(spec), SubModel(), batch_size=size, optimizer=SGD(0.1), seed=seed
    )


def losses(session, steps=3):
    x, y = batch(SPEC, 33)
    return [session.step(x, y) for _ in range(steps)]


def test_a_seed_is_all_that_decides(engine):
    first = losses(opened(engine, seed=5))
    assert losses(opened(engine, seed=5)) == first
    assert losses(opened(engine, seed=6))[0] != first[0]


def test_every_pass_drops_others(engine):
    x, _ = batch(FACTORS, 4)
    session = opened(engine, FACTORS, size=4)
    first, second = (session.forward(x, taps=["drop"], training=True)["drop"] for _ in range(2))
    assert ((first == 0) != (second == 0)).mean() > 0.2


@pytest.mark.parametrize("spec", [FACTORS, CHANNELS])
def test_kept_and_dropped(engine, spec):
    """0 or x/(1 - p), as often as it should be, and alike over a channel where it is whole."""
    x = np.ones((33, 40, 5, 5), np.float32)
    made = opened(engine, spec).forward(x, taps=["drop"], training=True)["drop"]
    assert set(np.unique(made)) == {np.float32(0), np.float32(1 / (1 - 19661 / 65536))}
    assert abs((made == 0).mean() - 0.3) < 0.05
    whole = (made == made[:, :, :1, :1]).all()
    assert whole == (spec is CHANNELS)
    assert not (made[0] == made[1]).all() and not (made[:, 0] == made[:, 1]).all()


def test_nothing_is_dropped_in_evaluation(engine):
    x, y = batch(FACTORS, 4)
    session = opened(engine, FACTORS, size=4)
    assert (session.forward(x, taps=["drop"])["drop"] == x).all()
    assert session.loss(x, y) == session.loss(x, y)
    forward = engine.open_forward(FACTORS, start(FACTORS), SubModel(), batch_size=4)
    assert (forward.forward(x, taps=["drop"])["drop"] == x).all()


def test_threads_drop_the_same(has_native):
    one, three = (losses(opened(open_engine("native", threads), seed=2)) for threads in (1, 3))
    assert one == three


def test_backward_drops_what_forward_dropped(engine):
    x = np.ones((5, 40, 5, 5), np.float32)
    spec = sequential((40, 5, 5), [("stem", Conv2d(40, 1, groups=40)), ("drop", Dropout(0.5))])
    session = opened(engine, spec, size=5)
    made = session.forward(x, taps=["stem"], training=True)
    gradients = session.backward({"drop": np.ones_like(made["drop"])})
    kept = np.divide(made["drop"], made["stem"])  # 0 or 2
    np.testing.assert_allclose(gradients["stem.bias"], kept.sum((0, 2, 3)), rtol=1e-5)


def test_a_task_gives_its_seed(engine):
    """So a round that is run again drops the same, and the next one, or another client, others."""
    hparams = {"batch_size": 33, "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "loss": "ce"}

    def of(seed):
        task = ClientTask(1, "train", 0, seed, SPEC, start(SPEC), SubModel(), hparams)
        return losses(open_session(task, engine))

    assert of(3) == of(3) and of(3)[0] != of(4)[0]
