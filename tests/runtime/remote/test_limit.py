"""A memory limit: what is checked is what is held, of all open sessions together."""

from __future__ import annotations

import gc
import importlib.util
import sys
from itertools import product

import numpy as np
import pytest

from fedlean.core import SubModel
from fedlean.engine.memory import step_memory
from fedlean.engine.open import open_engine
from fedlean.engine.pieces import Piece
from fedlean.engine.protocol import SGD
from fedlean.layers import Conv2d, Flatten, GroupNorm, Linear, MaxPool2d, ReLU
from fedlean.models.conv2 import conv2
from fedlean.models.initialise import init_params
from fedlean.runtime.remote import room as rooms
from fedlean.runtime.remote.limit import LimitedEngine
from fedlean.runtime.remote.room import Room, TooLarge
from fedlean.spec import sequential
from fedlean.tree import kept_counts

MB = 10**6
PROCESS = 10 * MB  # what the process is said to hold beside its sessions
HUGE = 10**12
SPEC = sequential(
    (2, 8, 8),
    [
        ("conv1", Conv2d(8, 3, padding=1)),
        ("norm", GroupNorm(groups=2)),
        ("relu1", ReLU()),
        ("pool", MaxPool2d(2)),
        ("conv2", Conv2d(8, 3, padding=1)),
        ("relu2", ReLU()),
        ("flat", Flatten()),
        ("fc", Linear(10)),
    ],
)
PARAMS = init_params(SPEC, 0)
X = np.zeros((20, 2, 8, 8), np.float32)
Y = np.zeros(20, np.int64)
BEGINNING = frozenset({"conv1.weight", "conv1.bias", "norm.weight", "norm.bias"})

native = pytest.mark.skipif(
    importlib.util.find_spec("fedlean._native") is None,
    reason="the native engine is not built: there is no fedlean._native",
)


@pytest.fixture
def steady(monkeypatch):
    """The process beside its sessions is of one size."""
    monkeypatch.setattr(Room, "_process_bytes", lambda self: PROCESS)


def limited(limit_bytes=HUGE, threads=1):
    return LimitedEngine(open_engine("native", threads), limit_bytes)


PLAIN, WHOLE = SGD(0.1), SubModel()


def opened(engine, optimizer=PLAIN, sub_model=WHOLE):
    return engine.open(SPEC, PARAMS, sub_model, batch_size=20, optimizer=optimizer)


def masked(density=0.3):
    rng = np.random.default_rng(0)
    return {name: rng.random(SPEC.param_shapes[name]) < density for name in SPEC.prunable}


OPTIMIZERS = [
    SGD(0.1, momentum=momentum, proximal=proximal, clip_norm=clip, weight_decay=0.1)
    for momentum, proximal, clip in product((0.0, 0.9), (0.0, 0.1), (None, 1.0))
]


@native
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
@pytest.mark.parametrize("frozen", [frozenset(), BEGINNING], ids=["all", "frozen-beginning"])
def test_what_is_checked_is_the_plan_and_what_is_held(steady, optimizer, frozen):
    for masks, threads in product(({}, masked()), (1, 3)):
        sub_model = SubModel(masks=masks, frozen=frozen)
        engine = limited(threads=threads)
        session = opened(engine, optimizer, sub_model)
        plan = session.peak_memory_bytes
        assert engine.granted_bytes == plan
        session.step(X, Y)
        assert session.held_bytes == plan
        opened(limited(PROCESS + plan, threads), optimizer, sub_model)
        with pytest.raises(TooLarge, match="a training step needs"):
            opened(limited(PROCESS + plan - 1, threads), optimizer, sub_model)


@native
@pytest.mark.parametrize("clip", [None, 1.0])
def test_importance_and_a_training_forward_are_counted_as_they_are_held(steady, clip):
    """A batch of half the size first: it takes less, and changes nothing."""
    for masks, threads in product(({}, masked()), (1, 2)):
        engine = limited(threads=threads)
        session = opened(engine, SGD(0.1, clip_norm=clip), SubModel(masks=masks))
        session.step(X, Y)
        session.forward(X[:4], taps=["relu1"], training=True)
        session.forward(X, taps=["conv1", "pool"], training=True)
        assert engine.granted_bytes == session.held_bytes > session.peak_memory_bytes
        session.step(X, Y, importance=True)
        assert engine.granted_bytes == session.held_bytes


