"""Norms of channels that are all one value, as pruning whole outputs leaves them.

The mean is then that value and the variance 0, so that the output is exactly the norm's bias.  A
rounding of the mean would come out 1/sqrt(eps) = 316 times as large; where the bias is 0 it would
pass a ReLU, and its gradient with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, product

import numpy as np
import pytest
from engine.cases import batch, opened, start

from fedlean.engine.open import open_engine
from fedlean.engine.protocol import SGD, Engine
from fedlean.layers import BatchNorm, Conv2d, Flatten, GlobalAvgPool, GroupNorm, Linear, ReLU
from fedlean.spec import ModelSpec, sequential

CHANNELS, CLASSES, LR = 6, 3, 0.1
CONSTANTS = [0.3, 0.1, 1e-3, 1e4 + 0.1, -0.7, 0.5]
SHAPES = [(2, 1, 1), (2, 1, 3), (2, 2, 2), (2, 5, 3), (2, 9, 8), (4,)]
NORMS = {
    "batch": BatchNorm(),
    "group": GroupNorm(groups=2),
    "group of all": GroupNorm(groups=1),
    "group of each": GroupNorm(groups=CHANNELS),
}
NORM_BIAS = np.float32([0, 0.25, -0.3, 0, 1, 0.1])
INSTRUCTION_SETS = ["reference", "avx2", "avx512", "neon"]
ENGINES = ["torch", "native on 3 threads", *INSTRUCTION_SETS]


@pytest.fixture(params=ENGINES)
def any_engine(request, monkeypatch) -> Engine:
    """Torch's, and the native one on every instruction set of this machine."""
    if request.param == "torch":
        return open_engine("torch", 1)
    request.getfixturevalue("has_native")
    if request.param not in INSTRUCTION_SETS:
        return open_engine("native", 3)
    monkeypatch.setenv("FEDLEAN_INSTRUCTION_SET", request.param)
    try:
        return open_engine("native", 1)
    except ValueError:
        pytest.skip(f"{request.param} is not of this machine")


def below_a_relu(norm, shape) -> ModelSpec:
    stem = Conv2d(CHANNELS, 3, padding=1) if len(shape) == 3 else Linear(CHANNELS)
    pool = GlobalAvgPool() if len(shape) == 3 else Flatten()
    above = [("norm", norm), ("relu", ReLU()), ("pool", pool), ("head", Linear(CLASSES))]
    return sequential(shape, [("stem", stem), *above])


def params_with(spec: ModelSpec, constant: float) -> dict[str, np.ndarray]:
    fixed = {"stem.bias": np.full(CHANNELS, constant, np.float32), "norm.bias": NORM_BIAS}
    return start(spec) | fixed


def dead_from(spec: ModelSpec, channel: int) -> dict[str, np.ndarray]:
    """A mask without the outputs of the stem from `channel` on."""
    mask = np.ones(spec.param_shapes["stem.weight"], bool)
    mask[channel:] = False
    return {"stem.weight": mask}


def batches(norm, shape) -> Iterator[int]:
    """All sizes around one and two panels; BatchNorm needs two values."""
    alone = isinstance(norm, BatchNorm) and np.prod(shape[1:]) == 1
    yield from range(2 if alone else 1, 34)


def step_by_hand(params, norm, y, pixels: int) -> dict[str, np.ndarray]:
    """The parameters of norm and stem bias after a step in float64, all channels being dead."""
    p = {name: value.astype(np.float64) for name, value in params.items()}
    logits = p["head.weight"] @ np.maximum(p["norm.bias"], 0) + p["head.bias"]
    exponents = np.exp(logits - logits.max())
    d_logits = exponents / exponents.sum() - np.eye(CLASSES)[y].mean(0)  # summed over examples
    d_bias = (p["head.weight"].T @ d_logits) * (p["norm.bias"] > 0)
    after = {"norm.bias": p["norm.bias"] - LR * d_bias, "norm.weight": p["norm.weight"]}
    scaled = (p["norm.weight"] * d_bias).reshape(getattr(norm, "groups", CHANNELS), -1)
    d_stem = (scaled - scaled.mean(1, keepdims=True)).ravel() / np.sqrt(norm.eps)
    after["stem.bias"] = p["stem.bias"] - LR * d_stem
    if isinstance(norm, BatchNorm):
        keep, mean, var = 1 - norm.momentum, "norm.running_mean", "norm.running_var"
        after |= {mean: keep * p[mean] + norm.momentum * p["stem.bias"], var: keep * p[var]}
    return after


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_output_is_the_bias_and_a_step_leaves_what_float64_leaves(any_engine, norm):
    constants = cycle(CONSTANTS)
    for shape in SHAPES:
        spec = below_a_relu(norm, shape)
        session = opened(any_engine, spec, masks=dead_from(spec, 0), sgd=SGD(LR), batch_size=33)
        for size in batches(norm, shape):
            constant = next(constants)
            params, (x, y) = params_with(spec, constant), batch(spec, size)
            session.load(params)
            out = session.forward(x, taps=["norm"], training=True)["norm"]
            assert (out.swapaxes(1, -1) == NORM_BIAS).all(), (shape, size, constant)
            session.load(params)
            session.step(x, y)
            after, want = session.params(), step_by_hand(params, norm, y, np.prod(shape[1:]))
            # 1/sqrt(eps) enlarges what rounds in the gradient of the stem
            near = {"stem.bias": 1e-6 / np.sqrt(norm.eps)}
            for name, value in want.items():
                np.testing.assert_allclose(
                    after[name],
                    value,
                    rtol=1e-6,
                    atol=near.get(name, 1e-6),
                    err_msg=f"{name} {shape} {size} {constant}",
                )
            stays = NORM_BIAS <= 0  # nothing passes the ReLU
            assert (after["norm.bias"][stays] == NORM_BIAS[stays]).all()
            assert (after["norm.weight"] == params["norm.weight"]).all()


@pytest.mark.parametrize("norm", ["batch", "group", "group of each"])
def test_dead_channels_beside_live_ones(any_engine, norm):
    """Of a stem that is stored densely; a group must be dead as a whole."""
    constants = cycle(CONSTANTS)
    for shape, size in product(SHAPES, (3, 16, 17, 21)):
        spec, constant = below_a_relu(NORMS[norm], shape), next(constants)
        session = opened(
            any_engine,
            spec,
            params_with(spec, constant),
            masks=dead_from(spec, 3),
            batch_size=size,
        )
        out = session.forward(batch(spec, size)[0], taps=["norm"], training=True)["norm"]
        dead = out[:, 3:].swapaxes(1, -1)
        assert (dead == NORM_BIAS[3:]).all(), (shape, size, constant)
        assert out[:, :3].std() > 0.1 or np.prod(shape[1:]) == 1


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("any_engine", ENGINES[1:], indirect=True)
def test_evaluation(any_engine, norm):
    """BatchNorm where it has run for long: its mean is the value, its variance next to nothing.

    Not of PyTorch, whose evaluation rounds; no gradient sees that.
    """
    for constant, shape in zip(CONSTANTS, SHAPES, strict=True):
        spec = below_a_relu(NORMS[norm], shape)
        params = params_with(spec, constant)
        if norm == "batch":
            params["norm.running_mean"] = params["stem.bias"]
            params["norm.running_var"] = np.full(CHANNELS, 1e-12, np.float32)
        session = opened(any_engine, spec, params, masks=dead_from(spec, 0), batch_size=21)
        out = session.forward(batch(spec, 21)[0], taps=["norm"])["norm"]
        assert (out.swapaxes(1, -1) == NORM_BIAS).all(), (shape, constant)
