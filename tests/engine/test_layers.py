"""Every layer against torch.nn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engine.cases import (
    assert_near,
    batch,
    opened,
    start,
)
from torch import nn

from fedlean.core import derive_seed
from fedlean.engine.protocol import SGD
from fedlean.layers import (
    GELU,
    Add,
    AvgPool1d,
    AvgPool2d,
    BatchNorm,
    Concat,
    Conv1d,
    Conv2d,
    Dropout,
    Flatten,
    GlobalAvgPool,
    GroupNorm,
    Hardsigmoid,
    Hardswish,
    Hardtanh,
    LeakyReLU,
    Linear,
    MaxPool1d,
    MaxPool2d,
    ReLU,
    Scale,
    Scaler,
    Sigmoid,
    SiLU,
    Tanh,
)
from fedlean.spec import LAYERS, ModelSpec, Node, sequential

IMAGE, SIGNAL = (4, 7, 6), (4, 11)


def single(layer, shape=IMAGE):
    return sequential(shape, [("n", layer)])


def two_inputs(layer):
    """Add or Scale of a convolution and something of the input."""
    gate = Node("other", GlobalAvgPool() if isinstance(layer, Scale) else ReLU(), ("input",))
    conv = Node("conv", Conv2d(4, 3, padding=1, bias=False), ("input",))
    return ModelSpec(IMAGE, (conv, gate, Node("n", layer, ("conv", "other"))))


class AddReference(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)

    def forward(self, x):
        return self.conv(x) + nn.ReLU()(x)


class ScaleReference(AddReference):
    def forward(self, x):
        return self.conv(x) * nn.AdaptiveAvgPool2d(1)(x)


class ConcatReference(AddReference):
    def forward(self, x):
        return torch.cat([self.conv(x), nn.ReLU()(x)], 1)


class DroppedByHand(nn.Module):
    """What layer "n" of a session with seed 0 drops in its first pass: number by number."""

    def __init__(self, p, channels=False):
        super().__init__()
        self.p, self.channels = p, channels

    def forward(self, x):
        if not self.training:
            return x
        drawn = np.random.Philox(key=derive_seed(0, 0, 0, "dropout/n"))
        kept = np.ones(x.shape if not self.channels else (*x.shape[:2], 1, 1), np.float32)
        for example in kept:
            of_example, numbers = example.reshape(-1), []
            while len(numbers) < of_example.size:  # blocks of 4 words of 64 bits
                for word in drawn.random_raw(4):
                    numbers += [int(word) >> shift & 0xFFFF for shift in (0, 16, 32, 48)]
            dropped = np.array(numbers[: of_example.size]) < self.p * 65536
            of_example[dropped] = 0
        return x * torch.from_numpy(kept) / (1 - self.p)


class ScalerOfHeteroFL(nn.Module):
    """As in the authors' code, for a slice of rate 0.4."""

    def forward(self, x):
        return x / 0.4 if self.training else x


