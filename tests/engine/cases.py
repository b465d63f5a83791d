"""Models and helpers that the tests of engines share: start, batch, masks, session."""

from __future__ import annotations

from math import prod

import numpy as np

from fedlean.core import SubModel
from fedlean.engine.protocol import SGD, Engine, Session
from fedlean.layers import (
    Add,
    AvgPool2d,
    BatchNorm,
    Conv2d,
    Flatten,
    GlobalAvgPool,
    GroupNorm,
    Hardsigmoid,
    Hardswish,
    Linear,
    MaxPool2d,
    ReLU,
    Scale,
)
from fedlean.spec import INPUT, ModelSpec, Node, sequential

LOSSES = ["ce", "bce"]
FULL_SGD = SGD(0.2, 0.9, 0.05, clip_norm=1.0, proximal=0.1)
MLP = sequential((7,), [("fc1", Linear(6)), ("relu", ReLU()), ("fc2", Linear(4))])
CONV = sequential(
    (2, 6, 6),
    [
        ("conv1", Conv2d(4, 3, padding=1)),
        ("bn", BatchNorm()),
        ("relu1", ReLU()),
        ("pool", MaxPool2d(2)),
        ("conv2", Conv2d(4, 3, groups=2)),
        ("gn", GroupNorm(groups=2)),
        ("flat", Flatten()),
        ("fc", Linear(3)),
    ],
)
PLAIN = sequential(
    (2, 6, 6),
    [
        ("conv", Conv2d(4, 3)),
        ("relu", ReLU()),
        ("flat", Flatten()),
        ("fc1", Linear(8)),
        ("relu2", ReLU()),
        ("fc2", Linear(3)),
    ],
)
NET = sequential(
    (3, 10, 9),
    [
        ("conv1", Conv2d(8, 5, padding=2)),
        ("gn", GroupNorm(groups=2)),
        ("relu1", ReLU()),
        ("pool", MaxPool2d(2)),
        ("conv2", Conv2d(12, 3, padding=1, bias=False)),
        ("bn", BatchNorm()),
        ("swish", Hardswish()),
        ("flat", Flatten()),
        ("fc1", Linear(20)),
        ("relu2", ReLU()),
        ("fc2", Linear(5)),
    ],
)

BLOCK = ModelSpec(  # MobileNetV3's
    (3, 9, 8),
    (
        Node("stem", Conv2d(4, 3, 2, 1, bias=False), (INPUT,)),
        Node("expand", Conv2d(12, 1, bias=False), ("stem",)),
        Node("bn1", BatchNorm(), ("expand",)),
        Node("swish1", Hardswish(), ("bn1",)),
        Node("depth", Conv2d(12, 5, 1, 2, groups=12, bias=False), ("swish1",)),
        Node("bn2", BatchNorm(), ("depth",)),
        Node("swish2", Hardswish(), ("bn2",)),
        Node("squeeze", GlobalAvgPool(), ("swish2",)),
        Node("reduce", Linear(4), ("squeeze",)),
        Node("relu", ReLU(), ("reduce",)),
        Node("excite", Linear(12), ("relu",)),
        Node("gate", Hardsigmoid(), ("excite",)),
        Node("scale", Scale(), ("swish2", "gate")),
        Node("project", Conv2d(4, 1, bias=False), ("scale",)),
        Node("bn3", BatchNorm(), ("project",)),
        Node("sum", Add(), ("bn3", "stem")),
        Node("grouped", Conv2d(6, 3, 1, 1, groups=2), ("sum",)),
        Node("avg", AvgPool2d(3, 2, 1), ("grouped",)),
        Node("flat", Flatten(), ("avg",)),
        Node("fc", Linear(5), ("flat",)),
    ),
)


