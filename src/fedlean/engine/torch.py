"""The PyTorch engine: runs any `ModelSpec`, with masks as multiplications (*masked* arithmetic).

It owns the translation of a spec into torch operations.  It saves no operations and no memory for a
pruned model: it is the oracle of the native engine and the engine of simulations.  Not covered:
slices (`SubModel.index`), output modules and GPUs, which are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from fedlean import layers as L
from fedlean.core import Params, SubModel, generator
from fedlean.engine.memory import step_memory
from fedlean.engine.protocol import SGD, Loss
from fedlean.spec import INPUT, ModelSpec, Node

Tensors = Mapping[str, torch.Tensor]


class TorchEngine:
    """Opens torch sessions.  `threads` is set for the whole process, as torch has it."""

    name = "torch"
    arithmetic: Literal["masked", "sparse"] = "masked"
    instruction_set = torch.backends.cpu.get_cpu_capability()

    def __init__(self, threads: int | None = None):
        if threads is not None:
            torch.set_num_threads(threads)

    def open(
        self,
        spec: ModelSpec,
        params: Params,
        sub_model: SubModel,
        *,
        batch_size: int,
        optimizer: SGD,
        loss: Loss = "ce",
    ) -> TorchSession:
        """Raises ValueError when the parameters do not fit the spec or the sub-model is sliced."""
        if sub_model.index or sub_model.output_module:
            raise ValueError(
                "the torch engine trains masks and frozen tensors only, got a sub-model with "
                f"{'slices' if sub_model.index else 'an output module'}"
            )
        if loss not in ("ce", "bce"):
            raise ValueError(f"loss must be 'ce' or 'bce', got {loss!r}")
        _check_masks(spec, sub_model)
        return TorchSession(spec, params, sub_model, batch_size, optimizer, loss)


def _check_params(spec: ModelSpec, params: Params) -> None:
    for name, shape in spec.tensor_shapes.items():
        if name not in params:
            raise ValueError(f"parameter {name!r} of shape {shape} is missing")
        if params[name].shape != shape:
            raise ValueError(f"parameter {name!r} has shape {params[name].shape}, expected {shape}")


def _check_masks(spec: ModelSpec, sub_model: SubModel) -> None:
    for name, mask in sub_model.masks.items():
        if name not in spec.param_shapes or mask.shape != spec.param_shapes[name]:
            raise ValueError(f"mask {name!r} of shape {mask.shape} does not fit the model")


class TorchSession:
    """See `fedlean.engine.protocol.Session`."""

    def __init__(
        self,
        spec: ModelSpec,
        params: Params,
        sub_model: SubModel,
        batch_size: int,
        optimizer: SGD,
        loss: Loss,
    ):
        self._spec = spec
        self._optimizer = optimizer
        self._loss_name = loss
        self._trainable = [name for name in spec.param_shapes if name not in sub_model.frozen]
        self._frozen = sub_model.frozen
        self._masks = {
            name: torch.from_numpy(np.ascontiguousarray(mask, np.float32))
            for name, mask in sub_model.masks.items()
        }
        self._velocity: dict[str, torch.Tensor] = {}
        self._importance: dict[str, torch.Tensor] = {}
        self._kept_graph: dict[str, torch.Tensor] = {}
        self._state: dict[str, torch.Tensor] = {}
        self.load(params)
        self.peak_memory_bytes = step_memory(
            spec,
            dict.fromkeys(self._masks, 0),
            batch_size=batch_size,
            optimizer_floats=1 if optimizer.momentum else 0,
            frozen=sub_model.frozen,
            sparse=False,
        ).peak_bytes

    def load(self, params: Params) -> None:
        """Takes a copy; masked coordinates become 0.  Optimiser state is kept."""
        _check_params(self._spec, params)
        for name in self._spec.tensor_shapes:
            tensor = torch.tensor(params[name], dtype=torch.float32)
            if name in self._masks:
                # not a multiplication: NaN·0 is NaN and -1·0 is -0
                tensor = torch.where(self._masks[name] != 0, tensor, 0.0)
            self._state[name] = tensor.requires_grad_(name in self._trainable)

    def params(self) -> dict[str, np.ndarray]:
        return {name: tensor.detach().numpy().copy() for name, tensor in self._state.items()}

    def step(self, x: np.ndarray, y: np.ndarray, *, importance: bool = False) -> float:
        logits = self._run(x, training=True)[self._output]
        loss = self._loss(logits, y)
        gradients = torch.autograd.grad(
            loss,
            [self._state[name] for name in self._trainable],
            allow_unused=True,
            materialize_grads=True,
        )
        named = dict(zip(self._trainable, gradients, strict=True))
        if importance:
            self._accumulate(named)
        self._descend(named)
        return float(loss.detach())

    def importance(self) -> dict[str, np.ndarray]:
        return {
            name: self._importance[name].numpy().copy()
            if name in self._importance
            else np.zeros(self._spec.param_shapes[name], np.float32)
            for name in self._trainable
        }

    @torch.no_grad()
    def loss(self, x: np.ndarray, y: np.ndarray) -> float:
        return float(self._loss(self._run(x, training=False)[self._output], y))

    @torch.no_grad()
    def loss_perturbed(
        self, x: np.ndarray, y: np.ndarray, *, seed: int, k: int, sigma: float
    ) -> float:
        moved = dict(self._state)
        for name in self._trainable:
            shape = self._spec.param_shapes[name]
            rng = generator(seed, 0, k, f"direction/{name}")
            z = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
            z = z * self._masks[name] if name in self._masks else z
            moved[name] = self._state[name] + sigma * z
        logits = self._run(x, training=False, state=moved)[self._output]
        return float(self._loss(logits, y))

    def forward(
        self, x: np.ndarray, *, taps: Sequence[str] = (), training: bool = False
    ) -> dict[str, np.ndarray]:
        wanted = {*taps, self._output}
        for tap in wanted - set(self._spec.by_name):
            raise ValueError(f"no layer named {tap!r} to tap, expected one of the model's layers")
        with torch.set_grad_enabled(training):
            values = self._run(x, training=training, keep=wanted)
        self._kept_graph = {name: values[name] for name in wanted} if training else {}
        return {name: values[name].detach().numpy() for name in wanted}

    def backward(
        self, output_gradients: Mapping[str, np.ndarray], *, dense: bool = False
    ) -> dict[str, np.ndarray]:
        for name in output_gradients:
            if name not in self._kept_graph:
                raise ValueError(
                    f"no gradient can enter at {name!r}: call forward(x, taps=[{name!r}], "
                    "training=True) first, once for each backward"
                )
        gradients = torch.autograd.grad(
            [self._kept_graph[name] for name in output_gradients],
            [self._state[name] for name in self._trainable],
            [_tensor(g, np.float32) for g in output_gradients.values()],
            allow_unused=True,
            materialize_grads=True,
        )
        self._kept_graph = {}
        named = dict(zip(self._trainable, gradients, strict=True))
        if not dense:
            named = {name: self._masked(name, gradient) for name, gradient in named.items()}
        return {name: gradient.numpy() for name, gradient in named.items()}

    def apply(self, gradients: Params) -> None:
        named = {
            name: torch.from_numpy(np.array(gradients[name], np.float32))
            for name in self._trainable
            if name in gradients
        }
        self._descend(named)

    @property
    def _output(self) -> str:
        return self._spec.nodes[-1].name

    def _masked(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * self._masks[name] if name in self._masks else gradient

    @torch.no_grad()
    def _accumulate(self, gradients: Tensors) -> None:
        for name, gradient in gradients.items():
            if name not in self._importance:
                self._importance[name] = torch.zeros_like(gradient)
            self._importance[name].addcmul_(gradient, gradient)

    @torch.no_grad()
    def _descend(self, gradients: Tensors) -> None:
        lr, momentum = self._optimizer.lr, self._optimizer.momentum
        for name, gradient in gradients.items():
            weight = self._state[name]
            if name in self._masks:
                gradient.masked_fill_(self._masks[name] == 0, 0)  # NaN·0 is NaN
            if self._optimizer.weight_decay:
                gradient.add_(weight, alpha=self._optimizer.weight_decay)
            if momentum:
                if name not in self._velocity:
                    self._velocity[name] = torch.zeros_like(gradient)
                gradient = self._velocity[name].mul_(momentum).add_(gradient)
            weight.sub_(gradient, alpha=lr)

    def _loss(self, logits: torch.Tensor, labels: np.ndarray) -> torch.Tensor:
        target = _tensor(labels, np.int64)
        if self._loss_name == "ce":
            return F.cross_entropy(logits, target)
        one_hot = F.one_hot(target, logits.shape[1]).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, one_hot)

    def _run(
        self,
        x: np.ndarray,
        *,
        training: bool,
        keep: set[str] | None = None,
        state: Tensors | None = None,
    ) -> dict[str, torch.Tensor]:
        """Activations still needed: those in `keep` and the output."""
        state = self._state if state is None else state
        values = {INPUT: _tensor(x, np.float32)}
        keep = (keep or set()) | {self._output}
        readers = dict.fromkeys((INPUT, *self._spec.by_name), 0)
        for node in self._spec.nodes:
            for source in node.inputs:
                readers[source] += 1
        for node in self._spec.nodes:
            inputs = [values[source] for source in node.inputs]
            moves = training and f"{node.name}.running_mean" not in self._frozen
            values[node.name] = _layer(node, inputs, state, moves)
            for source in node.inputs:
                readers[source] -= 1
                if readers[source] == 0 and source not in keep:
                    values.pop(source, None)
        return values


def _tensor(array: np.ndarray, dtype: type) -> torch.Tensor:
    """Shares memory where it can; torch has no read-only tensors, so those are copied."""
    array = np.ascontiguousarray(array, dtype)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _layer(node: Node, inputs: list[torch.Tensor], state: Tensors, training: bool) -> torch.Tensor:
    """One node on (B, ...) inputs."""
    x = inputs[0]
    weight, bias = state.get(f"{node.name}.weight"), state.get(f"{node.name}.bias")
    match node.layer:
        case L.Linear():
            assert weight is not None
            return F.linear(x, weight, bias)
        case L.Conv2d(stride=stride, padding=padding, groups=groups):
            assert weight is not None
            return F.conv2d(x, weight, bias, stride, padding, 1, groups)
        case L.AvgPool2d(kernel_size=k, stride=stride, padding=padding):
            return F.avg_pool2d(x, k, stride, padding)
        case L.MaxPool2d(kernel_size=k, stride=stride, padding=padding):
            return F.max_pool2d(x, k, stride, padding)
        case L.GlobalAvgPool():
            return x.mean((2, 3))
        case L.GroupNorm(eps=eps, groups=groups):
            return F.group_norm(x, groups, weight, bias, eps)
        case L.BatchNorm(eps=eps, momentum=momentum):
            mean, var = state[f"{node.name}.running_mean"], state[f"{node.name}.running_var"]
            return F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
        case L.ReLU():
            return F.relu(x)
        case L.Hardswish():
            return F.hardswish(x)
        case L.Hardsigmoid():
            return F.hardsigmoid(x)
        case L.Flatten():
            return x.flatten(1)
        case L.Add():
            return sum(inputs[1:], start=x)
        case L.Scale():
            return x * inputs[1][:, :, None, None]
    raise ValueError(f"layer {node.name!r}: the torch engine lacks {type(node.layer).__name__}")