LAYER_CASES = {
    "linear": (single(Linear(5), (6,)), nn.Linear(6, 5)),
    "linear-no-bias": (single(Linear(5, bias=False), (6,)), nn.Linear(6, 5, bias=False)),
    "conv": (single(Conv2d(6, 3)), nn.Conv2d(4, 6, 3)),
    "conv-options": (
        single(Conv2d(6, 3, stride=2, padding=2, groups=2, bias=False)),
        nn.Conv2d(4, 6, 3, stride=2, padding=2, groups=2, bias=False),
    ),
    "conv-rectangle": (
        single(Conv2d(6, (3, 2), (2, 1), (0, 1), dilation=(1, 3))),
        nn.Conv2d(4, 6, (3, 2), (2, 1), (0, 1), dilation=(1, 3)),
    ),
    "conv-1d": (single(Conv1d(6, 3), SIGNAL), nn.Conv1d(4, 6, 3)),
    "conv-1d-options": (
        single(Conv1d(6, 3, 2, 2, 2, bias=False, dilation=2), SIGNAL),
        nn.Conv1d(4, 6, 3, 2, 2, 2, 2, bias=False),
    ),
    "max-pool-1d": (single(MaxPool1d(3, 2, 1), SIGNAL), nn.MaxPool1d(3, 2, 1)),
    "avg-pool-1d": (single(AvgPool1d(3, 2, 1), SIGNAL), nn.AvgPool1d(3, 2, 1)),
    "max-pool-rectangle": (single(MaxPool2d((1, 3), (2, 1))), nn.MaxPool2d((1, 3), (2, 1))),
    "avg-pool-rectangle": (single(AvgPool2d((1, 3), (2, 1))), nn.AvgPool2d((1, 3), (2, 1))),
    "global-pool-1d": (
        single(GlobalAvgPool(), SIGNAL),
        nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten()),
    ),
    "batch-norm-1d": (single(BatchNorm(), SIGNAL), nn.BatchNorm1d(4)),
    "depthwise": (single(Conv2d(4, 3, groups=4)), nn.Conv2d(4, 4, 3, groups=4)),
    "max-pool": (single(MaxPool2d(2)), nn.MaxPool2d(2)),
    "max-pool-options": (single(MaxPool2d(3, 2, 1)), nn.MaxPool2d(3, 2, 1)),
    "avg-pool": (single(AvgPool2d(2)), nn.AvgPool2d(2)),
    "avg-pool-options": (single(AvgPool2d(3, 2, 1)), nn.AvgPool2d(3, 2, 1)),
    "global-pool": (
        single(GlobalAvgPool()),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    ),
    "group-norm": (single(GroupNorm(groups=2)), nn.GroupNorm(2, 4)),
    "group-norm-eps": (single(GroupNorm(eps=0.1)), nn.GroupNorm(1, 4, eps=0.1)),
    "batch-norm": (single(BatchNorm(0.01, 0.2)), nn.BatchNorm2d(4, 0.01, 0.2)),
    "batch-norm-vector": (single(BatchNorm(), (4,)), nn.BatchNorm1d(4)),
    "relu": (single(ReLU()), nn.ReLU()),
    "hardswish": (single(Hardswish()), nn.Hardswish()),
    "hardsigmoid": (single(Hardsigmoid()), nn.Hardsigmoid()),
    "leaky-relu": (single(LeakyReLU(0.2)), nn.LeakyReLU(0.2)),
    "relu6": (single(Hardtanh(0.0, 6.0)), nn.ReLU6()),
    "hardtanh": (single(Hardtanh(-0.5, 0.7)), nn.Hardtanh(-0.5, 0.7)),
    "sigmoid": (single(Sigmoid()), nn.Sigmoid()),
    "tanh": (single(Tanh()), nn.Tanh()),
    "silu": (single(SiLU()), nn.SiLU()),
    "gelu": (single(GELU()), nn.GELU()),
    "gelu-tanh": (single(GELU(tanh=True)), nn.GELU("tanh")),
    "layer-norm": (single(GroupNorm(groups=1), (5,)), nn.LayerNorm(5)),
    "scaler": (single(Scaler(2.5)), ScalerOfHeteroFL()),
    "dropout": (single(Dropout(0.25)), DroppedByHand(0.25)),
    "dropout-vector": (single(Dropout(0.5), (21,)), DroppedByHand(0.5)),
    "dropout-channels": (single(Dropout(0.5, channels=True)), DroppedByHand(0.5, channels=True)),
    "concat": (two_inputs(Concat()), ConcatReference()),
    "flatten": (single(Flatten()), nn.Flatten()),
    "add": (two_inputs(Add()), AddReference()),
    "scale": (two_inputs(Scale()), ScaleReference()),
}


def test_every_layer_has_a_case():
    seen = {type(node.layer).__name__ for spec, _ in LAYER_CASES.values() for node in spec.nodes}
    assert seen == set(LAYERS)


