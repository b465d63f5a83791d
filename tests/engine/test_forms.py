"""Which layers take the slower form: as many as the memory asks for, and the engine holds that."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from engine.cases import start
from engine.test_agrees_random import networks
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlean.core import SubModel
from fedlean.engine.forms import forward_forms, step_forms
from fedlean.engine.memory import forward_memory, optimizer_floats, step_memory
from fedlean.engine.open import open_engine
from fedlean.engine.protocol import SGD
from fedlean.layers import Conv2d, Flatten, Linear, ReLU
from fedlean.models import catalog
from fedlean.spec import sequential
from fedlean.tree import kept_counts

RUNS = settings(max_examples=100, deadline=None, derandomize=True, database=None)
DENSITIES = st.sampled_from([0.05, 0.3, 0.45, 0.5, 0.6, 0.69, 0.75, 0.85, 0.95])
MLP = sequential(
    (100,), [("a", Linear(50)), ("relu", ReLU()), ("b", Linear(40)), ("c", Linear(10))]
)
LARGE = 10**12
SIZES = {name: prod(MLP.param_shapes[name]) for name in MLP.prunable}


def kept_at(spec, density):
    return {name: int(density * prod(spec.param_shapes[name])) for name in spec.prunable}


def masks_at(spec, density):
    """In every prunable tensor exactly `kept_at` coordinates."""
    rng, masks = np.random.default_rng(0), {}
    for name, count in kept_at(spec, density).items():
        flat = np.zeros(prod(spec.param_shapes[name]), np.bool_)
        flat[rng.permutation(flat.size)[:count]] = True
        masks[name] = flat.reshape(spec.param_shapes[name])
    return masks


def forms(spec, kept, memory_bytes, floats=0, batch_size=4):
    return step_forms(spec, kept, memory_bytes, batch_size=batch_size, optimizer_floats=floats)


def needs(spec, kept, slower=frozenset(), floats=0, batch_size=4):
    return step_memory(
        spec, kept, batch_size=batch_size, optimizer_floats=floats, slower=slower
    ).peak_bytes


def test_what_a_linear_layer_takes_in_either_form():
    """60% of 40 x 50: 8,000 bytes and a mask of 2,000, or 1,200 values, rows and 51 starts."""
    kept = {"b.weight": 1200}
    plain, smaller = (
        step_memory(MLP, kept, batch_size=4, slower=slower).parameter_bytes
        for slower in (frozenset(), frozenset({"b"}))
    )
    assert plain - smaller == (8000 + 2000) - (1200 * 6 + 4 * 51)


def test_layers_take_the_slower_form_as_the_memory_asks_for_it():
    """The one whose weights save the most first: `a`, then `b`, then `c`."""
    kept = kept_at(MLP, 0.6)
    order = [frozenset(), frozenset("a"), frozenset("ab"), frozenset("abc")]
    peaks = [needs(MLP, kept, slower) for slower in order]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 4
    assert forms(MLP, kept, None) == forms(MLP, kept, LARGE) == frozenset()
    for slower, before, peak in zip(order[1:], peaks, peaks[1:], strict=False):
        assert forms(MLP, kept, before) == order[peaks.index(before)]
        assert forms(MLP, kept, before - 1) == slower
        assert forms(MLP, kept, peak) == slower
    assert forms(MLP, kept, peaks[-1] - 1) == order[-1]  # none fits: the least


def test_a_layer_without_another_form_that_is_smaller_keeps_its_own():
    assert forms(MLP, {}, 1) == frozenset()
    assert forms(MLP, SIZES, 1) == frozenset()  # whole
    assert forms(MLP, kept_at(MLP, 0.3), 1) == frozenset()  # sparse is smaller
    assert forms(MLP, kept_at(MLP, 0.95), 1) == frozenset()  # dense is smaller
    # 85%: 5.1 bytes of each weight against 5; with two floats of an optimiser 11.9 against 13
    assert forms(MLP, {"a.weight": 4250}, 1) == frozenset()
    assert forms(MLP, {"a.weight": 4250}, 1, floats=2) == frozenset("a")


def test_a_convolution_that_keeps_half_is_smaller_densely():
    """Values, two offsets and a place, 12 bytes of each kept weight, against 5 of every weight."""
    conv = Conv2d(64, 3, padding=1)
    spec = sequential((64, 4, 4), [("a", conv), ("b", conv), ("flat", Flatten()), ("c", Linear(3))])
    kept = {"b.weight": 64 * 64 * 9 // 2}
    peak = needs(spec, kept)
    assert forms(spec, kept, peak - 1) == frozenset("b")
    assert needs(spec, kept, frozenset("b")) < 0.9 * peak
    assert forms(spec, kept, peak - 1, floats=2) == frozenset()  # its optimiser has more to hold


def test_grouped_convolutions_and_large_images_have_one_form():
    grouped = Conv2d(8, 3, groups=4)
    spec = sequential((4, 6, 6), [("a", grouped), ("flat", Flatten()), ("c", Linear(3))])
    assert forms(spec, {"a.weight": 60}, 1) == frozenset()
    large = sequential((1, 300, 300), [("a", Conv2d(2, 3)), ("flat", Flatten()), ("c", Linear(2))])
    assert forms(large, {"a.weight": 9}, 1, floats=1) == frozenset()


@RUNS
@given(networks(), DENSITIES, st.integers(1, 33), st.integers(0, 2), st.floats(0, 1.2))
def test_never_more_than_the_faster_forms_and_within_the_memory_where_any_is(
    spec, density, batch_size, floats, share
):
    kept = kept_at(spec, density)
    faster = needs(spec, kept, floats=floats, batch_size=batch_size)
    memory_bytes = int(share * faster)
    slower = forms(spec, kept, memory_bytes, floats, batch_size)
    taken = needs(spec, kept, slower, floats, batch_size)
    assert taken <= faster
    assert not slower or faster > memory_bytes
    least = forms(spec, kept, 1, floats, batch_size)
    assert taken <= memory_bytes or taken == needs(spec, kept, least, floats, batch_size)


@pytest.mark.usefixtures("has_native")
@RUNS
@given(networks(), DENSITIES, st.sampled_from([1, 3, 17]), st.booleans(), st.booleans())
def test_the_engine_holds_what_the_plan_says(spec, density, batch_size, momentum, clips):
    masks = masks_at(spec, density)
    kept = kept_counts(masks)
    sgd = SGD(0.1, momentum=0.9 * momentum, clip_norm=1.0 if clips else None)
    slower = forms(spec, kept, 1, optimizer_floats(sgd), batch_size)
    engine, sub_model = open_engine("native", 1), SubModel(masks=masks)
    session = engine.open(
        spec, start(spec), sub_model, batch_size=batch_size, optimizer=sgd, slower=slower
    )
    plain, importance = (
        step_memory(
            spec,
            kept,
            batch_size=batch_size,
            optimizer_floats=optimizer_floats(sgd),
            importance=flag,
            slower=slower,
        ).peak_bytes
        for flag in (False, True)
    )
    assert session.peak_memory_bytes == plain
    x = np.zeros((2, *spec.input_shape), np.float32)
    if batch_size > 1:
        session.step(x, np.zeros(2, np.int64), importance=True)
        assert session.peak_memory_bytes == importance
    slower = forward_forms(spec, kept, 1, batch_size=batch_size)
    forward = engine.open_forward(
        spec, start(spec), sub_model, batch_size=batch_size, slower=slower
    )
    claim = forward_memory(spec, kept, batch_size=batch_size, slower=slower)
    assert forward.peak_memory_bytes == claim.peak_bytes


@pytest.mark.usefixtures("has_native")
@pytest.mark.parametrize("density", [0.05, 0.45, 0.6, 0.85])
@RUNS
@given(spec=networks())
def test_either_form_trains_the_same_weights(spec, density):
    masks = masks_at(spec, density)
    every = frozenset(node.name for node in spec.weighted)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(5, *spec.input_shape)).astype(np.float32)
    y = rng.integers(0, spec.output_shape[0], 5)
    sgd = SGD(0.01, momentum=0.9, weight_decay=0.1)
    found = []
    for slower in (frozenset(), every):
        session = open_engine("native", 1).open(
            spec, start(spec), SubModel(masks=masks), batch_size=5, optimizer=sgd, slower=slower
        )
        loss = session.step(x, y, importance=True)
        found.append(({"loss": loss, **session.params()}, session.importance()))
    (faster, sums), (slower, other_sums) = found
    most = max(float(value.max()) for value in sums.values())
    for name, value in faster.items():
        np.testing.assert_allclose(slower[name], value, rtol=2e-3, atol=2e-5, err_msg=name)
    for name, value in sums.items():
        np.testing.assert_allclose(other_sums[name], value, 2e-3, 1e-4 * most, err_msg=name)


# The gain, at its least, of the models that take most of it; `benchmarks/forms.py` prints all
@pytest.mark.parametrize(
    ("model", "shape", "density", "floats", "saves"),
    [
        ("conv2", (3, 32, 32), 0.6, 0, 0.20),
        ("conv2", (3, 32, 32), 0.6, 1, 0.25),
        ("mlp", (1, 28, 28), 0.6, 0, 0.20),
        ("resnet18", (3, 32, 32), 0.65, 0, 0.10),
    ],
)
def test_what_it_saves_of_a_step(model, shape, density, floats, saves):
    spec = catalog.build(model, shape, 10)
    kept = kept_at(spec, density)
    faster = needs(spec, kept, floats=floats, batch_size=32)
    slower = forms(spec, kept, 1, floats, 32)
    assert needs(spec, kept, slower, floats, 32) <= (1 - saves) * faster
