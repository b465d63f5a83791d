"""The best that dense PyTorch does: the denominator of every ratio in these benchmarks.

A plain eager module, trained as a user would: both memory formats, SGD fused and as PyTorch has it
by default.  Which of the four is fastest depends on the model, the threads and the machine, so all
are tried and the best counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

import numpy as np
import torch
import torch.nn.functional as F

from fedlean.core import Params
from fedlean.engine.protocol import SGD
from fedlean.models.torch import to_torch
from fedlean.spec import ModelSpec

FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
Batch = tuple[np.ndarray, np.ndarray]  # x float32 (B, *input_shape), y int64 (B,)


class DenseModel:
    """One module with its optimiser; it goes round `batches`, held in the module's format."""

    def __init__(
        self,
        spec: ModelSpec,
        params: Params,
        batches: Sequence[Batch],
        optimizer: SGD,
        *,
        memory_format: str,
        fused: bool,
    ):
        layout = FORMATS[memory_format]
        module = to_torch(spec, params)
        self.module = module.to(memory_format=layout)  # pyright: ignore[reportCallIssue]
        self._batches = cycle([_tensors(batch, layout) for batch in batches])
        self._optimizer = torch.optim.SGD(
            self.module.parameters(),
            optimizer.lr,
            optimizer.momentum,
            weight_decay=optimizer.weight_decay,
            fused=fused,
        )
        self._squares: list[torch.Tensor] = []

    def step(self) -> float:
        """Forward, backward, update; the loss before it."""
        loss = self._backward()
        self._optimizer.step()
        return float(loss)

    def importance_step(self) -> float:
        """A step that also adds g² of every weight to a sum."""
        loss = self._backward()
        self._squares = self._squares or [torch.zeros_like(p) for p in self.module.parameters()]
        with torch.no_grad():
            for total, parameter in zip(self._squares, self.module.parameters(), strict=True):
                assert parameter.grad is not None
                total.addcmul_(parameter.grad, parameter.grad)
        self._optimizer.step()
        return float(loss)

    def loss(self) -> float:
        """Forward only, in evaluation mode."""
        x, y = next(self._batches)
        self.module.eval()
        with torch.inference_mode():
            loss = F.cross_entropy(self.module(x), y)
        self.module.train()
        return float(loss)

    def _backward(self) -> torch.Tensor:
        x, y = next(self._batches)
        self._optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.module(x), y)
        loss.backward()
        return loss.detach()


def _tensors(batch: Batch, layout: torch.memory_format) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = torch.from_numpy(batch[0].copy()), torch.from_numpy(batch[1].copy())
    return (x.contiguous(memory_format=layout) if x.ndim == 4 else x), y


def dense_models(
    spec: ModelSpec, params: Params, batches: Sequence[Batch], optimizer: SGD
) -> dict[str, DenseModel]:
    """The candidates by name.  A model without images has one memory format."""
    images = len(spec.input_shape) == 3 and any(len(s) == 3 for s in list(spec.shapes.values())[1:])
    return {
        f"{memory_format}{', fused SGD' if fused else ''}": DenseModel(
            spec, params, batches, optimizer, memory_format=memory_format, fused=fused
        )
        for memory_format in (FORMATS if images else ("NCHW",))
        for fused in (True, False)
    }
