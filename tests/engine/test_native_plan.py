"""The model of the native engine's memory is its plan, to the byte, whatever is frozen."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from engine.cases import masks_of, opened, start
from engine.test_agrees_random import networks
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlean.core import SubModel
from fedlean.engine.memory import forward_memory, optimizer_floats, step_memory
from fedlean.engine.native_step_plan import SessionPlan
from fedlean.engine.open import open_engine
from fedlean.engine.protocol import SGD
from fedlean.models import catalog
from fedlean.tree import kept_counts

pytestmark = pytest.mark.usefixtures("has_native")
RUNS = settings(max_examples=150, deadline=None, derandomize=True, database=None)
DENSITIES = st.sampled_from([0.0, 0.05, 0.3, 0.6, 0.9, 1.0])
BATCHES = st.sampled_from([1, 3, 5, 16, 17, 33, 50])
OPTIMIZERS = st.builds(
    SGD,
    st.just(0.1),
    momentum=st.sampled_from([0.0, 0.9]),
    proximal=st.sampled_from([0.0, 0.1]),
    clip_norm=st.sampled_from([None, 1.0]),
)


def held(spec, masks, frozen, batch_size, threads=1):
    return SessionPlan(spec, kept_counts(masks), batch_size, frozen, threads)


def patterns(spec):
    """Any tensors; the beginning; the end; all biases; all."""
    names = sorted(spec.tensor_shapes)
    order = [node.name for node in spec.nodes]

    def of(nodes):
        return frozenset(name for name in names if name.rsplit(".", 1)[0] in nodes)

    cut = st.integers(0, len(order))
    return st.one_of(
        st.frozensets(st.sampled_from(names)),
        cut.map(lambda i: of(order[:i])),
        cut.map(lambda i: of(order[i:])),
        st.just(frozenset(name for name in names if name.endswith(".bias"))),
        st.just(frozenset(names)),
    )


@RUNS
@given(networks(), DENSITIES, BATCHES, st.integers(1, 3), OPTIMIZERS, st.data())
def test_a_step(spec, density, batch_size, threads, sgd, data):
    frozen = data.draw(patterns(spec))
    masks = masks_of(spec, density) if density < 1 else {}
    session = opened(
        open_engine("native", threads),
        spec,
        masks=masks,
        frozen=frozen,
        sgd=sgd,
        batch_size=batch_size,
    )
    plain, importance = (
        step_memory(
            spec,
            kept_counts(masks),
            batch_size=batch_size,
            optimizer_floats=optimizer_floats(sgd),
            frozen=frozen,
            importance=flag,
            threads=threads,
        ).peak_bytes
        for flag in (False, True)
    )
    assert plain == session.peak_memory_bytes
    x = np.zeros((2, *spec.input_shape), np.float32)  # memory is for batch_size whatever comes
    if batch_size > 1:
        session.step(x, np.zeros(2, np.int64), importance=True)
        assert importance == session.peak_memory_bytes


@RUNS
@given(networks(), DENSITIES, BATCHES, st.booleans(), st.data())
def test_a_forward_with_taps(spec, density, examples, training, data):
    """Without a step before it, the arena is that of the forward alone."""
    frozen = data.draw(patterns(spec))
    taps = data.draw(st.frozensets(st.sampled_from(sorted(spec.by_name))))
    masks = masks_of(spec, density) if density < 1 else {}
    session = opened(
        open_engine("native", 1), spec, masks=masks, frozen=frozen, batch_size=examples + 1
    )
    stored = session.held_bytes
    x = np.zeros((examples + 1, *spec.input_shape), np.float32)
    session.forward(x, taps=sorted(taps), training=training)
    plan = held(spec, masks, frozen, examples + 1)
    assert stored == plan.stored_bytes()
    arena = plan.forward_bytes(examples + 1, taps, training=training)
    assert arena == session.held_bytes - stored


@RUNS
@given(networks(), DENSITIES, BATCHES, st.integers(1, 3), st.data())
def test_forward_passes_alone(spec, density, batch_size, at_once, data):
    frozen = data.draw(patterns(spec))
    masks = masks_of(spec, density) if density < 1 else {}
    session = open_engine("native", 3).open_forward(
        spec,
        start(spec),
        SubModel(masks=masks, frozen=frozen),
        batch_size=batch_size,
        directions_at_once=at_once,
    )
    claim = forward_memory(
        spec,
        kept_counts(masks),
        batch_size=batch_size,
        frozen=frozen,
        directions_at_once=at_once,
    )
    assert claim.peak_bytes == session.peak_memory_bytes
    assert claim.parameter_bytes == session.held_bytes


@cache
def resnet18():
    spec = catalog.build("resnet18", (3, 32, 32), 10)
    return spec, start(spec)


@pytest.mark.parametrize("density", [1.0, 0.3])
@pytest.mark.parametrize("trained", ["fc", "stage4", "stage3"])
def test_the_end_of_resnet18(trained, density):
    """A frozen beginning runs a few examples at a time; gaps between its arrays are counted."""
    spec, params = resnet18()
    names = list(spec.tensor_shapes)
    first = next(i for i, name in enumerate(names) if name.startswith(trained))
    frozen = frozenset(names[:first])
    masks = masks_of(spec, density) if density < 1 else {}
    sgd = SGD(0.1, momentum=0.9)
    engine = open_engine("native", 1)
    session = opened(engine, spec, params, masks=masks, frozen=frozen, sgd=sgd, batch_size=32)
    claim = step_memory(
        spec, kept_counts(masks), batch_size=32, optimizer_floats=1, frozen=frozen
    ).peak_bytes
    assert claim == session.peak_memory_bytes
    session.step(np.zeros((2, *spec.input_shape), np.float32), np.zeros(2, np.int64))
    assert claim == session.held_bytes


def test_what_engines_hold_for_an_optimizer():
    """The velocity, what was loaded, and natively the gradient until its norm is known."""
    assert optimizer_floats(SGD(0.1, weight_decay=0.1)) == 0
    assert optimizer_floats(SGD(0.1, momentum=0.9)) == 1
    assert optimizer_floats(SGD(0.1, proximal=0.1, clip_norm=1.0)) == 2
    assert optimizer_floats(SGD(0.1, 0.9, 0.1, 1.0, 0.1)) == 3
    assert optimizer_floats(SGD(0.1, 0.9, 0.1, 1.0, 0.1), sparse=False) == 2
