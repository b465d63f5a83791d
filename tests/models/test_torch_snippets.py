"""Modules as people write them for devices: each is converted, or refused with a rewrite.

What is converted computes and trains as the module does, on both engines.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedlean.core import SubModel, generator
from fedlean.engine.open import open_engine
from fedlean.engine.protocol import SGD
from fedlean.models.torch import from_torch, to_torch
from fedlean.spec import ModelSpec

torch.set_num_threads(1)
SIGNAL, IMAGE, VECTOR = (6, 128), (3, 16, 16), (561,)


class Net(nn.Module):
    """`layers` under their names, computed by `function(net, x)`."""

    def __init__(self, function, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


def ended(*body: nn.Module, channels: int = 8) -> nn.Module:
    """`body` on an image, a global pooling and a classifier."""
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4))


def conv_1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(6, 16, 5, padding=2),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(16, 24, 3),
        nn.GroupNorm(4, 24),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(24, 6),
    )


def separable(channels: int, out: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU6(inplace=True),
        nn.Conv2d(channels, out, 1),
    )


def two_branches() -> nn.Module:
    return Net(
        lambda s, x: s.fc(torch.cat([s.narrow(x), s.wide(x)], dim=1).mean((2, 3))),
        narrow=nn.Conv2d(3, 4, 1),
        wide=nn.Conv2d(3, 5, 3, padding=1),
        fc=nn.Linear(9, 4),
    )


def residual() -> nn.Module:
    def forward(s, x):
        y = F.relu(s.bn1(s.conv1(x)))
        return s.fc(F.relu(s.bn2(s.conv2(y)) + s.shortcut(x)).mean((2, 3)))

    return Net(
        forward,
        conv1=nn.Conv2d(3, 8, 3, 2, 1, bias=False),
        bn1=nn.BatchNorm2d(8),
        conv2=nn.Conv2d(8, 8, 3, 1, 1, bias=False),
        bn2=nn.BatchNorm2d(8),
        shortcut=nn.Conv2d(3, 8, 1, 2, bias=False),
        fc=nn.Linear(8, 4),
    )


def squeeze_excite() -> nn.Module:
    def forward(s, x):
        x = s.conv(x)
        gate = torch.sigmoid(s.up(F.silu(s.down(F.adaptive_avg_pool2d(x, 1)))))
        return s.fc((x * gate).mean((2, 3)))

    return Net(
        forward,
        conv=nn.Conv2d(3, 8, 3),
        down=nn.Conv2d(8, 2, 1),
        up=nn.Conv2d(2, 8, 1),
        fc=nn.Linear(8, 4),
    )


def functional() -> nn.Module:
    def forward(s, x):
        x = F.max_pool2d(F.leaky_relu(s.conv(x), 0.1), 2)
        x = F.dropout(F.gelu(F.avg_pool2d(x, (1, 7))), 0.2, training=s.training)
        return s.fc(torch.tanh(x.flatten(1)))

    return Net(forward, conv=nn.Conv2d(3, 4, 3), fc=nn.Linear(28, 4))


def views() -> nn.Module:
    return Net(
        lambda s, x: s.b(s.a(x.view(x.size(0), -1)).flatten(1)) + s.c(s.conv(x).mean((2, 3))),
        a=nn.Linear(768, 5),
        b=nn.Linear(5, 4),
        conv=nn.Conv2d(3, 6, 3),
        c=nn.Linear(6, 4),
    )


def named() -> nn.Module:
    """Names as in torchvision: features.0, classifier.head."""
    features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    head = nn.Sequential(OrderedDict(drop=nn.Dropout(0.5), head=nn.Linear(8, 4)))
    return Net(
        lambda s, x: s.classifier(torch.flatten(s.pool(s.features(x)), 1)),
        features=features,
        pool=nn.AdaptiveAvgPool2d(1),
        classifier=head,
    )


def branching(s: Net, x: torch.Tensor) -> torch.Tensor:
    if x.shape[2] > 8:
        x = F.max_pool2d(x, 2)
    return s.fc(x.flatten(1))


def pretrained() -> nn.Module:
    """Statistics that have moved, and a beginning that is frozen."""
    module = ended(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    other = ended(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    other(example(IMAGE))
    module.load_state_dict(other.state_dict())
    return module.requires_grad_(True)


CONVERTED = {
    "Conv1d, BatchNorm1d, dropout, global pooling": (conv_1d, SIGNAL),
    "MLP": (
        lambda: nn.Sequential(nn.Linear(561, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 6)),
        VECTOR,
    ),
    "kernels (1, 7) and (3, 5)": (
        lambda: ended(nn.Conv2d(3, 4, (1, 7)), nn.Conv2d(4, 8, (3, 5), padding=(1, 2))),
        IMAGE,
    ),
    "stride (2, 1)": (lambda: ended(nn.Conv2d(3, 8, 3, stride=(2, 1), padding=1)), IMAGE),
    "MaxPool (1, 2)": (lambda: ended(nn.Conv2d(3, 8, 3), nn.MaxPool2d((1, 2))), IMAGE),
    "dilation 2": (lambda: ended(nn.Conv2d(3, 8, 3, padding=2, dilation=2)), IMAGE),
    "depthwise-separable": (lambda: ended(separable(3, 8), separable(8, 8)), IMAGE),
    "LeakyReLU": (lambda: ended(nn.Conv2d(3, 8, 3), nn.LeakyReLU(0.2)), IMAGE),
    "SiLU": (lambda: ended(nn.Conv2d(3, 8, 3), nn.SiLU()), IMAGE),
    "GELU": (lambda: ended(nn.Conv2d(3, 8, 3), nn.GELU(), nn.GELU("tanh")), IMAGE),
    "ReLU6": (lambda: ended(nn.Conv2d(3, 8, 3), nn.ReLU6()), IMAGE),
    "Sigmoid and Tanh": (lambda: ended(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Sigmoid()), IMAGE),
    "LayerNorm": (
        lambda: nn.Sequential(nn.Linear(561, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 6)),
        VECTOR,
    ),
    "AdaptiveAvgPool2d(2)": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 4)
        ),
        IMAGE,
    ),
    "AdaptiveMaxPool2d(1)": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(4, 4)
        ),
        (3, 30, 30),  # more than 256 pixels: pooled twice
    ),
    "torch.cat of two branches": (two_branches, IMAGE),
    "residual with a 1x1 shortcut": (residual, IMAGE),
    "squeeze-excite": (squeeze_excite, IMAGE),
    "Dropout and Dropout2d": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.Dropout2d(0.3), nn.Flatten(), nn.Dropout(), nn.Linear(784, 4)
        ),
        IMAGE,
    ),
    "view, flatten(1), mean((2, 3))": (views, IMAGE),
    "Sequential nested twice": (
        lambda: ended(nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), nn.ReLU())),
        IMAGE,
    ),
    "functional calls": (functional, IMAGE),
    "a forward that branches on shapes": (
        lambda: Net(branching, fc=nn.Linear(192, 4)),
        IMAGE,
    ),
    "names with dots": (named, IMAGE),
    "a pretrained state": (pretrained, IMAGE),
    "double precision": (lambda: conv_1d().double(), SIGNAL),
    "channels_last": (
        lambda: ended(nn.Conv2d(3, 8, 3), nn.ReLU()).to(memory_format=torch.channels_last),
        IMAGE,
    ),
    'padding="same"': (
        lambda: ended(nn.Conv2d(3, 8, (3, 5), padding="same", dilation=(2, 1))),
        IMAGE,
    ),
    "AvgPool1d": (
        lambda: nn.Sequential(
            nn.Conv1d(6, 4, 3, padding=1), nn.AvgPool1d(4), nn.Flatten(), nn.Linear(128, 3)
        ),
        SIGNAL,
    ),
}


class Characters(nn.Module):
    """The usual model of next characters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(80, 8), nn.Linear(32, 80)
        self.gru = nn.GRU(8, 32, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.gru(self.embed(x))[0][:, -1])


