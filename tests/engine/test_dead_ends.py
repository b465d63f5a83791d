"""Branches that end in nothing: early exits and projectors, which a method taps or leaves.

Gradients enter there, at nodes that go on, or at none of them.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from engine.agreement import SIZES, IllPosed, check_gradients
from engine.cases import FULL_SGD, LOSSES, batch, masks_of, opened, start
from engine.test_agrees_random import networks
from federation import same
from hypothesis import given, settings
from hypothesis import strategies as st
from live_memory import peak_bytes

from fedlean.core import SubModel
from fedlean.engine.gradient_flow import needed
from fedlean.engine.memory import forward_memory, optimizer_floats, step_memory
from fedlean.engine.native_step_plan import SessionPlan
from fedlean.engine.open import open_engine
from fedlean.engine.protocol import SGD
from fedlean.engine.torch import TorchEngine
from fedlean.layers import BatchNorm, Conv2d, Flatten, GlobalAvgPool, Linear, ReLU, Scaler
from fedlean.spec import INPUT, ModelSpec, Node, sequential
from fedlean.tree import kept_counts

RUNS = settings(max_examples=50, deadline=None, derandomize=True, database=None)
RULES = [SGD(0.2), SGD(0.2, 0.9), SGD(0.2, 0.9, 0.05, proximal=0.1), FULL_SGD]
DENSITIES = st.sampled_from([0.0, 0.3, 1.0])
AT_LEAST_THREE = st.sampled_from(SIZES[1:8])


def with_exits(spec: ModelSpec, at: list[int], normed: bool) -> ModelSpec:
    """A head of its own behind these nodes: pooling for an image, a Linear, and a ReLU."""
    nodes: list[Node] = []
    for i, node in enumerate(spec.nodes[:-1]):
        nodes.append(node)
        if i not in at:
            continue
        source = node.name
        if len(spec.shapes[source]) > 1:
            nodes.append(Node(f"x{i}_pool", GlobalAvgPool(), (source,)))
            source = nodes[-1].name
        nodes.append(Node(f"x{i}_fc", Linear(4), (source,)))
        nodes.append(Node(f"x{i}_relu", ReLU(), (nodes[-1].name,)))
        if normed:
            nodes.append(Node(f"x{i}_bn", BatchNorm(), (f"x{i}_fc",)))
    return replace(spec, nodes=(*nodes, spec.nodes[-1]))


@st.composite
def exits(draw, normed: bool | None = None) -> tuple[ModelSpec, ModelSpec]:
    """A random network and the same with exits, which nothing reads, behind some of its nodes."""
    spec = draw(networks())
    places = st.integers(0, len(spec.nodes) - 2) if len(spec.nodes) > 1 else st.nothing()
    at = draw(st.lists(places, min_size=len(spec.nodes) > 1, max_size=3, unique=True))
    return spec, with_exits(spec, at, draw(st.booleans()) if normed is None else normed)


def some_of(data, names, least: int) -> list[str]:
    return data.draw(st.lists(st.sampled_from(names), min_size=least, max_size=4, unique=True))


def entering(spec: ModelSpec, nodes, size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(4)
    shapes = {name: (size, *spec.shapes[name]) for name in nodes}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


# Gradients


@RUNS
@given(exits(), DENSITIES, AT_LEAST_THREE, st.data())
def test_gradients_agree_wherever_they_enter(engine, specs, density, size, data):
    """With taps where none enters, and everything else untapped."""
    _, spec = specs
    nodes = some_of(data, list(spec.by_name), 1)
    taps = [*nodes, *some_of(data, list(spec.by_name), 0)]
    frozen = data.draw(st.sets(st.sampled_from(sorted(spec.param_shapes)), max_size=2))
    masks = masks_of(spec, density) if density < 1 else {}
    with suppress(IllPosed):
        check_gradients(engine, spec, size=size, masks=masks, frozen=frozen, taps=taps, nodes=nodes)


@RUNS
@given(exits(), DENSITIES, st.sampled_from(RULES), st.booleans(), st.data())
def test_descend_is_backward_and_apply(engine, specs, density, sgd, importance, data):
    """Every bit, step after step at other nodes."""
    _, spec = specs
    masks = masks_of(spec, density) if density < 1 else {}
    one, other = (opened(engine, spec, masks=masks, sgd=sgd, batch_size=17) for _ in range(2))
    for seed in range(2):
        nodes = some_of(data, list(spec.by_name), 1)
        taps = [*some_of(data, list(spec.by_name), 0), *nodes]
        size = data.draw(st.sampled_from([3, 17]))
        x, _ = batch(spec, size, seed)
        values = [session.forward(x, taps=taps, training=True) for session in (one, other)]
        assert same(*values)
        given_there = entering(spec, nodes, size)
        one.descend(given_there, importance=importance)
        other.apply(other.backward(given_there))
        assert same(one.params(), other.params())


# a = 2x; an exit e = 3a that nothing reads; the output b = 5a.
FORKED = ModelSpec(
    (1,),
    (
        Node("a", Linear(1, bias=False), (INPUT,)),
        Node("e", Linear(1, bias=False), ("a",)),
        Node("scaled", Scaler(4.0), ("e",)),
        Node("b", Linear(1, bias=False), ("a",)),
    ),
)
WEIGHTS = {"a": 2.0, "e": 3.0, "b": 5.0}
FORKED_PARAMS = {f"{n}.weight": np.array([[w]], np.float32) for n, w in WEIGHTS.items()}


def one(value: float) -> np.ndarray:
    return np.array([[value]], np.float32)


@pytest.mark.parametrize(
    ("enters", "a", "e", "b"),
    [
        ({"b": 1}, 5, 0, 2),
        ({"e": 1}, 3, 2, 0),
        ({"scaled": 1}, 12, 8, 0),
        ({"a": 1}, 1, 0, 0),
        ({"a": 1, "e": 10, "b": 100}, 1 + 30 + 500, 20, 200),
        ({"a": 1, "e": 10, "scaled": 1, "b": 100}, 1 + 30 + 12 + 500, 28, 200),
    ],
)
def test_gradients_by_hand(engine, enters, a, e, b):
    """For x = 1: da = enters + 3·de + 5·db, de = enters + 4·dscaled, times what each reads."""
    session = opened(engine, FORKED, FORKED_PARAMS, sgd=SGD(1.0))
    values = session.forward(one(1), taps=["a", "e", "scaled"], training=True)
    assert {name: value.item() for name, value in values.items()} == {
        "a": 2.0,
        "e": 6.0,
        "scaled": 24.0,
        "b": 10.0,
    }
    session.descend({name: one(value) for name, value in enters.items()})
    moved = {name: w - session.params()[f"{name}.weight"].item() for name, w in WEIGHTS.items()}
    assert moved == {"a": a, "e": e, "b": b}


# Steps


@RUNS
@given(
    exits(normed=False), DENSITIES, st.sampled_from(RULES), st.sampled_from(LOSSES), st.booleans()
)
def test_a_step_is_that_of_the_model_without_them(engine, specs, density, sgd, loss, importance):
    """Every bit; the exits move as SGD moves what has gradient 0."""
    bare, spec = specs
    masks = masks_of(bare, density) if density < 1 else {}
    params = start(spec)
    ours = {name: params[name] for name in bare.tensor_shapes}
    session, plain = (
        opened(engine, of, held, masks=masks, sgd=sgd, loss=loss, batch_size=17)
        for of, held in ((spec, params), (bare, ours))
    )
    expected = {n: params[n].astype(np.float64) for n in params.keys() - ours.keys()}
    speed = dict.fromkeys(expected, 0.0)
    for seed in range(3):
        x, y = batch(spec, 17, seed)
        losses = [each.step(x, y, importance=importance) for each in (session, plain)]
        assert losses[0] == losses[1]
        for name, value in expected.items():
            pull = sgd.weight_decay * value + sgd.proximal * (value - params[name])
            speed[name] = sgd.momentum * speed[name] + pull
            expected[name] = value - sgd.lr * speed[name]
    after = session.params()
    assert same({name: after[name] for name in ours}, plain.params())
    assert session.loss(x, y) == plain.loss(x, y)
    for name, value in expected.items():
        np.testing.assert_allclose(after[name], value, rtol=2e-6, atol=1e-7)
        assert not importance or not session.importance()[name].any()


def test_their_statistics_move_in_training_only(engine):
    """A BatchNorm on a branch that nobody taps: the mean moves by 0.1 of the batch's, 3."""
    spec = ModelSpec(
        (1,),
        (
            Node("bn", BatchNorm(), (INPUT,)),
            Node("exit", Linear(1), ("bn",)),
            Node("fc", Linear(2), (INPUT,)),
        ),
    )
    params = start(spec) | {"bn.running_mean": np.zeros(1, np.float32)}
    session = opened(engine, spec, params, batch_size=2)
    x, y = np.array([[2.0], [4.0]], np.float32), np.array([0, 1])
    session.loss(x, y)
    session.forward(x)
    assert session.params()["bn.running_mean"] == [0.0]
    session.step(x, y)
    assert session.params()["bn.running_mean"] == pytest.approx(0.3)
    session.forward(x, training=True)
    assert session.params()["bn.running_mean"] == pytest.approx(0.57)
    frozen = opened(engine, spec, params, frozen={"bn.running_mean"}, batch_size=2)
    frozen.step(x, y)
    assert frozen.params()["bn.running_mean"] == [0.0]


