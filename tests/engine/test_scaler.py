"""HeteroFL's scaler: in training mode only, and there whatever is frozen."""

from __future__ import annotations

import numpy as np
import pytest
from engine.cases import opened

from fedlean.core import SubModel
from fedlean.engine.memory import step_memory
from fedlean.engine.protocol import SGD
from fedlean.layers import BatchNorm, Conv2d, Flatten, Linear, ReLU, Scaler
from fedlean.spec import sequential

# One input, two logits: z = factor·(a·x), h = B·z.
CHAIN = sequential(
    (1,),
    [
        ("a", Linear(1, bias=False)),
        ("scaler", Scaler(4.0)),
        ("b", Linear(2, bias=False)),
    ],
)
PARAMS = {
    "a.weight": np.array([[0.5]], np.float32),
    "b.weight": np.array([[1.0], [-1.0]], np.float32),
}
X, Y = np.array([[2.0]], np.float32), np.array([0])


def cross_entropy(margin: float) -> float:
    return float(np.log1p(np.exp(-margin)))


def test_forward_and_backward_by_hand(engine) -> None:
    """a·x = 1 and z = 4: logits (4, -4).  For dL/dlogits = (1, 0): dz = 1, da = 4·x·1 = 8."""
    session = opened(engine, CHAIN, PARAMS)
    values = session.forward(X, taps=["a", "scaler"], training=True)
    assert values["a"] == [[1.0]] and values["scaler"] == [[4.0]]
    np.testing.assert_array_equal(values["b"], [[4.0, -4.0]])
    gradients = session.backward({"b": np.array([[1, 0]], np.float32)})
    np.testing.assert_array_equal(gradients["a.weight"], [[8.0]])
    np.testing.assert_array_equal(gradients["b.weight"], [[4.0], [0.0]])


def test_evaluation_does_not_scale(engine) -> None:
    """Logits (1, -1), so a margin of 2; a step starts at (4, -4), a margin of 8."""
    session = opened(engine, CHAIN, PARAMS, sgd=SGD(0.0))
    values = session.forward(X, taps=["scaler"])
    assert values["scaler"] == [[1.0]]
    assert session.loss(X, Y) == pytest.approx(cross_entropy(2), rel=1e-6)
    assert session.step(X, Y) == pytest.approx(cross_entropy(8), rel=1e-4)
    assert session.loss(X, Y) == pytest.approx(cross_entropy(2), rel=1e-6)


def test_sessions_of_forward_passes_do_not_scale(engine) -> None:
    plain = sequential((1,), [("a", Linear(1, bias=False)), ("b", Linear(2, bias=False))])
    session, bare = (
        engine.open_forward(spec, PARAMS, SubModel(), batch_size=1) for spec in (CHAIN, plain)
    )
    assert session.forward(X, taps=["scaler"])["scaler"] == [[1.0]]
    assert session.loss(X, Y) == bare.loss(X, Y)
    at = {"seed": 3, "ks": range(4), "sigma": 0.1}
    assert (session.losses_perturbed(X, Y, **at) == bare.losses_perturbed(X, Y, **at)).all()


@pytest.mark.parametrize("frozen", [{"a.weight"}, {"b.weight"}, {"a.weight", "b.weight"}])
def test_what_is_frozen_is_scaled_in_training(engine, frozen) -> None:
    """Also where nothing below or above takes a gradient."""
    session = opened(engine, CHAIN, PARAMS, frozen=frozen)
    values = session.forward(X, taps=["scaler"], training=True)
    assert values["scaler"] == [[4.0]]
    gradients = session.backward({"b": np.array([[1, 0]], np.float32)})
    assert gradients.keys() == PARAMS.keys() - frozen
    assert session.step(X, Y) == pytest.approx(cross_entropy(8), rel=1e-4)


SLICE = sequential(
    (2, 6, 6),
    [
        ("conv", Conv2d(5, 3, padding=1, bias=False)),
        ("scaler", Scaler(2.0)),
        ("bn", BatchNorm()),
        ("relu", ReLU()),
        ("flat", Flatten()),
        ("fc", Linear(3)),
    ],
)


def test_gradients_by_finite_differences(engine) -> None:
    """dL/dw against (L(w + h) - L(w - h)) / 2h of the training loss, a session each."""
    rng = np.random.default_rng(0)
    params = {
        name: rng.standard_normal(shape).astype(np.float32) ** (2 if "var" in name else 1)
        for name, shape in SLICE.tensor_shapes.items()
    }
    x = rng.standard_normal((6, 2, 6, 6)).astype(np.float32)
    y = rng.integers(0, 3, 6)

    def loss(name: str, at: int, h: float) -> float:
        moved = {n: value.copy() for n, value in params.items()}
        moved[name].reshape(-1)[at] += h
        return opened(engine, SLICE, moved, sgd=SGD(0.0), batch_size=6).step(x, y)

    session = opened(engine, SLICE, params, sgd=SGD(1.0), batch_size=6)
    session.step(x, y)
    stepped = session.params()
    for name in ("conv.weight", "bn.weight", "fc.weight"):
        gradient = (params[name] - stepped[name]).reshape(-1)
        for at in (0, 1, 4):
            slope = (loss(name, at, 1e-3) - loss(name, at, -1e-3)) / 2e-3
            assert slope == pytest.approx(gradient[at], rel=0.03, abs=2e-3), (name, at)


@pytest.mark.parametrize("batch_size", [1, 20])
def test_it_takes_no_memory_natively(batch_size) -> None:
    """Output and gradient lie where the input's do."""
    nodes = [(n.name, n.layer) for n in SLICE.nodes if n.name != "scaler"]
    bare = step_memory(sequential(SLICE.input_shape, nodes), {}, batch_size=batch_size)
    assert step_memory(SLICE, {}, batch_size=batch_size) == bare
