"""The native engine among threads and processes, and against wrong calls of its module."""

import os
import signal
import threading

import numpy as np
import pytest

from fedlean.core import SubModel
from fedlean.engine.protocol import SGD
from fedlean.layers import Flatten, GroupNorm, Linear, ReLU
from fedlean.models.initialise import init_params
from fedlean.models.lenet300 import lenet300
from fedlean.spec import INPUT, ModelSpec, Node, sequential

native = pytest.importorskip("fedlean.engine.native")
SPEC = lenet300((1, 8, 8), 10)


def _batch(seed: int, size: int = 20) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((size, 1, 8, 8), dtype=np.float32), rng.integers(0, 10, size)


def _open(engine, seed: int = 0):
    params = init_params(SPEC, seed)
    return engine.open(SPEC, params, SubModel(), batch_size=20, optimizer=SGD(0.1, 0.9))


def _steps(session, seed: int, count: int = 30) -> list[float]:
    x, y = _batch(seed)
    return [session.step(x, y) for _ in range(count)]


def test_two_threads_with_a_session_each_do_not_disturb_each_other():
    engine = native.NativeEngine(2)
    expected = [_steps(_open(engine, seed), seed) for seed in range(2)]
    got: dict[int, list[float]] = {}

    def work(seed: int) -> None:
        got[seed] = _steps(_open(engine, seed), seed)

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert [got.get(seed) for seed in range(2)] == expected


def test_two_threads_with_one_session_take_turns():
    session = _open(native.NativeEngine(2))
    x, y = _batch(0)
    losses: list[float] = []

    def work() -> None:
        losses.extend(session.step(x, y) for _ in range(30))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert sorted(losses, reverse=True) == _steps(_open(native.NativeEngine(1)), 0, 60)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_an_engine_works_on_in_a_forked_child():
    engine = native.NativeEngine(2)
    session = _open(engine)
    expected = _steps(_open(engine), 0, 5)
    child = os.fork()
    if child == 0:  # threads do not survive a fork: the pool must start new ones, and end them
        signal.alarm(20)
        right = _steps(session, 0, 5) == expected
        del session, engine
        os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("threads", [0, -5, 1 << 20, True, 2.0])
def test_a_number_of_threads_that_makes_no_sense_is_refused(threads):
    with pytest.raises(ValueError, match=r"threads must be an integer from 1 to 1024"):
        native.NativeEngine(threads)


@pytest.mark.parametrize("clip_norm", [None, 1e6])
def test_a_branch_that_reaches_no_loss_decays_all_the_same(clip_norm):
    nodes = (
        Node("side", Linear(3, bias=False), (INPUT,)),
        Node("main", Linear(2, bias=False), (INPUT,)),
    )
    spec = ModelSpec((4,), nodes)
    params = {name: np.ones(shape, np.float32) for name, shape in spec.tensor_shapes.items()}
    rule = SGD(0.5, weight_decay=0.5, clip_norm=clip_norm)
    session = native.NativeEngine().open(spec, params, SubModel(), batch_size=2, optimizer=rule)
    session.step(np.ones((2, 4), np.float32), np.array([0, 1]))
    assert np.array_equal(session.params()["side.weight"], np.full((3, 4), 0.75, np.float32))


def test_idle_lanes_overflow_only_with_an_example():
    """3 examples take 4 lanes; an image of zeros in the fourth would be the only one to differ."""
    spec = sequential(
        (8,), [("a", Linear(8)), ("n", GroupNorm(groups=1)), ("r", ReLU()), ("b", Linear(2))]
    )
    params = init_params(spec, 0)
    session = native.NativeEngine().open(spec, params, SubModel(), batch_size=3, optimizer=SGD(0.1))
    x = np.full((3, 8), 1e30, np.float32)
    session.step(x, np.array([0, 1, 0]))
    assert all(np.isfinite(value).all() for value in session.params().values())


def test_group_norm_far_from_zero_is_exact():
    """Mean 1000 times the deviation: x - mean must come before the products."""
    torch = pytest.importorskip("torch")
    spec = sequential((4, 4, 4), [("n", GroupNorm(groups=2)), ("f", Flatten()), ("h", Linear(3))])
    params = init_params(spec, 1)
    rng = np.random.default_rng(0)
    x = (1000 + rng.standard_normal((5, 4, 4, 4))).astype(np.float32)
    session = native.NativeEngine().open(spec, params, SubModel(), batch_size=5, optimizer=SGD(0.1))
    out = session.forward(x, training=True)["h"]
    got = session.backward({"h": np.ones_like(out)})["n.weight"]
    norm = torch.nn.GroupNorm(2, 4).double()
    head = torch.tensor(params["h.weight"]).double()
    value = norm(torch.tensor(x).double()).flatten(1) @ head.T
    value.sum().backward()
    assert np.allclose(got, norm.weight.grad.numpy(), rtol=1e-4)


def test_the_module_refuses_wrong_calls():
    from fedlean import _native

    network = _native.Network([4])
    with pytest.raises(ValueError):
        network.add("c", "Conv2d", [-1], [2, 1, 1], groups=0)
    network.add("fc", "Linear", [-1], [2], bias=False)
    settings = {"batch_size": 2, "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "proximal": 0.0}
    rest = {"clip_norm": 0.0, "trainable": [[True, False, False, False]]}
    with pytest.raises(ValueError):
        _native.Session(_native.Engine(1), network, loss="zzz", kept=[[-1] * 4], **settings, **rest)
    session = _native.Session(
        _native.Engine(1), network, loss="ce", kept=[[3, -1, -1, -1]], **settings, **rest
    )
    x, y = np.ones((2, 4), np.float32), np.array([0, 1])
    values = np.ones(8, np.float32)
    none = [None] * 4
    for call in (
        lambda: session.step(x, y, [], []),  # not built
        lambda: session.load(0, 0, values, False, False),
        lambda: session.build(0, none),  # a mask was planned
        lambda: session.build(0, [np.ones((2, 4), np.bool_), None, None, None]),  # of 3
        lambda: session.build(9, none),
        lambda: session.apply([99999999], [0]),
        lambda: session.apply([0], [77]),
        lambda: session.apply([0, 0], [0]),
    ):
        with pytest.raises(ValueError):
            call()
    mask = np.zeros((2, 4), np.bool_)
    mask.flat[:3] = True
    session.build(0, [mask, None, None, None])
    for call in (
        lambda: session.build(0, [mask, None, None, None]),  # twice
        lambda: session.apply([0], [0]),  # no gradient
        lambda: session.gradient(0, 0, values, False),
        lambda: session.activation(0, np.ones((2, 2), np.float32)),  # no forward
        lambda: session.backward([0], [np.ones((2, 2), np.float32)], False),
        lambda: session.load(0, 0, np.ones(7, np.float32), False, False),
    ):
        with pytest.raises(ValueError):
            call()
    session.load(0, 0, values, False, False)
    assert np.isfinite(session.step(x, y, [], []))