@RUNS
@given(exits(), st.data())
def test_losses_near_the_weights_do_not_see_them(engine, specs, data):
    bare, spec = specs
    params, (x, y) = start(spec), batch(spec)
    session, plain = (
        engine.open_forward(
            of, {name: params[name] for name in of.tensor_shapes}, SubModel(), batch_size=5
        )
        for of in (spec, bare)
    )
    at = {"seed": 1, "ks": [0, 7], "sigma": 0.05}
    assert same(
        {"losses": session.losses_perturbed(x, y, **at)},
        {"losses": plain.losses_perturbed(x, y, **at)},
    )
    taps = some_of(data, list(spec.by_name), 1)
    opened_for_training = opened(engine, spec, params)
    assert same(session.forward(x, taps=taps), opened_for_training.forward(x, taps=taps))


# Memory


@pytest.mark.usefixtures("has_native")
@RUNS
@given(exits(), DENSITIES, st.sampled_from([1, 3, 17, 33]), st.sampled_from(RULES), st.data())
def test_the_plan_is_what_is_held(specs, density, examples, sgd, data):
    """From a forward with taps to the descent along gradients that enter there."""
    _, spec = specs
    masks = masks_of(spec, density) if density < 1 else {}
    session = opened(open_engine("native", 1), spec, masks=masks, sgd=sgd, batch_size=examples + 1)
    plan = SessionPlan(spec, kept_counts(masks), examples + 1)
    nodes = some_of(data, list(spec.by_name), 1)
    x = np.zeros((examples + 1, *spec.input_shape), np.float32)
    session.forward(x, taps=nodes, training=True)
    arena = plan.forward_bytes(examples + 1, nodes, training=True)
    before = optimizer_floats(replace(sgd, clip_norm=None))  # clipping holds gradients from then on
    assert session.held_bytes == plan.stored_bytes(before) + arena
    session.descend(entering(spec, nodes, examples + 1))
    assert session.held_bytes == plan.stored_bytes(optimizer_floats(sgd)) + arena
    step = step_memory(
        spec,
        kept_counts(masks),
        batch_size=examples + 1,
        optimizer_floats=optimizer_floats(sgd),
    )
    assert step.peak_bytes == session.peak_memory_bytes