@native
def test_a_piece_is_counted_as_it_is_held(steady):
    """The most sums and the largest arena so far; more than fits is refused, and less goes on."""
    small, large = (Piece("conv1.bias", 0, 8),), (Piece("fc.weight", 2, 6), Piece("fc.bias", 0, 10))
    engine = limited()
    session = opened(engine, sub_model=SubModel(masks=masked()))
    plan = engine.granted_bytes
    for pieces in (small, large, small):
        session.step(X, Y, importance=pieces)
        assert plan < engine.granted_bytes == session.peak_memory_bytes >= session.held_bytes
    granted = engine.granted_bytes
    for limit, fits in ((granted, True), (granted - 1, False)):
        tight = opened(limited(PROCESS + limit), sub_model=SubModel(masks=masked()))
        tight.step(X, Y, importance=small)
        if fits:
            tight.step(X, Y, importance=large)
            continue
        with pytest.raises(TooLarge, match="Σ g² of a piece of the model needs"):
            tight.step(X, Y, importance=large)
        tight.step(X, Y, importance=small)
        with pytest.raises(ValueError, match="nowhere"):
            tight.step(X, Y, importance=(Piece("nowhere", 0, 1),))


@native
def test_a_training_forward_that_does_not_fit_is_refused_and_the_session_goes_on(steady):
    plan = opened(limited()).peak_memory_bytes
    session = opened(limited(PROCESS + plan + 1000))
    with pytest.raises(TooLarge, match="a forward pass that a backward may follow needs"):
        session.forward(X, taps=[node.name for node in SPEC.nodes], training=True)
    assert np.isfinite(session.step(X, Y))
    session.forward(X)  # in evaluation there is room enough


@native
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_descent_counts_what_it_holds(steady, clip):
    """Nothing beside its forward; with importance a sum for every parameter, or it is refused."""
    engine = limited()
    session = opened(engine, SGD(0.1, clip_norm=clip))
    given = {"fc": np.ones((20, 10), np.float32)}
    session.forward(X, training=True)
    before = engine.granted_bytes
    session.descend(given)
    assert engine.granted_bytes == session.held_bytes == before
    session.forward(X, training=True)
    session.descend(given, importance=True)
    assert engine.granted_bytes == session.held_bytes == before + 4 * SPEC.num_params
    tight = opened(limited(PROCESS + before), SGD(0.1, clip_norm=clip))
    tight.forward(X, training=True)
    with pytest.raises(TooLarge, match="Σ g² of all coordinates needs"):
        tight.descend(given, importance=True)
    tight.descend(given)


@native
def test_gradients_are_counted_with_those_that_are_returned(steady):
    """Dense ones: a float for each of SPEC's 2,042 parameters in the engine and in NumPy."""
    assert 4 * SPEC.num_params == 4 * (8 * 2 * 9 + 8 + 16 + 8 * 8 * 9 + 8 + 10 * 128 + 10)
    engine = limited()
    session = opened(engine)
    (logits,) = session.forward(X, training=True).values()
    before = engine.granted_bytes
    session.backward({"fc": np.ones_like(logits)}, dense=True)
    assert engine.granted_bytes - before == 2 * 4 * SPEC.num_params
    tight = opened(limited(PROCESS + before))
    tight.forward(X, training=True)
    with pytest.raises(TooLarge, match="a backward pass needs"):
        tight.backward({"fc": np.ones_like(logits)}, dense=True)


@native
def test_all_open_sessions_count_and_closed_ones_do_not(steady):
    plan = opened(limited()).peak_memory_bytes
    engine = limited(PROCESS + 2 * plan)
    first, second = opened(engine), opened(engine)
    assert engine.granted_bytes == 2 * plan
    with pytest.raises(TooLarge, match=r" 0\.000 MB are free"):
        opened(engine)
    with pytest.raises(TooLarge, match="a forward pass needs"):
        engine.open_forward(SPEC, PARAMS, SubModel(), batch_size=20)
    del first
    assert engine.granted_bytes == plan
    third = opened(engine)
    assert np.isfinite(third.step(X, Y) + second.step(X, Y))


@native
def test_taps_of_a_forward_session_are_counted(steady):
    engine = limited()
    session = engine.open_forward(SPEC, PARAMS, SubModel(), batch_size=20)
    plan = session.peak_memory_bytes
    assert engine.granted_bytes == plan
    every = [node.name for node in SPEC.nodes]
    session.forward(X, taps=every)
    assert engine.granted_bytes > plan
    tight = limited(PROCESS + plan).open_forward(SPEC, PARAMS, SubModel(), batch_size=20)
    with pytest.raises(TooLarge, match="a forward pass with taps needs"):
        tight.forward(X, taps=every)


