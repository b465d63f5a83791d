"""Masked-dense training in float64 with torch autograd: what every engine must compute.

It shares nothing with the engines: modules from `to_torch`, masks as products, SGD written out.
`kink_distance` says how near an activation came to a point where a gradient jumps (0 of a ReLU, a
tie in a maximum, ±3 of a Hardswish): closer than rounding, float32 and float64 may both be right
and differ.  `amplification` says how much a norm of nearly equal values enlarged roundings; of
equal values, as a channel without weights has, it enlarges none and gives exactly its bias.  With a
`jitter` activations, the gradients that flow through them, sums and updated weights are off by up
to JITTER, as in float32: what that changes is the problem's conditioning.
"""

from __future__ import annotations

from math import inf

import torch
import torch.nn.functional as F
from torch import nn

from fedlean.engine.dropout import dropout_key, dropouts, factors
from fedlean.engine.protocol import SGD
from fedlean.models.torch import _BatchNorm, to_torch
from fedlean.spec import ModelSpec, Node

PLAIN_SGD = SGD(0.1)
JITTER = 2.0**-22  # a few roundings of float32


class Oracle:
    """The protocol's session in float64."""

    def __init__(
        self,
        spec: ModelSpec,
        params,
        masks=None,
        frozen=(),
        sgd: SGD = PLAIN_SGD,
        loss: str = "ce",
        jitter: int | None = None,  # a seed
    ):
        self.spec, self.sgd, self.loss_name, self.frozen = spec, sgd, loss, set(frozen)
        self.masks = {name: torch.tensor(mask) for name, mask in (masks or {}).items()}
        self.module = to_torch(spec, params).double()
        self.tensors = dict(self.module.named_parameters())
        self.load(params)
        self.trained = {n: self.tensors[n] for n in spec.param_shapes if n not in self.frozen}
        self.velocity = {name: torch.zeros_like(t) for name, t in self.trained.items()}
        self.squares = {name: torch.zeros_like(t) for name, t in self.trained.items()}
        self.kink_distance, self.amplification = inf, 1.0
        self.noise = None if jitter is None else torch.Generator().manual_seed(jitter)
        self.values: dict[str, torch.Tensor] = {}
        self.inputs: dict[str, torch.Tensor] = {}
        self.passes = 0  # of training
        for node in dropouts(spec):
            setattr(self.module, node.name, _Drawn(self, node))
        for node in spec.nodes:
            self.module.get_submodule(node.name).register_forward_hook(self._watch(node.name))

    @torch.no_grad()
    def load(self, params):
        held = self.module.state_dict()
        for name in self.spec.tensor_shapes:
            held[name].copy_(torch.tensor(params[name]) * self.masks.get(name, True))
        self.loaded = {name: t.detach().clone() for name, t in self.tensors.items()}

    def _watch(self, name):
        def hook(module, inputs, output):
            x = self.inputs[name] = inputs[0].detach()
            self.kink_distance = min(self.kink_distance, kink_distance(module, x))
            scale = norm_scale(module, x)
            if scale is not None:
                constant = is_constant(module, x)
                enlarged = torch.where(constant, 0.0, scale * x)
                self.amplification = max(self.amplification, enlarged.abs().max().item())
                # of terms that cancel: x less its mean, dL/doutput less its projections
                per_channel = (-1, *[1] * (x.ndim - 2))
                gain = module.weight.detach().reshape(per_channel) * scale
                output = output + self._rounded(torch.zeros_like(x), gain) * inputs[0]
                exact = module.bias.detach().reshape(per_channel)
                output = output + torch.where(constant, exact - output.detach(), 0.0)
            self.values[name] = self._rounded(output)
            return self.values[name]

        return hook

    def _rounded(self, tensor, magnitude=None):
        """`tensor` off by a few roundings of itself, alike where it is equal, or of `magnitude`."""
        if self.noise is None:
            return tensor
        if magnitude is not None:
            return tensor + JITTER * self._noise(tensor.shape) * magnitude
        values, which = tensor.detach().unique(return_inverse=True)
        return tensor + JITTER * self._noise(values.shape)[which] * tensor

    def _noise(self, shape):
        return 2 * torch.rand(shape, generator=self.noise, dtype=torch.float64) - 1

    def forward(self, x, *, training):
        """Activations of all nodes, by name, with their graph."""
        self.module.train(training)
        for name in self.frozen:
            node, _, suffix = name.rpartition(".")
            if suffix == "running_mean":
                self.module.get_submodule(node).eval()
        self.values = {}
        self.module(torch.tensor(x, dtype=torch.float64))
        self.passes += training
        return self.values

    def loss(self, x, y):
        with torch.no_grad():
            return self._loss(x, y, training=False).item()

    def _loss(self, x, y, *, training):
        logits = self.forward(x, training=training)[self.spec.nodes[-1].name]
        target = torch.tensor(y)
        if self.loss_name == "ce":
            loss = F.cross_entropy(logits, target)
        else:
            one_hot = F.one_hot(target, logits.shape[1]).double()
            loss = F.binary_cross_entropy_with_logits(logits, one_hot)
        return self._rounded(loss, 1.0)  # log(1 + e) of a small e

    def backward(self, entering):
        """Gradients of all coordinates of the trained tensors, after a training forward."""
        total = sum(
            (self.values[name] * torch.tensor(g, dtype=torch.float64)).sum()
            for name, g in entering.items()
        )
        return {name: g.numpy() for name, g in self._gradients(total).items()}

    def _gradients(self, total):
        if not self.trained or not total.requires_grad:
            return {name: torch.zeros_like(t) for name, t in self.trained.items()}
        flowing = {n: value for n, value in self.values.items() if value.requires_grad}
        wanted = [*self.trained.values(), *flowing.values()]
        found = torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
        gradients = dict(zip((*self.trained, *flowing), found, strict=True))
        summed = self._summed({n: gradients[n] for n in flowing}) if self.noise else {}
        return {n: self._rounded(gradients[n], summed.get(n, 0.0)) for n in self.trained}

    def _summed(self, flowing):
        """Σ |term| of each parameter's gradient: float32 loses a rounding of it, not of the sum."""
        magnitudes = {}
        for name, gradient in flowing.items():
            module, gradient = self.module.get_submodule(name), gradient.abs()
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
                out = module(self.inputs[name].abs())
                out = torch.autograd.grad(out, list(module.parameters()), gradient)
                own = dict(zip(dict(module.named_parameters()), out, strict=True))
            else:
                own = {"bias": gradient}
                if (scale := norm_scale(module, self.inputs[name])) is not None:
                    own["weight"] = gradient * (scale * self.inputs[name]).abs()
                own = {n: g.transpose(0, 1).flatten(1).sum(1) for n, g in own.items()}
            magnitudes |= {f"{name}.{suffix}": value for suffix, value in own.items()}
        return magnitudes

    def step(self, x, y, *, importance=False):
        loss = self._loss(x, y, training=True)
        gradients = self._gradients(loss)
        if importance:
            for name, gradient in gradients.items():
                self.squares[name] += gradient**2
        self._descend({n: g * self.masks.get(n, True) for n, g in gradients.items()})
        return loss.item()

    @torch.no_grad()
    def _descend(self, gradients):
        sgd, norm = self.sgd, sum((g**2).sum() for g in gradients.values()) ** 0.5
        scale = 1.0 if sgd.clip_norm is None or norm <= sgd.clip_norm else sgd.clip_norm / norm
        for name, gradient in gradients.items():
            weight = self.tensors[name]
            pull = sgd.weight_decay * weight + sgd.proximal * (weight - self.loaded[name])
            self.velocity[name] = sgd.momentum * self.velocity[name] + scale * gradient + pull
            weight.copy_(self._rounded(weight - sgd.lr * self.velocity[name]))
        for buffer in self.module.buffers():
            buffer.copy_(self._rounded(buffer))

    def params(self):
        held = self.module.state_dict()
        return {name: held[name].numpy().copy() for name in self.spec.tensor_shapes}

    def importance(self):
        return {name: total.numpy().copy() for name, total in self.squares.items()}