FAT = [
    ("conv1", Conv2d(16, 3, padding=1, bias=False)),
    ("relu1", ReLU()),
    ("conv2", Conv2d(16, 3, padding=1, bias=False)),
    ("relu2", ReLU()),
    ("pool", GlobalAvgPool()),
    ("fc", Linear(10)),
]
TRUNK = sequential((3, 16, 16), FAT)
EXIT = (  # of 32 channels at full size, twice what the trunk has
    Node("wide", Conv2d(32, 1, bias=False), ("relu1",)),
    Node("wide_relu", ReLU(), ("wide",)),
    Node("flat", Flatten(), ("wide_relu",)),
    Node("exit", Linear(10), ("flat",)),
)
TWO_HEADED = replace(TRUNK, nodes=(*TRUNK.nodes[:-1], *EXIT, TRUNK.nodes[-1]))


@pytest.mark.parametrize("batch_size", [1, 8, 40])
def test_what_nobody_taps_takes_its_weights_only(batch_size):
    bare, spec = SessionPlan(TRUNK, {}, batch_size), SessionPlan(TWO_HEADED, {}, batch_size)
    assert spec.step_bytes() == bare.step_bytes()
    taps = ["relu1", "pool"]
    for training in (False, True):
        untapped, trunk = (
            plan.forward_bytes(batch_size, taps, training=training) for plan in (spec, bare)
        )
        tapped = spec.forward_bytes(batch_size, ["exit", *taps], training=training)
        assert untapped == trunk < tapped
    evaluated, alone = (
        forward_memory(of, {}, batch_size=batch_size, frozen=frozenset(TWO_HEADED.tensor_shapes))
        for of in (TWO_HEADED, TRUNK)
    )
    assert evaluated.activation_bytes == alone.activation_bytes


def test_nor_does_it_in_the_torch_engine():
    """Its gradients are there, as zeros, where SGD takes them."""
    params, (x, y) = start(TWO_HEADED), batch(TWO_HEADED, 32)

    def train() -> None:
        session = TorchEngine(1).open(
            TWO_HEADED, params, SubModel(), batch_size=32, optimizer=SGD(0.01)
        )
        session.step(x, y)
        session.step(x, y)

    claim = step_memory(TWO_HEADED, {}, batch_size=32, sparse=False)
    activations = step_memory(TRUNK, {}, batch_size=32, sparse=False).activation_bytes
    assert claim.activation_bytes == activations
    measured = peak_bytes(train)
    assert abs(claim.peak_bytes - measured) <= 0.15 * measured, (claim, measured)


def test_needed_by_hand():
    assert needed(TWO_HEADED) == {name for name, _ in FAT}
    assert needed(TWO_HEADED, ["wide_relu"]) == {name for name, _ in FAT} | {"wide", "wide_relu"}
    normed = replace(
        FORKED, nodes=(*FORKED.nodes[:-1], Node("bn", BatchNorm(), ("e",)), FORKED.nodes[-1])
    )
    assert needed(normed) == {"a", "b"}
    assert needed(normed, training=True) == {"a", "b", "e", "bn"}
    assert needed(normed, training=True, frozen={"bn.running_mean"}) == {"a", "b"}