@native
def test_as_many_directions_at_once_as_fit(steady):
    """The losses are the same, bit for bit; what does not fit alone is refused."""
    sub_model = SubModel()
    plans = [
        open_engine("native", 3)
        .open_forward(SPEC, PARAMS, sub_model, batch_size=20, directions_at_once=at_once)
        .peak_memory_bytes
        for at_once in (1, 2, 3)
    ]
    assert plans[0] < plans[1] < plans[2]
    x = np.random.default_rng(0).standard_normal(X.shape).astype(np.float32)
    losses = set()
    for limit, granted in ((plans[2], 3), (plans[2] - 1, 2), (plans[1] - 1, 1), (plans[0], 1)):
        engine = limited(PROCESS + limit, threads=3)
        session = engine.open_forward(SPEC, PARAMS, sub_model, batch_size=20, directions_at_once=8)
        assert engine.granted_bytes == session.peak_memory_bytes == plans[granted - 1]
        losses.add(session.losses_perturbed(x, Y, seed=1, ks=range(5), sigma=0.1).tobytes())
    assert len(losses) == 1
    with pytest.raises(TooLarge, match="a forward pass needs"):
        limited(PROCESS + plans[0] - 1, threads=3).open_forward(
            SPEC, PARAMS, sub_model, batch_size=20, directions_at_once=8
        )


@native
@pytest.mark.parametrize("wrong", [{"batch_size": "20"}, {"batch_size": 0}, {"loss": "mse"}])
def test_wrong_settings_are_refused_as_without_a_limit(steady, wrong):
    right = {"batch_size": 20}
    with pytest.raises(ValueError, match=next(iter(wrong))):
        limited().open(SPEC, PARAMS, WHOLE, optimizer=PLAIN, **{**right, **wrong})
    with pytest.raises(ValueError, match=next(iter(wrong))):
        limited().open_forward(SPEC, PARAMS, WHOLE, **{**right, **wrong})
    with pytest.raises(ValueError, match="directions_at_once"):
        limited().open_forward(SPEC, PARAMS, WHOLE, batch_size=20, directions_at_once=0)


@native
@pytest.mark.parametrize("wrong", [{"taps": ["nowhere"]}, {"x": np.float32(1)}, {"x": [1.0]}])
def test_what_the_engine_refuses_is_still_its_to_refuse(steady, wrong):
    session = opened(limited())
    with pytest.raises(ValueError, match=r"nowhere|x is a"):
        session.forward(**{"x": X, "training": True, **wrong})


@native
@pytest.mark.skipif(not rooms.STATM.is_file(), reason="reads what is resident, which is Linux's")
def test_the_process_is_not_taken_for_its_sessions():
    """Of Conv-2, 26 MB of weights: what is free is less by the plan, step or no step, and back."""
    spec = conv2((1, 28, 28), 62)
    params = init_params(spec, 0)
    x, y = np.zeros((20, 1, 28, 28), np.float32), np.zeros(20, np.int64)
    engine = limited()
    free = engine._room.free_bytes

    def open_one(momentum):
        sgd = SGD(0.1, momentum=momentum)
        return engine.open(spec, params, SubModel(), batch_size=20, optimizer=sgd)

    open_one(0.0).step(x, y)  # what a first step imports and allocates for good
    gc.collect()
    before = free()
    one, two = open_one(0.0), open_one(0.9)
    plans = one.peak_memory_bytes + two.peak_memory_bytes
    assert plans > 80 * MB
    assert abs(before - plans - free()) < 4 * MB
    one.step(x, y)
    two.step(x, y, importance=True)
    plans = one.peak_memory_bytes + two.peak_memory_bytes
    assert abs(before - plans - free()) < 4 * MB
    del one, two
    gc.collect()
    assert abs(before - free()) < 4 * MB