class _Drawn(nn.Module):
    """A Dropout of a session whose seed is 0."""

    def __init__(self, oracle: Oracle, node: Node):
        super().__init__()
        self.oracle, self.node = [oracle], node  # in a list: it is no submodule

    def forward(self, x):
        if not self.training:
            return x
        key = dropout_key(0, self.oracle[0].passes, self.node.name)
        return x * torch.tensor(factors(self.node.layer, key, tuple(x.shape)))


def norm_scale(module, x):
    """1 / sqrt(variance + eps), to be multiplied with x (B, C, ...); None if it is no norm."""
    per_channel = (-1, *[1] * (x.ndim - 2))
    if isinstance(module, nn.GroupNorm):
        var = x.reshape(len(x), module.num_groups, -1).var(2, correction=0)
        var = var.repeat_interleave(x.shape[1] // module.num_groups, 1)
        var = var.reshape(len(x), *per_channel)
    elif not isinstance(module, _BatchNorm):
        return None
    elif module.training:
        var = x.transpose(0, 1).flatten(1).var(1, correction=0).reshape(per_channel)
    else:
        var = module.running_var.reshape(per_channel)
    return (var + module.eps).rsqrt()


def is_constant(module, x):
    """Where a norm in training takes its moments from equal values only, to be broadcast to x."""
    if isinstance(module, nn.GroupNorm):
        values = x.reshape(len(x), module.num_groups, -1)
        constant = (values == values[:, :, :1]).all(2)
        constant = constant.repeat_interleave(x.shape[1] // module.num_groups, 1)
        return constant.reshape(*x.shape[:2], *[1] * (x.ndim - 2))
    values = x.transpose(0, 1).flatten(1)
    constant = (values == values[:, :1]).all(1) & module.training
    return constant.reshape(-1, *[1] * (x.ndim - 2))


def kink_distance(module, x) -> float:
    """Distance to the nearest jump of the derivative, relative to the largest |x|.

    Exact hits (the zeros and ties that pruning makes) do not count: both precisions hit them.
    """
    if isinstance(module, nn.MaxPool1d | nn.MaxPool2d):
        rank = x.ndim - 2
        size, stride, padding = (
            (side,) * rank if isinstance(side, int) else side
            for side in (module.kernel_size, module.stride, module.padding)
        )
        windows = x = F.pad(x, [p for p in padding[::-1] for _ in range(2)], value=-1e30)
        for axis in range(rank):
            windows = windows.unfold(2 + axis, size[axis], stride[axis])
        windows = windows.flatten(2 + rank)
        if windows.shape[-1] == 1:
            return inf
        best = windows.topk(2, dim=-1).values
        gaps = best[..., 0] - best[..., 1]
    elif isinstance(module, nn.ReLU | nn.LeakyReLU):
        gaps = x.abs()
    elif isinstance(module, nn.Hardtanh):
        gaps = torch.minimum((x - module.min_val).abs(), (x - module.max_val).abs())
    elif isinstance(module, nn.Hardswish | nn.Hardsigmoid):
        gaps = (x.abs() - 3).abs()
    else:
        return inf
    gaps = gaps[gaps > 0]
    return (gaps.min() / x[x > -1e29].abs().max()).item() if gaps.numel() else inf