def start(spec: ModelSpec, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors that keep activations near 1.  None is 0 or 1, so nothing passes by chance."""
    rng = np.random.default_rng(seed)
    weighted = {f"{node.name}.weight" for node in spec.weighted}
    params = {}
    for name, shape in spec.tensor_shapes.items():
        value = rng.standard_normal(shape)
        if name in weighted:
            value *= (2 / prod(shape[1:])) ** 0.5
        elif name.endswith(("weight", "running_var")):  # of a norm
            value = 0.5 + abs(value)
        else:
            value *= 0.3
        params[name] = value.astype(np.float32)
    return params


def start_with_fresh_norms(spec: ModelSpec, seed: int = 0) -> dict[str, np.ndarray]:
    """`start` but for the norms' biases, which are 0 as training begins with them.

    A ReLU above then stands at its kink wherever the norm's inputs are all one value.
    """
    norms = (node.name for node in spec.nodes if isinstance(node.layer, BatchNorm | GroupNorm))
    params = start(spec, seed)
    return params | {f"{name}.bias": np.zeros_like(params[f"{name}.bias"]) for name in norms}


def batch(spec: ModelSpec, size: int = 5, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """x (size, *input_shape) and labels y (size,)."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((size, *spec.input_shape)).astype(np.float32)
    return x, rng.integers(0, spec.output_shape[0], size)


def masks_of(spec: ModelSpec, density: float = 0.5, seed: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.random(spec.param_shapes[name]) < density for name in spec.prunable}


def with_dead_outputs(masks: dict[str, np.ndarray], share: float, seed: int = 3):
    """The masks with about this share of the outputs of every layer pruned whole."""
    rng = np.random.default_rng(seed)
    alive = {name: rng.random(len(mask)) >= share for name, mask in masks.items()}
    return {n: mask & alive[n].reshape(-1, *[1] * (mask.ndim - 1)) for n, mask in masks.items()}


def opened(
    engine: Engine,
    spec: ModelSpec,
    params=None,
    *,
    masks=None,
    frozen=(),
    sgd: SGD = SGD(0.1),  # noqa: B008
    loss: str = "ce",
    batch_size: int = 5,
) -> Session:
    sub_model = SubModel(masks=masks or {}, frozen=frozenset(frozen))
    params = start(spec) if params is None else params
    return engine.open(spec, params, sub_model, batch_size=batch_size, optimizer=sgd, loss=loss)


def packed(params, masks):
    """Masked tensors as their kept values, row-major."""
    return {name: v[masks[name]] if name in masks else v for name, v in params.items()}


def positive_zeros(values, masks) -> bool:
    """Whether all pruned coordinates are +0, in every bit."""
    return all(not values[n][~mask].view(np.uint32).any() for n, mask in masks.items())


def assert_near(got, expected, tolerance=1e-5):
    assert set(got) == set(expected)
    for name in expected:
        np.testing.assert_allclose(
            got[name], expected[name], rtol=tolerance, atol=tolerance, err_msg=name
        )


def mlp_by_hand(params, x, y, loss="ce"):
    """Loss, activations, gradients and dL/dlogits of `MLP` in float64."""
    p = {name: value.astype(np.float64) for name, value in params.items()}
    x = x.astype(np.float64)
    size, rows = len(y), np.arange(len(y))
    before = x @ p["fc1.weight"].T + p["fc1.bias"]
    hidden = np.maximum(before, 0)
    logits = hidden @ p["fc2.weight"].T + p["fc2.bias"]
    one_hot = np.eye(logits.shape[1])[y]
    if loss == "ce":
        shifted = np.exp(logits - logits.max(1, keepdims=True))
        probability = shifted / shifted.sum(1, keepdims=True)
        value = -np.log(probability[rows, y]).mean()
        d_logits = (probability - one_hot) / size
    else:
        probability = 1 / (1 + np.exp(-logits))
        terms = one_hot * np.log(probability) + (1 - one_hot) * np.log(1 - probability)
        value = -terms.mean()
        d_logits = (probability - one_hot) / logits.size
    d_before = (d_logits @ p["fc2.weight"]) * (before > 0)
    gradients = {
        "fc1.weight": d_before.T @ x,
        "fc1.bias": d_before.sum(0),
        "fc2.weight": d_logits.T @ hidden,
        "fc2.bias": d_logits.sum(0),
    }
    return value, {"fc1": before, "relu": hidden, "fc2": logits}, gradients, d_logits
