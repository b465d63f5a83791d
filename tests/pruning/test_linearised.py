"""Linear maps and their transposes against PyTorch's autograd in float64, and by hand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedlean import layers as L
from fedlean.models.initialise import init_params
from fedlean.pruning.linearised import linear_map, magnitudes
from fedlean.spec import INPUT, Node, sequential


def in_torch(layer, x, weight):
    """The same map by other means, on tensors (1, C, H, W), (1, C, L) or (1, F)."""
    match layer:
        case L.Linear():
            return F.linear(x, weight)
        case L.Conv2d(stride=s, padding=p, groups=g, dilation=d):
            return (F.conv2d if x.ndim == 4 else F.conv1d)(x, weight, None, s, p, d, g)
        case L.MaxPool2d(kernel_size=k, stride=s, padding=p):
            return (F.max_pool2d if x.ndim == 4 else F.max_pool1d)(x, k, s, p)
        case L.AvgPool2d(kernel_size=k, stride=s, padding=p):
            return (F.avg_pool2d if x.ndim == 4 else F.avg_pool1d)(x, k, s, p)
        case L.GlobalAvgPool():
            return x.flatten(2).mean(2)
        case L.BatchNorm() | L.GroupNorm():
            return x * weight.reshape(1, -1, *[1] * (x.ndim - 2))
        case L.Flatten():
            return x.flatten(1)
    return x


IMAGES = [
    L.Conv2d(4, 3),
    L.Conv2d(4, 3, stride=2, padding=1),
    L.Conv2d(8, 2, stride=3, padding=2, groups=2),
    L.Conv2d(4, 5, padding=2, groups=4),
    L.Conv2d(6, 1),
    L.MaxPool2d(2),
    L.MaxPool2d(3, stride=2, padding=1),
    L.MaxPool2d(2, stride=3),
    L.AvgPool2d(2),
    L.AvgPool2d(3, stride=2, padding=1),
    L.GlobalAvgPool(),
    L.BatchNorm(),
    L.GroupNorm(groups=2),
    L.ReLU(),
    L.Hardswish(),
    L.Hardsigmoid(),
    L.Scaler(2.0),
    L.Dropout(0.5),
    L.SiLU(),
    L.Flatten(),
    L.Conv2d(4, (3, 2), (1, 2), (2, 0), dilation=(2, 1)),
    L.MaxPool2d((1, 3), (2, 1)),
    L.AvgPool2d((3, 2), (1, 2), (1, 0)),
]
SIGNALS = [
    L.Conv1d(6, 3, stride=2, padding=2, groups=2, dilation=2),
    L.MaxPool1d(3, stride=2, padding=1),
    L.AvgPool1d(2),
    L.GlobalAvgPool(),
    L.BatchNorm(),
    L.Flatten(),
]
VECTORS = [L.Linear(5), L.Linear(1, bias=False), L.BatchNorm(), L.GroupNorm(), L.Flatten()]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        *((layer, (4, 7, 6)) for layer in IMAGES),
        *((layer, (4, 11)) for layer in SIGNALS),
        *((layer, (4,)) for layer in VECTORS),
    ],
    ids=str,
)
def test_map_and_transpose_equal_autograd(layer, shape) -> None:
    rng = np.random.default_rng(0)
    spec = sequential(shape, [("node", layer)])
    x = rng.random(shape)
    held = {name: rng.random(s) for name, s in spec.param_shapes.items() if "weight" in name}
    output, pull = linear_map(spec.nodes[0], [x], held)
    assert output.shape == spec.output_shape and output.dtype == np.float64

    leaf = torch.tensor(x[None], requires_grad=True)
    weight = torch.tensor(held["node.weight"], requires_grad=True) if held else None
    expected = in_torch(layer, leaf, weight)
    np.testing.assert_allclose(output, expected[0].detach().numpy(), rtol=1e-12)

    g = rng.random(output.shape)
    expected.backward(torch.tensor(g[None]))
    (to_input,), to_weight = pull(g)
    np.testing.assert_allclose(to_input, leaf.grad[0].numpy(), rtol=1e-12, atol=1e-15)
    if isinstance(layer, L.Linear | L.Conv2d):
        np.testing.assert_allclose(to_weight, weight.grad.numpy(), rtol=1e-12)
    else:
        assert to_weight is None


def test_sums_and_gates_by_hand() -> None:
    """A gate is added to its channel, at every pixel; what flows back to it is their sum."""
    x, gate = np.arange(8.0).reshape(2, 2, 2), np.array([10.0, 20.0])
    scaled, pull = linear_map(Node("gated", L.Scale(), (INPUT, "gate")), [x, gate], {})
    assert scaled.tolist() == [[[10, 11], [12, 13]], [[24, 25], [26, 27]]]
    (to_x, to_gate), _ = pull(x)
    assert to_x.tolist() == x.tolist() and to_gate.tolist() == [0 + 1 + 2 + 3, 4 + 5 + 6 + 7]

    joined, pull = linear_map(Node("cat", L.Concat(), (INPUT, "a")), [x, 2 * x[:1]], {})
    assert joined.tolist() == [*x.tolist(), (2 * x[0]).tolist()]
    assert [gradient.tolist() for gradient in pull(joined)[0]] == [x.tolist(), (2 * x[:1]).tolist()]

    total, pull = linear_map(Node("sum", L.Add(), (INPUT, "a", "b")), [x, x, 2 * x], {})
    assert total.tolist() == (4 * x).tolist()
    assert [gradient.tolist() for gradient in pull(x)[0]] == [x.tolist()] * 3


def test_max_pool_routes_ties_to_the_first() -> None:
    spec = sequential((1, 2, 2), [("pool", L.MaxPool2d(2))])
    _, pull = linear_map(spec.nodes[0], [np.ones((1, 2, 2))], {})
    assert pull(np.full((1, 1, 1), 7.0))[0][0].tolist() == [[[7, 0], [0, 0]]]


def test_magnitudes_by_hand() -> None:
    """|w|, of a BatchNorm |γ| / sqrt(var + eps) = 6 / sqrt(8.75 + 0.25) = 2; no bias anywhere."""
    layers = [("fc", L.Linear(1)), ("norm", L.BatchNorm(eps=0.25))]
    spec = sequential((2,), layers)
    params = {name: value.copy() for name, value in init_params(spec, 0).items()}
    params["fc.weight"][:] = [[-3.0, 4.0]]
    params["norm.weight"][:] = -6.0
    params["norm.running_var"][:] = 8.75
    held = magnitudes(spec, params)
    assert {name: value.tolist() for name, value in held.items()} == {
        "fc.weight": [[3.0, 4.0]],
        "norm.weight": [2.0],
    }
    assert params["fc.weight"].tolist() == [[-3.0, 4.0]]


def test_a_layer_without_a_linear_form_is_named() -> None:
    @dataclass(frozen=True)
    class Sine:
        pass

    with pytest.raises(ValueError, match="'wave': Sine"):
        linear_map(Node("wave", Sine(), (INPUT,)), [np.ones(2)], {})  # pyright: ignore
