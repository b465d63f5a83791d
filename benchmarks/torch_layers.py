"""One Linear or Conv2d trained outside FedLean: dense PyTorch, torch CSR and SparseProp.

Each contender is a function that does the layer's whole share of a training step: output, gradient
of the input, gradient of the weight (kept coordinates only where that is the point), bias, SGD with
momentum.  The gradient of the output is given.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fedlean.engine.protocol import SGD
from fedlean.layers import Conv2d, Linear

SPARSEPROP_LANES = 8  # its convolutions give wrong results for batches that are no multiple


@dataclass(frozen=True)
class LayerCase:
    """A layer, its input (B, ...), the gradient of its output (B, ...), weight and bias."""

    layer: Linear | Conv2d
    x: np.ndarray
    grad: np.ndarray
    weight: np.ndarray  # pruned coordinates are 0
    bias: np.ndarray
    optimizer: SGD


def dense_layers(case: LayerCase) -> dict[str, Callable[[], object]]:
    """Both memory formats, SGD fused and as PyTorch has it by default."""
    formats = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
    if case.x.ndim != 4:
        del formats["channels_last"]
    return {
        f"{name}{', fused SGD' if fused else ''}": _dense(case, layout, fused)
        for name, layout in formats.items()
        for fused in (True, False)
    }


def sparse_layers(case: LayerCase) -> dict[str, Callable[[], object]]:
    """Those that there are for this layer: torch CSR, and SparseProp if it is installed."""
    contenders = {}
    if isinstance(case.layer, Linear) or case.layer.groups == 1:
        contenders["torch CSR"] = CSRLayer(case).step
        if importlib.util.find_spec("sparseprop") and len(case.x) % SPARSEPROP_LANES == 0:
            contenders |= _sparseprop(case)
    return contenders


def dense_output(case: LayerCase) -> np.ndarray:
    """What every contender must compute."""
    return _module(case)(torch.from_numpy(case.x)).detach().numpy()


def _module(case: LayerCase) -> nn.Linear | nn.Conv2d:
    layer, weight = case.layer, torch.from_numpy(case.weight.copy())
    if isinstance(layer, Linear):
        module = nn.Linear(weight.shape[1], weight.shape[0])
    else:
        channels = case.x.shape[1]
        module = nn.Conv2d(
            channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            groups=layer.groups,
        )
    module.weight = nn.Parameter(weight)
    module.bias = nn.Parameter(torch.from_numpy(case.bias.copy()))
    return module


def _dense(case: LayerCase, layout: torch.memory_format, fused: bool) -> Callable[[], object]:
    return _trained(_module(case), case, layout, fused)


def _trained(
    module: nn.Module, case: LayerCase, layout: torch.memory_format, fused: bool
) -> Callable[[], object]:
    """The training step of a module with autograd; `x` needs a gradient, which is thrown away."""
    x, grad = torch.from_numpy(case.x.copy()), torch.from_numpy(case.grad.copy())
    if case.x.ndim == 4:
        x, grad = (t.contiguous(memory_format=layout) for t in (x, grad))
        module.to(memory_format=layout)  # pyright: ignore[reportCallIssue]
    x.requires_grad_()
    settings = case.optimizer
    optimizer = torch.optim.SGD(module.parameters(), settings.lr, settings.momentum, fused=fused)

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        x.grad = None
        y = module(x)
        y.backward(grad)
        optimizer.step()
        return y.detach()

    return step


def _sparseprop(case: LayerCase) -> dict[str, Callable[[], object]]:
    from sparseprop.modules import SparseConv2d, SparseLinear  # pyright: ignore[reportMissingImports]

    layout = torch.contiguous_format
    dense = _module(case)
    if isinstance(dense, nn.Linear):
        return {"SparseProp": _trained(SparseLinear.from_dense(dense), case, layout, False)}
    return {
        f"SparseProp over {what}": _trained(
            SparseConv2d.from_dense(dense, vectorizing_over_on=over_width), case, layout, False
        )
        for what, over_width in (("batch", False), ("width", True))
        if not (over_width and case.grad.shape[-1] < SPARSEPROP_LANES)
    }


class CSRLayer:
    """torch's own sparse kernels at their best: W and its transpose kept as CSR, no autograd.

    The transpose's values are gathered anew in each step; the weight gradient is taken at the kept
    coordinates with `sampled_addmm`; a convolution is an im2col around that.
    """

    def __init__(self, case: LayerCase):
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        torch.sparse.check_sparse_tensor_invariants.disable()  # else a warning, and a slower step
        self._case, self._layer = case, case.layer
        self._x, self._grad = torch.from_numpy(case.x.copy()), torch.from_numpy(case.grad.copy())
        matrix = torch.from_numpy(case.weight.reshape(len(case.weight), -1))
        self._weight = matrix.to_sparse_csr()
        self._order, self._transposed = _transpose(self._weight)
        self._pattern = torch.sparse_csr_tensor(
            self._weight.crow_indices(),
            self._weight.col_indices(),
            torch.zeros_like(self._weight.values()),
            self._weight.shape,
        )
        self._bias = torch.from_numpy(case.bias.copy())
        self._momenta = torch.zeros_like(self._weight.values()), torch.zeros_like(self._bias)

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        columns, grad = self._columns(), self._grad.transpose(0, 1).reshape(len(self._bias), -1)
        y = torch.sparse.mm(self._weight, columns) + self._bias[:, None]
        self._transposed.values().copy_(self._weight.values()[self._order])
        self._fold(torch.sparse.mm(self._transposed, grad))
        grad_weight = torch.sparse.sampled_addmm(self._pattern, grad, columns.T, beta=0.0).values()
        settings = self._case.optimizer
        for value, gradient, momentum in (
            (self._weight.values(), grad_weight, self._momenta[0]),
            (self._bias, grad.sum(1), self._momenta[1]),
        ):
            value.sub_(momentum.mul_(settings.momentum).add_(gradient), alpha=settings.lr)
        return self._images(y)

    def _columns(self) -> torch.Tensor:
        """The input as a matrix (weights per output, B * pixels)."""
        if isinstance(self._layer, Linear):
            return self._x.T.contiguous()
        columns = F.unfold(
            self._x, self._layer.kernel_size, 1, self._layer.padding, self._layer.stride
        )
        return columns.transpose(0, 1).reshape(columns.shape[1], -1)

    def _fold(self, grad_columns: torch.Tensor) -> torch.Tensor:
        """The gradient of the input from that of its columns."""
        if isinstance(self._layer, Linear):
            return grad_columns.T.contiguous()
        examples, size = len(self._x), tuple(self._x.shape[2:])
        columns = grad_columns.reshape(len(grad_columns), examples, -1).transpose(0, 1)
        layer = self._layer
        return F.fold(columns, size, layer.kernel_size, 1, layer.padding, layer.stride)

    def _images(self, y: torch.Tensor) -> torch.Tensor:
        shape = self._grad.shape
        return y.reshape(shape[1], shape[0], *shape[2:]).transpose(0, 1).contiguous()


def _transpose(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(which value of `matrix` is the transpose's i-th, the transpose)."""
    rows, columns = matrix.shape
    numbered = torch.sparse_csr_tensor(
        matrix.crow_indices(),
        matrix.col_indices(),
        torch.arange(1, len(matrix.values()) + 1, dtype=torch.float64),
        (rows, columns),
    )
    turned = numbered.to_sparse_coo().T.coalesce().to_sparse_csr()
    order = turned.values().long() - 1
    transposed = torch.sparse_csr_tensor(
        turned.crow_indices(), turned.col_indices(), matrix.values()[order], (columns, rows)
    )
    return order, transposed
