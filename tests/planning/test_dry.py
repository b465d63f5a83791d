"""The engine that computes nothing gives what its protocol promises, in shape and form."""

from __future__ import annotations

import federation
import numpy as np
import pytest

from fedlean import wire
from fedlean.core import ClientTask, ClientUpdate, Statistic, SubModel
from fedlean.engine.protocol import SGD
from fedlean.planning.dry import LOSS, DryBatches, DryEngine
from fedlean.tree import pack

SPEC, PARAMS = federation.SPEC, federation.params()
MASKS = {"fc1.weight": np.arange(12 * 64).reshape(12, 64) % 3 == 0}
SUB = SubModel(masks=MASKS, frozen=frozenset({"conv.weight"}))
X, Y = np.zeros((5, 1, 8, 8), np.float32), np.zeros(5, np.int64)


def opened(params=PARAMS, sub_model=SUB, engine=None):
    return (engine or DryEngine()).open(SPEC, params, sub_model, batch_size=5, optimizer=SGD(0.1))


@pytest.mark.parametrize("packed_in", [False, True])
@pytest.mark.parametrize("packed_out", [False, True])
def test_parameters_are_those_loaded_and_pruned_ones_are_zero(packed_in, packed_out):
    given = pack(PARAMS, MASKS) if packed_in else PARAMS
    session = opened(given)
    session.step(X, Y)
    found = session.params(packed=packed_out)
    for name, value in PARAMS.items():
        mask = MASKS.get(name)
        expected = value if mask is None else np.where(mask, value, np.float32(0))
        if packed_out and mask is not None:
            expected = value[mask]
        assert found[name].dtype == np.float32
        assert np.array_equal(found[name], expected), name


def test_what_it_gives_is_the_callers():
    session = opened()
    for give in (session.params, session.importance, lambda: session.backward({}, dense=True)):
        before = {name: value.copy() for name, value in give().items()}
        for value in give().values():
            value += 1
        assert all(np.array_equal(value, before[name]) for name, value in give().items())


def test_sums_of_squares_are_squares_of_the_gradients():
    session = opened(sub_model=SubModel())
    gradients, sums = session.backward({}, dense=True), session.importance()
    assert all(np.array_equal(sums[name], values**2) for name, values in gradients.items())


def test_the_shapes_are_those_of_the_native_engine(has_native):
    real = federation.engine_for(SPEC, "native", 1)[0].open(
        SPEC, PARAMS, SUB, batch_size=5, optimizer=SGD(0.1)
    )
    dry = opened()
    assert isinstance(dry.step(X, Y, importance=True), float)
    real.step(X, Y, importance=True)
    assert dry.peak_memory_bytes == real.peak_memory_bytes
    forwards = [s.forward(X, taps=["relu1"], training=True) for s in (real, dry)]
    output = {"fc2": np.ones((5, 3), np.float32)}
    pairs = [
        (real.params(), dry.params()),
        (real.params(packed=True), dry.params(packed=True)),
        (real.importance(), dry.importance()),
        tuple(forwards),
    ]
    for dense in (False, True):
        real.forward(X, training=True)
        pairs.append((real.backward(output, dense=dense), dry.backward(output, dense=dense)))
    for left, right in pairs:
        assert {n: (v.shape, v.dtype) for n, v in left.items()} == {
            n: (v.shape, v.dtype) for n, v in right.items()
        }
    sparse = dry.backward(output)["fc1.weight"]
    assert not sparse[~MASKS["fc1.weight"]].any() and (sparse[MASKS["fc1.weight"]] > 0).all()


def test_forward_sessions_plan_as_the_native_engine(has_native):
    engine = federation.engine_for(SPEC, "native", 1)[0]
    real, dry = (e.open_forward(SPEC, PARAMS, SUB, batch_size=5) for e in (engine, DryEngine()))
    assert dry.peak_memory_bytes == real.peak_memory_bytes
    found = dry.losses_perturbed(X, Y, seed=3, ks=range(4), sigma=1e-3)
    assert found.shape == (4,) and found.dtype == np.float64 and len(set(found)) == 4
    assert dry.loss(X, Y) == LOSS


def test_no_lossless_code_shortens_its_statistics():
    sums = DryEngine().generic(SPEC)
    task = ClientTask(1, "train", 0, 0, SPEC, PARAMS, SubModel(), {})
    plain, with_sums = (
        ClientUpdate(0, 1, PARAMS, SubModel(), statistics)
        for statistics in ({}, {"g": Statistic(sums, "mean")})
    )
    more = wire.update_bytes(with_sums, task) - wire.update_bytes(plain, task)
    assert more >= sum(values.nbytes for values in sums.values())
    assert all((values > 0).all() for values in sums.values())


def test_bad_calls_are_refused():
    with pytest.raises(ValueError, match="batch_size"):
        DryEngine().open(SPEC, PARAMS, SubModel(), batch_size=0, optimizer=SGD(0.1))
    with pytest.raises(ValueError, match="mask 'nope'"):
        opened(sub_model=SubModel(masks={"nope": np.ones(3, bool)}))
    with pytest.raises(ValueError, match="no layer named 'nope'"):
        opened().forward(X, taps=["nope"])
    with pytest.raises(ValueError, match="'nope' is of no trainable"):
        opened().apply({"nope": X})


def test_batches_are_as_many_as_are_drawn_and_never_recognised():
    batches = DryBatches((1, 8, 8), 3, 40)
    drawn = list(batches.draw(steps=7, batch_size=5, seed=0))
    assert len(drawn) == 7 and not list(batches.draw(steps=0, batch_size=5, seed=0))
    x, y = drawn[0]
    assert x.shape == (5, 1, 8, 8) and x.dtype == np.float32
    assert y.dtype == np.int64 and (opened().forward(x)["fc2"].argmax(1) != y).all()
    one = DryBatches((1, 8, 8), 3, 40, one=True)
    assert [len(list(one.draw(steps=steps, batch_size=5, seed=0))) for steps in (0, 7)] == [0, 1]


def test_sums_of_pieces_have_their_rows(has_native):
    pieces = (("fc1.weight", 2, 3), ("fc1.bias", 0, 12))
    real = federation.engine_for(SPEC, "native", 1)[0].open(
        SPEC, PARAMS, SUB, batch_size=5, optimizer=SGD(0.1)
    )
    dry = opened()
    for session in (real, dry):
        session.step(X, Y, importance=pieces)
    shapes = [{n: v.shape for n, v in s.importance().items()} for s in (real, dry)]
    assert shapes[0] == shapes[1]
    assert real.peak_memory_bytes == dry.peak_memory_bytes
