"""Modules and inputs that the tests of `from_torch` share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fedlean import layers as L
from fedlean.spec import ModelSpec, sequential

VECTORS = torch.randn((3, 6), generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(2))

CNN: ModelSpec = sequential(
    (4, 8, 8),
    [
        ("0", L.Conv2d(8, 3), "0"),
        ("1", L.BatchNorm(), "0"),
        ("2", L.ReLU(), "0"),
        ("3", L.GlobalAvgPool(), "0"),
        ("4", L.Flatten(), "0"),
        ("5", L.Linear(3), "5"),
    ],
)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def cnn() -> nn.Sequential:
    """What `CNN` says."""
    return nn.Sequential(
        nn.Conv2d(4, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


class Net(nn.Module):
    """forward(x) is `function(self, x)`; `parts` are its attributes."""

    def __init__(self, function: Callable[..., object], **parts: object) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: torch.Tensor) -> object:
        return self.function(self, x)