@pytest.mark.parametrize("case", LAYER_CASES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [2, 5])
def test_layer_is_that_of_torch(engine, case, training, size):
    """Output, parameter gradients and buffers; inputs of all signs, beyond ±3 too."""
    spec, module = LAYER_CASES[case]
    params = start(spec)
    ours = {name: name.split(".")[1] for name in params if name.startswith("n.")}
    ours |= {name: name for name in params if name.startswith("conv.")}
    state = {theirs: torch.tensor(params[name]) for name, theirs in ours.items()}
    if "batch-norm" in case:
        state["num_batches_tracked"] = torch.tensor(0)
    module.load_state_dict(state)
    module.train(training)
    rng = np.random.default_rng(3)
    x = 3 * rng.standard_normal((size, *spec.input_shape)).astype(np.float32)
    session = opened(engine, spec, params)
    got = session.forward(x, training=training)["n"]
    assert got.shape == (size, *spec.output_shape)
    expected = module(torch.tensor(x))
    np.testing.assert_allclose(got, expected.detach().numpy(), rtol=1e-5, atol=1e-6)
    after = module.state_dict()
    for name, theirs in ours.items():
        np.testing.assert_allclose(session.params()[name], after[theirs].numpy(), 1e-5, 1e-6)
    if training and spec.param_shapes:
        entering = rng.standard_normal(got.shape).astype(np.float32)
        gradients = session.backward({"n": entering})
        expected.backward(torch.tensor(entering))
        held = dict(module.named_parameters())
        theirs = {name: held[ours[name]].grad.numpy() for name in spec.param_shapes}
        assert_near(gradients, theirs, 1e-4)
        module.zero_grad()


@pytest.mark.parametrize(
    ("layer", "points"),
    [
        (Hardswish(), {-4: 0, -3: 0, -1: -1 / 3, 0: 0, 1: 2 / 3, 3: 3, 5: 5}),
        (Hardsigmoid(), {-4: 0, -3: 0, -1: 1 / 3, 0: 0.5, 1: 2 / 3, 3: 1, 5: 1}),
        (ReLU(), {-2: 0, 0: 0, 2: 2}),
        (LeakyReLU(0.25), {-2: -0.5, 0: 0, 2: 2}),
        (Hardtanh(-1.0, 3.0), {-2: -1, 0.5: 0.5, 4: 3}),
        (Sigmoid(), {-100: 0, 0: 0.5, 1: 0.7310586, 100: 1}),
        (Tanh(), {-1: -0.7615942, 0: 0, 20: 1}),
        (SiLU(), {-100: 0, 0: 0, 1: 0.7310586}),
        (GELU(), {-1: -0.1586553, 0: 0, 1: 0.8413447}),
        (GELU(tanh=True), {-1: -0.1588080, 0: 0, 1: 0.8411920}),
    ],
)
def test_activation_by_hand(engine, layer, points):
    session = opened(engine, single(layer, (len(points),)), {})
    got = session.forward(np.array([list(points)], np.float32))["n"][0]
    np.testing.assert_allclose(got, list(points.values()), atol=1e-6)


def test_gradients_flow_back_through_every_layer(engine):
    """To a convolution below: Add and Scale with three and with repeated inputs."""
    nodes = (
        Node("conv", Conv2d(4, 3, padding=1), ("input",)),
        Node("swish", Hardswish(), ("conv",)),
        Node("gn", GroupNorm(groups=2), ("swish",)),
        Node("gate", GlobalAvgPool(), ("conv",)),
        Node("sigmoid", Hardsigmoid(), ("gate",)),
        Node("scale", Scale(), ("gn", "sigmoid")),
        Node("add", Add(), ("scale", "conv", "conv")),
        Node("avg", AvgPool2d(3, 2, 1), ("add",)),
        Node("max", MaxPool2d(3, 2, 1), ("avg",)),
        Node("flat", Flatten(), ("max",)),
        Node("fc", Linear(3), ("flat",)),
    )
    spec = ModelSpec(IMAGE, nodes)
    params = start(spec)
    x, y = batch(spec)
    t = {name: torch.tensor(value, requires_grad=True) for name, value in params.items()}
    conv = F.conv2d(torch.tensor(x), t["conv.weight"], t["conv.bias"], padding=1)
    gn = F.group_norm(F.hardswish(conv), 2, t["gn.weight"], t["gn.bias"])
    add = gn * F.hardsigmoid(conv.mean((2, 3), keepdim=True)) + 2 * conv
    flat = nn.MaxPool2d(3, 2, 1)(nn.AvgPool2d(3, 2, 1)(add)).flatten(1)
    loss = F.cross_entropy(F.linear(flat, t["fc.weight"], t["fc.bias"]), torch.tensor(y))
    loss.backward()
    session = opened(engine, spec, params, sgd=SGD(1.0))
    assert session.step(x, y) == pytest.approx(loss.item(), rel=1e-5)
    moved = {name: params[name] - value for name, value in session.params().items()}
    assert_near(moved, {name: tensor.grad.numpy() for name, tensor in t.items()})
