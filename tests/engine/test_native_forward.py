"""The native forward-only path: threads, directions at once, sessions that follow one another."""

from __future__ import annotations

import numpy as np
import pytest
from engine.cases import BLOCK, NET, batch, masks_of, start

from fedlean.core import SubModel
from fedlean.engine.open import open_engine
from fedlean.engine.protocol import SGD
from fedlean.layers import Conv2d, GlobalAvgPool, Linear, ReLU
from fedlean.models.resnet import resnet8
from fedlean.spec import sequential

pytestmark = pytest.mark.usefixtures("has_native")

RESNET = resnet8((3, 8, 8), 10)
WIDE_CONV = sequential(
    (40, 6, 5),
    [("conv", Conv2d(221, 3, 2, 1)), ("pool", GlobalAvgPool()), ("fc", Linear(5))],
)
WIDE = sequential((900,), [("fc1", Linear(201)), ("relu", ReLU()), ("fc2", Linear(10))])
SPECS = {"net": NET, "block": BLOCK, "resnet8": RESNET, "wide": WIDE}
SPECS |= {"wide conv": WIDE_CONV}


def opened(engine, spec, *, masks=None, batch_size=37, params=None, **settings):
    params = start(spec) if params is None else params
    sub_model = SubModel(masks=masks or {})
    return engine.open_forward(spec, params, sub_model, batch_size=batch_size, **settings)


@pytest.mark.parametrize("density", [1.0, 0.5])
@pytest.mark.parametrize("kind", ["gaussian", "sign", "rank1"])
@pytest.mark.parametrize("model", SPECS)
def test_same_bits_at_any_number_of_threads_and_directions(model, kind, density):
    spec = SPECS[model]
    masks = masks_of(spec, density) if density < 1 else {}
    x, y = batch(spec, 37)
    results = []
    for threads, at_once in ((1, 1), (1, 4), (2, 1), (3, 2), (3, 3), (2, 5)):
        session = opened(
            open_engine("native", threads), spec, masks=masks, directions_at_once=at_once
        )
        losses = session.losses_perturbed(x, y, seed=1, ks=range(7), sigma=0.1, kind=kind)
        results.append((session.loss(x, y), losses.tolist(), session.loss(x[:3], y[:3])))
    assert all(result == results[0] for result in results)


def test_groups_of_panels_change_nothing():
    """One more than fits the panels that run at once, and batches below batch_size."""
    narrow, wide = (opened(open_engine("native", 1), RESNET, batch_size=size) for size in (16, 100))
    x, y = batch(RESNET, 100)
    whole = wide.losses_perturbed(x, y, seed=0, ks=[4], sigma=0.1)[0]
    parts = [slice(i, i + 16) for i in range(0, 100, 16)]
    sums = [
        narrow.losses_perturbed(x[p], y[p], seed=0, ks=[4], sigma=0.1)[0] * len(y[p]) for p in parts
    ]
    assert whole == pytest.approx(sum(sums) / 100, rel=1e-6)
    x, y = x[:5], y[:5]
    assert wide.loss(x, y) == narrow.loss(x, y)


def test_a_session_leaves_nothing_to_the_next():
    """Its patterns and memory serve again, for evaluation only."""
    engine, fresh = (open_engine("native", 1) for _ in range(2))
    masks, (x, y) = masks_of(NET, 0.3), batch(NET, 5)
    native = None
    for seed in range(3):
        params = start(NET, seed)
        session = opened(engine, NET, masks=masks, params=params)
        other = opened(fresh, NET, masks=masks, params=params)
        assert native in (None, session.native)
        settings = {"seed": seed, "ks": [0, 1], "sigma": 0.1}
        got = session.losses_perturbed(x, y, **settings)
        assert got.tolist() == other.losses_perturbed(x, y, **settings).tolist()
        assert session.held_bytes == session.peak_memory_bytes
        native = session.native
        fresh = open_engine("native", 1)
        del session
    training = engine.open(
        NET, start(NET), SubModel(masks=masks), batch_size=37, optimizer=SGD(0.1)
    )
    assert np.isfinite(training.step(x, y))


def test_a_held_session_is_not_shared():
    engine = open_engine("native", 1)
    (x, y), first = batch(NET), opened(engine, NET)
    expected = first.loss(x, y)
    second = opened(engine, NET, params=start(NET, 9))
    assert first.loss(x, y) == expected != second.loss(x, y)


def test_taps_take_their_memory_for_a_moment():
    session, (x, y) = opened(open_engine("native", 1), RESNET), batch(RESNET, 37)
    session.loss(x, y)
    planned = session.peak_memory_bytes
    assert session.held_bytes == planned
    session.forward(x, taps=list(RESNET.by_name))
    assert session.held_bytes < planned
    session.loss(x, y)
    assert session.held_bytes == planned
