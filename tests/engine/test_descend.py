"""`descend`: backward and one optimiser step in the engine, for losses that it does not know."""

from __future__ import annotations

import ctypes
import math
import tracemalloc

import numpy as np
import pytest
from engine.cases import (
    BLOCK,
    CONV,
    FULL_SGD,
    LOSSES,
    MLP,
    NET,
    assert_near,
    batch,
    masks_of,
    mlp_by_hand,
    opened,
    positive_zeros,
    start,
)
from federation import same

from fedlean.engine.memory import optimizer_floats, step_memory
from fedlean.engine.protocol import SGD
from fedlean.layers import Linear, ReLU
from fedlean.spec import ModelSpec, Node, sequential
from fedlean.train.loss_gradient import loss_and_gradient
from fedlean.tree import kept_counts

SPECS = {"mlp": MLP, "norms": CONV, "chain": NET, "residual": BLOCK}
RULES = {
    "plain": SGD(0.2),
    "momentum": SGD(0.2, 0.9),
    "weight decay": SGD(0.2, 0.0, 0.05),
    "clip": SGD(0.2, clip_norm=0.1),
    "proximal": SGD(0.2, proximal=0.3),
    "all": FULL_SGD,
}
BRANCHED = ModelSpec(
    (7,),
    (
        Node("fc1", Linear(6), ("input",)),
        Node("exit", Linear(4), ("fc1",)),
        Node("relu", ReLU(), ("fc1",)),
        Node("fc2", Linear(4), ("relu",)),
    ),
)


def output(spec):
    return spec.nodes[-1].name


def entering(spec, nodes, size=5, seed=4):
    """Gradients (size, *shape) for these nodes."""
    rng = np.random.default_rng(seed)
    shapes = {name: (size, *spec.shapes[name]) for name in nodes}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


# What it computes


@pytest.mark.parametrize("size", [1, 5, 13])
@pytest.mark.parametrize("loss", LOSSES)
def test_it_descends_along_the_hand_written_gradient(engine, loss, size):
    params, (x, y) = start(MLP), batch(MLP, size)
    _, _, gradients, d_logits = mlp_by_hand(params, x, y, loss)
    session = opened(engine, MLP, params, sgd=SGD(1.0), batch_size=13)
    session.forward(x, training=True)
    assert session.descend({"fc2": d_logits.astype(np.float32)}) is None
    moved = {name: params[name] - after for name, after in session.params().items()}
    assert_near(moved, gradients)


def test_momentum_decay_and_pull_by_hand(engine):
    """One weight w = 2 and x = 1, so dL/dw is what enters: 1, then 3.

    lr 0.1, momentum 0.5, decay 0.1, proximal 0.2.  v = 1 + 0.2, w = 1.88; then the pull is
    0.2·(1.88 - 2) and v = 0.6 + 3 + 0.188 - 0.024.
    """
    spec = sequential((1,), [("fc", Linear(1, bias=False))])
    weight = {"fc.weight": np.array([[2.0]], np.float32)}
    session = opened(engine, spec, weight, sgd=SGD(0.1, 0.5, 0.1, proximal=0.2))
    for gradient, expected in ((1.0, 2 - 0.12), (3.0, 1.88 - 0.3764)):
        session.forward(np.ones((1, 1), np.float32), training=True)
        session.descend({"fc": np.array([[gradient]], np.float32)})
        assert session.params()["fc.weight"].item() == pytest.approx(expected, rel=1e-6)


