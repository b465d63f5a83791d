"""The translation of a spec's layers into torch operations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from fedlean import layers as L
from fedlean.spec import Node

Tensors = Mapping[str, torch.Tensor]


def run_layer(
    node: Node, inputs: list[torch.Tensor], state: Tensors, training: bool
) -> torch.Tensor:
    """One node on (B, ...) inputs.  Raises ValueError naming a layer that the engine lacks."""
    x = inputs[0]
    weight, bias = state.get(f"{node.name}.weight"), state.get(f"{node.name}.bias")
    match node.layer:
        case L.Linear() if weight is not None:
            return F.linear(x, weight, bias)
        case L.Conv2d(stride=s, padding=p, groups=groups, dilation=d) if weight is not None:
            convolve = F.conv2d if node.layer.rank == 3 else F.conv1d
            return convolve(x, weight, bias, s, p, d, groups)
        case L.AvgPool2d(kernel_size=k, stride=stride, padding=padding):
            pool: Any = F.avg_pool2d if node.layer.rank == 3 else F.avg_pool1d
            return pool(x, k, stride, padding)
        case L.MaxPool2d(kernel_size=k, stride=stride, padding=padding):
            return (F.max_pool2d if node.layer.rank == 3 else F.max_pool1d)(x, k, stride, padding)
        case L.GlobalAvgPool():
            return x.flatten(2).mean(2)
        case L.GroupNorm(eps=eps, groups=groups):
            if training:  # as in _moving_batch_norm; evaluation's memory has no room for a copy
                values = x.reshape(len(x), groups, -1)
                x = (values - values.detach()[:, :, :1]).reshape(x.shape)
            return torch.group_norm(x, groups, weight, bias, eps)  # F's refuses 1 value per group
        case L.BatchNorm(eps=eps, momentum=momentum):
            mean, var = state[f"{node.name}.running_mean"], state[f"{node.name}.running_var"]
            norm = _moving_batch_norm if training else F.batch_norm
            return norm(x, mean, var, weight, bias, training, momentum, eps)
        case L.ReLU():
            return F.relu(x)
        case L.Curve():
            return _curve(node.layer, x)
        case L.Scaler(factor=factor):
            return x * factor if training else x
        case L.Dropout():  # of evaluation; in training the session draws
            return x
        case L.Flatten():
            return x.flatten(1)
        case L.Concat():
            return torch.cat(inputs, 1)
        case L.Add():
            return sum(inputs[1:], start=x)
        case L.Scale():
            return x * inputs[1].reshape(*x.shape[:2], *[1] * (x.ndim - 2))
    raise ValueError(f"layer {node.name!r}: the torch engine lacks {type(node.layer).__name__}")


def _curve(layer: L.Curve, x: torch.Tensor) -> torch.Tensor:
    match layer:
        case L.LeakyReLU(slope=slope):
            return F.leaky_relu(x, slope)
        case L.Hardtanh(low=low, high=high):
            return F.hardtanh(x, low, high)
        case L.GELU(tanh=tanh):
            return F.gelu(x, approximate="tanh" if tanh else "none")
    return _CURVES[type(layer)](x)


_CURVES = {
    L.Hardswish: F.hardswish,
    L.Hardsigmoid: F.hardsigmoid,
    L.Sigmoid: torch.sigmoid,
    L.Tanh: torch.tanh,
    L.SiLU: F.silu,
}


def _moving_batch_norm(x, mean, var, weight, bias, training, momentum, eps) -> torch.Tensor:
    """Of x (B, C, ...) less one of its values: exactly the bias where they are all equal."""
    values = x.reshape(*x.shape[:2], -1)
    one = values.detach()[:1, :, :1]
    moments = torch.zeros_like(mean), torch.zeros_like(var)
    out = F.batch_norm(values - one, *moments, weight, bias, training, 1.0, eps)
    mean.lerp_(moments[0] + one.flatten(), momentum)
    var.lerp_(moments[1], momentum)
    return out.reshape(x.shape)
