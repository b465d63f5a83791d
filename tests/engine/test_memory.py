"""The memory models against the engines: live bytes of torch, the native plan, and by hand."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from live_memory import peak_bytes

from fedlean.core import SubModel
from fedlean.engine.memory import forward_memory, step_memory
from fedlean.engine.native_forward_plan import CONV_BLOCK, LINEAR_BLOCK
from fedlean.engine.native_storage import SPARSE_CONV_BELOW, SPARSE_LINEAR_BELOW
from fedlean.engine.open import open_engine
from fedlean.engine.protocol import SGD
from fedlean.engine.torch import TorchEngine
from fedlean.layers import Conv2d, Flatten, Linear
from fedlean.models import catalog
from fedlean.models.initialise import init_params
from fedlean.spec import sequential

THRESHOLDS = Path(__file__).parents[2] / "native" / "src" / "layers" / "thresholds.h"
SHAPES = {"lenet300": (1, 28, 28), "conv2": (1, 28, 28), "vgg11": (3, 32, 32)}
SHAPES |= {"resnet8": (3, 32, 32), "resnet20": (3, 32, 32)}


@pytest.mark.parametrize("model", sorted(SHAPES))
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("masked", [False, True])
def test_dense_claim_is_within_15_percent_of_live_bytes(model, momentum, masked):
    spec = catalog.build(model, SHAPES[model], 10)
    params = init_params(spec, 0)
    masks = {}
    if masked:
        masks = {name: np.ones(spec.param_shapes[name], bool) for name in spec.prunable}
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, *SHAPES[model])).astype(np.float32)
    y = rng.integers(0, 10, 8)

    def train() -> None:
        session = TorchEngine(1).open(
            spec, params, SubModel(masks=masks), batch_size=8, optimizer=SGD(0.01, momentum)
        )
        session.step(x, y, importance=masked)
        session.step(x, y, importance=masked)

    claim = step_memory(
        spec,
        dict.fromkeys(masks, 0),
        batch_size=8,
        optimizer_floats=1 if momentum else 0,
        importance=masked,
        sparse=False,
    ).peak_bytes
    measured = peak_bytes(train)
    assert abs(claim - measured) <= 0.15 * measured, (claim, measured)


NATIVE = {"conv2": (1, 28, 28), "lenet300": (1, 28, 28), "vgg11": (3, 32, 32)}
NATIVE |= {"resnet8": (3, 32, 32), "resnet18": (3, 32, 32), "mobilenetv3_small": (3, 32, 32)}


@pytest.mark.usefixtures("has_native")
@pytest.mark.parametrize("density", [1.0, 0.5, 0.3, 0.1, 0.01])
@pytest.mark.parametrize("model", sorted(NATIVE))
def test_native_claim_is_the_plan(model, density):
    """With and without momentum and importance, a batch of one, of two panels and of four."""
    spec = catalog.build(model, NATIVE[model], 10)
    kept, params, masks = pruned(spec, density)
    engine = open_engine("native", 1)
    for batch_size, momentum in ((1, 0.9), (20, 0.0), (20, 0.9), (64, 0.0)):
        session = engine.open(
            spec,
            params,
            SubModel(masks=masks),
            batch_size=batch_size,
            optimizer=SGD(0.01, momentum),
        )
        plain, importance = (
            step_memory(
                spec,
                kept,
                batch_size=batch_size,
                optimizer_floats=1 if momentum else 0,
                importance=flag,
            ).peak_bytes
            for flag in (False, True)
        )
        assert plain == session.peak_memory_bytes
        if batch_size == 20:
            x = np.zeros((2, *NATIVE[model]), np.float32)
            session.step(x, np.zeros(2, np.int64), importance=True)
            assert importance == session.peak_memory_bytes


def pruned(spec, density):
    """(kept counts, packed zeros, masks) at one density."""
    rng = np.random.default_rng(0)
    masks = {}
    if density < 1:
        masks = {name: rng.random(spec.param_shapes[name]) < density for name in spec.prunable}
    kept = {name: int(mask.sum()) for name, mask in masks.items()}
    params = {
        name: np.zeros(kept.get(name, shape), np.float32)
        for name, shape in spec.tensor_shapes.items()
    }
    return kept, params, masks


@pytest.mark.usefixtures("has_native")
def test_native_claim_with_frozen_layers():
    """Frozen weights have no momentum."""
    spec = catalog.build("vgg11", NATIVE["vgg11"], 10)
    params = {name: np.zeros(shape, np.float32) for name, shape in spec.tensor_shapes.items()}
    frozen = frozenset(list(spec.tensor_shapes)[:8])
    session = open_engine("native", 1).open(
        spec, params, SubModel(frozen=frozen), batch_size=20, optimizer=SGD(0.01, 0.9)
    )
    claim, all_trained = (
        step_memory(spec, {}, batch_size=20, optimizer_floats=1, frozen=names).peak_bytes
        for names in (frozen, frozenset())
    )
    assert claim == session.peak_memory_bytes
    frozen_bytes = 4 * sum(value.size for name, value in params.items() if name in frozen)
    assert claim <= all_trained - frozen_bytes


def test_native_linear_by_hand():
    """Linear 100 -> 10, no bias, 40 kept; batch 3, which takes four lanes.

    Stored: value 4, momentum 4 and row 2 bytes each, and where its 10 rows start: 11 times 4.
    Importance: 1000 sums.  At the peak of a plain step: input 400 floats, output 40, its gradient
    40 and 2048 of scratch, in cache lines of 16 floats; of an importance step, also 300 + 30 and 8
    rows of 100 of a dense gradient.
    """
    spec = sequential((100,), [("fc", Linear(10, bias=False))])
    kept = {"fc.weight": 40}
    plain = step_memory(spec, kept, batch_size=3, optimizer_floats=1)
    assert plain.parameter_bytes == 40 * 10 + 11 * 4
    assert plain.importance_bytes == 0
    assert plain.activation_bytes == 4 * (400 + 48 + 48 + 2048)
    memory = step_memory(spec, kept, batch_size=3, optimizer_floats=1, importance=True)
    assert memory.parameter_bytes == plain.parameter_bytes
    assert memory.importance_bytes == 4000
    assert memory.activation_bytes == 4 * (400 + 48 + 48 + 3184)
    assert memory.peak_bytes == 444 + 4000 + memory.activation_bytes


def test_native_conv_by_hand():
    """Conv 2 -> 3, 1x1, no bias, 2 of 6 kept: one chunk of 16 bytes and 3 rows.

    Each kept value takes 4 bytes and an offset of 2; rows a byte and a start of 4, and one more
    start.  Nothing is kept for a gradient of the model's input.
    """
    spec = sequential((2, 4, 4), [("conv", Conv2d(3, 1, bias=False)), ("flat", Flatten())])
    memory = step_memory(spec, {"conv.weight": 2}, batch_size=4)
    assert memory.parameter_bytes == 2 * 6 + 16 + 3 + 4 * 4


def test_a_linear_that_keeps_much_is_stored_densely():
    """Then 1000 values and a byte of mask each; else 4 + 2 bytes for each kept, and 11 starts."""
    spec = sequential((100,), [("flat", Flatten()), ("fc", Linear(10, bias=False))])
    assert step_memory(spec, {}, batch_size=1).parameter_bytes == 4000
    many = round(1000 * SPARSE_LINEAR_BELOW)
    few = many - 1
    assert step_memory(spec, {"fc.weight": many}, batch_size=1).parameter_bytes == 5000
    assert step_memory(spec, {"fc.weight": few}, batch_size=1).parameter_bytes == few * 6 + 44


@pytest.mark.skipif(not THRESHOLDS.is_file(), reason="not in a checkout")
def test_thresholds_are_those_of_the_native_engine():
    text = THRESHOLDS.read_text()
    for name, ours in (("Conv", SPARSE_CONV_BELOW), ("Linear", SPARSE_LINEAR_BELOW)):
        (theirs,) = re.findall(rf"kSparse{name}Below = ([0-9.]+);", text)
        assert ours == float(theirs), name


# Forward only


@pytest.mark.usefixtures("has_native")
@pytest.mark.parametrize("density", [1.0, 0.9, 0.6, 0.3, 0.1, 0.01])
@pytest.mark.parametrize("model", sorted(NATIVE))
def test_native_forward_claim_is_the_plan(model, density):
    """To the byte: batches of a part of a panel, of one, of more than run at once."""
    spec = catalog.build(model, NATIVE[model], 10)
    kept, params, masks = pruned(spec, density)
    engine = open_engine("native", 3)
    some = frozenset([*list(spec.tensor_shapes)[:3], spec.prunable[-1]])
    for batch_size, at_once, frozen in ((1, 1, some), (20, 2, frozenset()), (70, 3, some)):
        session = engine.open_forward(
            spec,
            params,
            SubModel(masks=masks, frozen=frozen),
            batch_size=batch_size,
            directions_at_once=at_once,
        )
        claim = forward_memory(
            spec, kept, batch_size=batch_size, frozen=frozen, directions_at_once=at_once
        )
        assert claim.peak_bytes == session.peak_memory_bytes
        assert claim.parameter_bytes == session.held_bytes


@pytest.mark.parametrize("model", sorted(SHAPES))
@pytest.mark.parametrize("masked", [False, True])
def test_dense_forward_claim_is_within_15_percent_of_live_bytes(model, masked):
    spec = catalog.build(model, SHAPES[model], 10)
    params = init_params(spec, 0)
    masks = {}
    if masked:
        masks = {name: np.ones(spec.param_shapes[name], bool) for name in spec.prunable}
    x = np.random.default_rng(0).standard_normal((32, *SHAPES[model])).astype(np.float32)

    def evaluate() -> None:
        session = TorchEngine(1).open_forward(spec, params, SubModel(masks=masks), batch_size=32)
        session.losses_perturbed(x, np.zeros(32, np.int64), seed=0, ks=[0], sigma=0.1)

    claim = forward_memory(spec, dict.fromkeys(masks, 0), batch_size=32, sparse=False).peak_bytes
    claim += x.nbytes  # the caller's
    measured = peak_bytes(evaluate)
    assert abs(claim - measured) <= 0.15 * measured, (claim, measured)


def test_native_forward_linear_by_hand():
    """Linear 100 -> 10 with bias, 40 kept; batch 3, which takes four lanes.

    Stored: value 4 and row 2 bytes each, where its 10 rows start, and the bias.  At once: input 400
    floats, output 40, and in the scratch layer 40 weights, 10 biases and 100 of rank one's columns,
    in cache lines of 16 floats.  Frozen: no scratch.
    """
    spec = sequential((100,), [("fc", Linear(10))])
    kept = {"fc.weight": 40}
    memory = forward_memory(spec, kept, batch_size=3)
    assert memory.parameter_bytes == 40 * 6 + 11 * 4 + 10 * 4
    assert memory.activation_bytes == 4 * (400 + 48 + (48 + 16 + 100 + 12))
    assert memory.peak_bytes == memory.parameter_bytes + memory.activation_bytes
    twice = forward_memory(spec, kept, batch_size=3, directions_at_once=2)
    assert twice.activation_bytes == 2 * memory.activation_bytes
    frozen = frozenset(spec.param_shapes)
    still = forward_memory(spec, kept, batch_size=3, frozen=frozen)
    assert still.activation_bytes == 4 * (400 + 48)


def test_resnet20_takes_a_seventh_of_backpropagation():
    spec = catalog.build("resnet20", (3, 32, 32), 10)
    forward = forward_memory(spec, {}, batch_size=32).peak_bytes
    assert 7 * forward <= step_memory(spec, {}, batch_size=32).peak_bytes


@pytest.mark.parametrize("model", ["conv2", "resnet8", "resnet18", "vgg11"])
@pytest.mark.parametrize("density", [1.0, 0.2])
def test_forward_only_takes_less_than_training(model, density):
    """Not a small MLP: its training, which updates in place, holds hardly more than its weights."""
    spec = catalog.build(model, NATIVE[model], 10)
    kept, _, _ = pruned(spec, density)
    for batch_size in (4, 32):
        forward = forward_memory(spec, kept, batch_size=batch_size).peak_bytes
        assert forward < step_memory(spec, kept, batch_size=batch_size).peak_bytes


@pytest.mark.skipif(not THRESHOLDS.is_file(), reason="not in a checkout")
def test_blocks_are_those_of_the_native_engine():
    for source, ours in (("linear", LINEAR_BLOCK), ("conv_dense", CONV_BLOCK)):
        text = (THRESHOLDS.parent / f"{source}.cpp").read_text()
        (theirs,) = re.findall(r"kMovedFloats = (\d+);", text)
        assert ours == int(theirs), source