REFUSED = {
    "GRU": (
        Net(
            lambda s, x: s.fc(s.gru(x)[0][:, -1]),
            gru=nn.GRU(128, 16, batch_first=True),
            fc=nn.Linear(16, 4),
        ),
        torch.zeros(2, 6, 128),
        ("layer 'gru' (GRU)", "use nn.Conv1d layers and a mean over time"),
    ),
    "Embedding and GRU": (
        Characters(),
        torch.zeros(2, 80, dtype=torch.long),
        ("layer 'embed' (Embedding)", "a spec reads numbers, not ids"),
    ),
    "InstanceNorm": (
        ended(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8)),
        torch.zeros(2, *IMAGE),
        ("layer '1' (InstanceNorm2d)", "use nn.GroupNorm(C, C)"),
    ),
}


def example(shape: tuple[int, ...], batch: int = 4) -> torch.Tensor:
    return torch.from_numpy(generator(5, 0, 0, "x").standard_normal((batch, *shape), np.float32))


def test_most_of_them_are_converted():
    assert len(CONVERTED) == 29 and len(REFUSED) == 3


@pytest.mark.parametrize("name", CONVERTED)
@pytest.mark.parametrize("engine", ["torch", "native"])
def test_is_converted(name: str, engine: str, request: pytest.FixtureRequest):
    if engine == "native":
        request.getfixturevalue("has_native")
    make, shape = CONVERTED[name]
    torch.manual_seed(3)
    module = make()
    dtype = next(module.parameters()).dtype
    spec, params, sub_model = from_torch(module, example(shape).to(dtype))
    x = example(shape)
    with torch.no_grad():
        expected = module.eval()(x.to(dtype)).float().numpy()
        again = to_torch(spec, params).eval()(x).numpy()
    np.testing.assert_allclose(again, expected, rtol=1e-4, atol=1e-5)
    session = open_engine(engine, 1).open(spec, params, sub_model, batch_size=4, optimizer=SGD(0.1))
    got = session.forward(x.numpy())[spec.nodes[-1].name]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    trains(spec, params, session, x)


def trains(spec: ModelSpec, params, session, x: torch.Tensor) -> None:
    """Its loss falls on one batch, and every tensor moves."""
    y = np.arange(len(x)) % spec.output_shape[0]
    before = session.loss(x.numpy(), y)
    for _ in range(20):
        session.step(x.numpy(), y)
    assert session.loss(x.numpy(), y) < before
    moved = session.params()
    assert all((moved[name] != params[name]).any() for name in spec.param_shapes)


def test_engines_drop_the_same():
    torch.manual_seed(3)
    spec, params, _ = from_torch(CONVERTED["Dropout and Dropout2d"][0](), example(IMAGE))
    x, y = example(IMAGE).numpy(), np.arange(4)
    losses = {
        engine: [session.step(x, y) for _ in range(4)]
        for engine in ("torch", "native")
        for session in [
            open_engine(engine, 1).open(
                spec, params, SubModel(), batch_size=4, optimizer=SGD(0.01), seed=7
            )
        ]
    }
    np.testing.assert_allclose(losses["native"], losses["torch"], rtol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_with_a_rewrite(name: str):
    module, x, messages = REFUSED[name]
    with pytest.raises(ValueError) as caught:
        from_torch(module, x)
    for message in messages:
        assert message in str(caught.value)