def test_an_engine_that_does_not_say_what_it_holds(monkeypatch):
    """As large as before it was opened, at least: 100 MB, of which a session of 30 may touch 20."""

    class Session:
        pass

    resident = [100 * MB]
    monkeypatch.setattr(rooms, "resident_bytes", lambda: resident[0])
    monkeypatch.setattr(rooms, "STATM", rooms.Path(__file__))
    room, session = Room(object(), 200 * MB), Session()
    assert room.free_bytes() == 100 * MB
    room.grant(session, 30 * MB)
    assert room.free_bytes() == 70 * MB
    resident[0] = 120 * MB
    assert room.free_bytes() == 70 * MB
    resident[0] = 140 * MB  # 10 MB are somebody else's
    assert room.free_bytes() == 60 * MB
    assert room.free_bytes(session) == 90 * MB
    del session
    gc.collect()
    resident[0] = 110 * MB
    assert room.free_bytes() == 90 * MB


def test_where_only_the_peak_is_known(monkeypatch):
    """A peak of 150 MB was of 100 and a session of 50, and stays when that is closed."""

    class Session:
        pass

    resident = [100 * MB]
    monkeypatch.setattr(rooms, "resident_bytes", lambda: resident[0])
    monkeypatch.setattr(rooms, "STATM", rooms.Path("/nowhere"))
    room, session = Room(object(), 200 * MB), Session()
    room.grant(session, 50 * MB)
    resident[0] = 150 * MB
    assert room.free_bytes() == 50 * MB
    del session
    gc.collect()
    assert room.free_bytes() == 100 * MB


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it is the peak")
def test_resident_memory_is_without_what_was_freed():
    before = rooms.resident_bytes()
    blocks = [bytearray(60_000) for _ in range(500)]  # small enough for the heap
    assert rooms.resident_bytes() - before > 25 * MB
    del blocks
    assert rooms.resident_bytes() - before < 3 * MB


# A device of a fleet


def emulated(limit_bytes, engine, dense_way=True):
    return LimitedEngine(engine, limit_bytes, emulated=True, dense_way=dense_way)


@native
@pytest.mark.parametrize("name", ["native", "torch"])
def test_an_emulated_device_has_the_native_plan_of_one_thread_and_no_process(name):
    """Whichever engine computes here, on however many threads."""
    for masks in ({}, masked(0.1)):
        sub_model = SubModel(masks=masks)
        plan = opened(limited(), PLAIN, sub_model).peak_memory_bytes
        engine = open_engine(name, 2)
        opened(emulated(plan, engine), PLAIN, sub_model).step(X, Y)
        with pytest.raises(TooLarge, match="give the device more in --fleet, or train a smaller"):
            opened(emulated(plan - 1, engine), PLAIN, sub_model)
        forward = limited().open_forward(SPEC, PARAMS, sub_model, batch_size=20)
        least = forward.peak_memory_bytes
        session = emulated(least, engine).open_forward(
            SPEC, PARAMS, sub_model, batch_size=20, directions_at_once=2
        )
        session.loss(X, Y)
        with pytest.raises(TooLarge, match="a forward pass needs"):
            emulated(least - 1, engine).open_forward(SPEC, PARAMS, sub_model, batch_size=20)


@native
def test_an_emulated_device_may_compute_densely_where_that_takes_less():
    """Half of a convolution's weights with their places in two orders take more than all do."""
    conv = Conv2d(64, 3, padding=1)
    layer = sequential(
        (64, 4, 4), [("a", conv), ("b", conv), ("flat", Flatten()), ("c", Linear(3))]
    )
    rng = np.random.default_rng(0)
    values = init_params(layer, 0)
    dense = step_memory(layer, {}, batch_size=1).peak_bytes
    sub_model = SubModel(masks={"b.weight": rng.random((64, 64, 3, 3)) < 0.5})
    kept = kept_counts(sub_model.masks)
    sparse = step_memory(layer, kept, batch_size=1).peak_bytes
    assert sparse > dense
    engine = open_engine("native", 1)

    def open_one(limit_bytes, dense_way=True):
        return emulated(limit_bytes, engine, dense_way).open(
            layer, values, sub_model, batch_size=1, optimizer=PLAIN
        )

    x, y = np.zeros((1, 64, 4, 4), np.float32), np.zeros(1, np.int64)
    open_one(dense).step(x, y)
    with pytest.raises(TooLarge):
        open_one(dense - 1)
    open_one(sparse, dense_way=False).step(x, y)
    with pytest.raises(TooLarge):
        open_one(sparse - 1, dense_way=False)
    important = step_memory(layer, {}, batch_size=1, importance=True).peak_bytes
    open_one(important).step(x, y, importance=True)
    with pytest.raises(TooLarge, match="Σ g² of all coordinates"):
        open_one(important - 1).step(x, y, importance=True)