def test_clipping_by_hand(engine):
    """(3, 4) is scaled to a norm of 1, (0.3, 0.4) is left."""
    spec = sequential((2,), [("fc", Linear(1, bias=False))])
    start_at = {"fc.weight": np.zeros((1, 2), np.float32)}
    session = opened(engine, spec, start_at, sgd=SGD(1.0, clip_norm=1.0))
    x = np.array([[3.0, 4.0]], np.float32)
    for gradient, expected in ((1.0, [-0.6, -0.8]), (0.1, [-0.9, -1.2])):
        session.forward(x, training=True)
        session.descend({"fc": np.array([[gradient]], np.float32)})
        assert_near({"w": session.params()["fc.weight"]}, {"w": np.array([expected])}, 1e-6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", SPECS)
def test_it_is_backward_and_apply(engine, name, rule):
    """Every bit, on every engine, dense and with masks, also where gradients enter at two nodes."""
    spec = SPECS[name]
    middle = spec.nodes[len(spec.nodes) // 2].name
    for density, size in ((1.0, 5), (0.3, 17), (0.05, 3)):
        masks = masks_of(spec, density) if density < 1 else {}
        one, other = (
            opened(engine, spec, masks=masks, sgd=RULES[rule], batch_size=17) for _ in range(2)
        )
        for seed, nodes in enumerate(((output(spec),), (middle,), (middle, output(spec)))):
            x, _ = batch(spec, size, seed)
            given = entering(spec, nodes, size, seed)
            for session in (one, other):
                session.forward(x, taps=[middle], training=True)
            one.descend(given)
            other.apply(other.backward(given))
            assert same(one.params(), other.params()), (density, nodes)
            assert positive_zeros(one.params(), masks)


@pytest.mark.parametrize("loss", LOSSES)
def test_with_the_gradient_of_the_loss_it_is_a_step(engine, loss):
    """As near as a loss in float64 comes to one in float32."""
    masks = masks_of(CONV)
    fused, parts = (opened(engine, CONV, masks=masks, sgd=FULL_SGD, loss=loss) for _ in range(2))
    for seed in range(3):
        x, y = batch(CONV, seed=seed)
        value = fused.step(x, y, importance=seed != 1)
        logits = parts.forward(x, training=True)["fc"]
        mean, gradient = loss_and_gradient(logits, y, loss)
        parts.descend({"fc": gradient}, importance=seed != 1)
        assert mean == pytest.approx(value, rel=1e-5)
        assert_near(parts.params(), fused.params(), 1e-5)
        assert_near(parts.importance(), fused.importance(), 1e-5)


def test_importance_is_of_all_coordinates_before_clipping(engine):
    masks, (x, _) = masks_of(MLP, 0.3), batch(MLP)
    given = entering(MLP, ["fc2"])
    strange = SGD(0.1, 0.9, 0.3, clip_norm=1e-3, proximal=0.5)
    plain, other = (opened(engine, MLP, masks=masks, sgd=sgd) for sgd in (SGD(0.0), strange))
    plain.forward(x, training=True)
    gradients = plain.backward(given, dense=True)
    other.forward(x, training=True)
    other.descend(given, importance=True)
    assert_near(other.importance(), {name: g**2 for name, g in gradients.items()})
    other.forward(x, training=True)
    before = other.importance()
    other.descend(given)
    assert same(other.importance(), before), "only where it was asked for"


def test_what_no_gradient_reaches_decays(engine):
    """A branch that ends in nothing, and what is above the node where the gradient enters."""
    sgd, params, (x, _) = SGD(0.1, 0.9, 0.5), start(BRANCHED), batch(BRANCHED)
    session = opened(engine, BRANCHED, params, sgd=sgd)
    session.forward(x, taps=["relu"], training=True)
    session.descend(entering(BRANCHED, ["relu"]))
    after = session.params()
    for name in ("exit.weight", "exit.bias", "fc2.weight", "fc2.bias"):
        np.testing.assert_allclose(after[name], params[name] * np.float32(0.95), rtol=1e-6)
    assert not np.allclose(after["fc1.weight"], params["fc1.weight"] * 0.95, rtol=1e-3)


@pytest.mark.parametrize("frozen", [{"fc1.weight", "fc1.bias"}, set(MLP.param_shapes)])
def test_what_is_frozen_stays(engine, frozen):
    params, (x, _) = start(MLP), batch(MLP)
    session = opened(engine, MLP, params, frozen=frozen, sgd=FULL_SGD)
    session.forward(x, training=True)
    session.descend(entering(MLP, ["fc2"]))
    after = session.params()
    stayed = {name for name, value in after.items() if same(value, params[name])}
    assert stayed == frozen


# What it refuses, and what it leaves alone


def test_it_needs_a_training_forward_of_its_own(engine):
    session, (x, _) = opened(engine, MLP, sgd=FULL_SGD), batch(MLP)
    given, before = entering(MLP, ["fc2"]), session.params()

    def refused(given=given):
        with pytest.raises(ValueError, match=r"call forward\(x, taps=.*, training=True\) first"):
            session.descend(given)

    refused()
    session.forward(x)
    refused()
    session.forward(x, training=True)
    refused(entering(MLP, ["relu"]))  # not tapped
    session.backward(given)
    refused()
    assert same(session.params(), before)
    session.forward(x, training=True)
    session.descend(given)
    before = session.params()
    refused()
    assert same(session.params(), before)


def test_bad_output_gradients_leave_the_forward_in_place(engine):
    session, expected = (opened(engine, MLP, sgd=FULL_SGD) for _ in range(2))
    (x, _), right = batch(MLP), entering(MLP, ["fc2"])
    for held in (session, expected):
        held.forward(x, training=True)
    nan = right["fc2"].copy()
    nan[2, 3] = np.nan
    wrong = {
        "holds NaN": nan,
        "is float64": right["fc2"].astype(np.float64),
        "has shape": right["fc2"][:-1].copy(),
        "is not C-contiguous": np.asfortranarray(right["fc2"]),
        "is a list": right["fc2"].tolist(),
    }
    for why, value in wrong.items():
        for importance in (False, True):
            with pytest.raises(ValueError, match=f"output gradient 'fc2' {why}"):
                session.descend({"fc2": value}, importance=importance)
    with pytest.raises(ValueError, match="output_gradients is empty"):
        session.descend({})
    with pytest.raises(ValueError, match=r"enter at 'fc2\.weight'"):
        session.descend({**right, "fc2.weight": right["fc2"]})
    session.descend(right)
    expected.descend(right)
    assert same(session.params(), expected.params())
    assert not any(total.any() for total in session.importance().values())


def test_it_does_not_write_into_the_gradients(engine):
    """Of one example, a bias's gradient is the row that enters; clipping and decay change it."""
    session, (x, _) = opened(engine, MLP, sgd=FULL_SGD), batch(MLP, 1)
    given = entering(MLP, ["relu", "fc2"], 1)
    before = {name: value.copy() for name, value in given.items()}
    session.forward(x, taps=["relu"], training=True)
    session.descend(given, importance=True)
    assert same(given, before)


# The native engine: the bits of `step`, in its memory


def exact_gradient(logits, y, loss):
    """dL/dlogits with the roundings of `native/src/loss.cpp`."""
    share = float(np.float32(1) / np.float32(len(y)))
    rows = [_exact_ce(z, int(c), share) for z, c in zip(logits, y, strict=True)]
    if loss == "bce":
        rows = [_exact_bce(z, int(c), share) for z, c in zip(logits, y, strict=True)]
    return np.array(rows, np.float32)


def _exact_ce(z, label, share):
    expf = ctypes.CDLL(None).expf  # NumPy's is another one, a last bit apart
    expf.restype, expf.argtypes = ctypes.c_float, [ctypes.c_float]
    powers, total = [expf(value - z.max()) for value in z], 0.0
    for power in powers:
        total += power
    scale = share / total
    return [(p - total * (c == label)) * scale for c, p in enumerate(powers)]


def _exact_bce(z, label, share):
    classes = range(len(z))
    sigmoids = [1 / (1 + math.exp(-float(value))) for value in z]
    return [(sigmoids[c] - float(c == label)) * share / len(z) for c in classes]


@pytest.mark.usefixtures("has_native")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("engine", ["native"], indirect=True)
def test_native_bits_are_those_of_a_step(engine, name, rule):
    """BatchNorm, GroupNorm, sums and gates; full and part panels; with and without Σ g²."""
    spec = SPECS[name]
    for density, size, loss in (
        (1.0, 5, "ce"),
        (0.3, 17, "bce"),
        (0.05, 33, "ce"),
        (0.6, 1, "bce"),
    ):
        masks = masks_of(spec, density) if density < 1 else {}
        fused, parts = (
            opened(engine, spec, masks=masks, sgd=RULES[rule], loss=loss, batch_size=33)
            for _ in range(2)
        )
        for seed in range(4):
            x, y = batch(spec, size, seed)
            fused.step(x, y, importance=seed == 2)
            logits = parts.forward(x, training=True)[output(spec)]
            given = {output(spec): exact_gradient(logits, y, loss)}
            parts.descend(given, importance=seed == 2)
            assert same(parts.params(), fused.params()), (density, seed)
        assert same(parts.importance(), fused.importance()), density
        assert parts.loss(x, y) == fused.loss(x, y)


WIDE = sequential((784,), [("fc1", Linear(500)), ("relu", ReLU()), ("fc2", Linear(10))])


@pytest.mark.parametrize("engine", ["native"], indirect=True)
@pytest.mark.parametrize("density", [1.0, 0.5])
def test_no_gradient_of_the_model_is_an_array(engine, density):
    """1.6 MB of weights: `backward` and `apply` make as much, `descend` next to nothing."""
    masks = masks_of(WIDE, density) if density < 1 else {}
    session, (x, _) = opened(engine, WIDE, masks=masks, sgd=SGD(0.1, 0.9)), batch(WIDE)
    given = entering(WIDE, ["fc2"])

    def most(call):
        session.forward(x, training=True)
        tracemalloc.start()
        call()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    model_bytes = 4 * sum(value.size for value in start(WIDE).values())
    assert most(lambda: session.apply(session.backward(given))) > model_bytes
    assert most(lambda: session.descend(given)) < 20_000
    held = session.held_bytes
    for _ in range(2):
        session.forward(x, training=True)
        session.descend(given)
    assert session.held_bytes == held


@pytest.mark.parametrize("engine", ["native"], indirect=True)
@pytest.mark.parametrize("sgd", [SGD(0.1), FULL_SGD], ids=["plain", "all"])
def test_held_memory_is_planned(engine, sgd):
    """A training forward plans for the gradients of all coordinates, of which there are no sums."""
    masks = masks_of(NET, 0.2)
    session, (x, _) = opened(engine, NET, masks=masks, sgd=sgd), batch(NET)
    given = entering(NET, [output(NET)])
    plain = session.peak_memory_bytes
    session.forward(x, training=True)
    session.descend(given)
    with_sums = step_memory(
        NET,
        kept_counts(masks),
        batch_size=5,
        optimizer_floats=optimizer_floats(sgd),
        importance=True,
    ).peak_bytes
    sums = 4 * sum(math.prod(shape) for shape in NET.param_shapes.values())
    assert plain <= session.held_bytes == with_sums - sums
    session.forward(x, training=True)
    session.descend(given, importance=True)
    assert session.held_bytes == session.peak_memory_bytes == with_sums
