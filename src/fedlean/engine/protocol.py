"""What an engine is: the seam between the methods and whatever does the arithmetic.

An engine opens a session for (spec, params, sub-model, batch size, optimiser, loss).  Arrays cross
at task boundaries only; between them the session keeps its own buffers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from fedlean.core import Params, SubModel
from fedlean.spec import ModelSpec

Loss = Literal["ce", "bce"]  # cross-entropy; BCE-with-logits on one-hot, mean over batch × classes


@dataclass(frozen=True)
class SGD:
    """w <- w - lr·v,  v <- momentum·v + g + weight_decay·w  (PyTorch's SGD, no dampening)."""

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0


class Session(Protocol):
    """One sub-model in training.  B is the number of examples in x, at most batch_size."""

    peak_memory_bytes: int  # what the engine says it needs for a step

    def step(self, x: np.ndarray, y: np.ndarray, *, importance: bool = False) -> float:
        """Forward, backward, update on x (B, *input_shape), y (B,); the mean loss before it.

        With `importance`, adds g² of every coordinate, pruned ones too, to `importance()`.
        """
        ...

    def importance(self) -> Params:
        """Σ g² over the importance steps so far, for every trainable tensor (dense shapes)."""
        ...

    def loss(self, x: np.ndarray, y: np.ndarray) -> float:
        """Mean loss, forward only, in evaluation mode."""
        ...

    def loss_perturbed(
        self, x: np.ndarray, y: np.ndarray, *, seed: int, k: int, sigma: float
    ) -> float:
        """Mean loss at params + sigma·z, z the k-th Gaussian direction of `seed`, masked."""
        ...

    def forward(
        self, x: np.ndarray, *, taps: Sequence[str] = (), training: bool = False
    ) -> Mapping[str, np.ndarray]:
        """Activations (B, ...) of the tapped nodes and of the output node, by node name."""
        ...

    def backward(
        self, output_gradients: Mapping[str, np.ndarray], *, dense: bool = False
    ) -> Params:
        """Vector-Jacobian product of the last training forward: dL/dparams for given dL/dnode.

        Gradients of masked coordinates are 0 unless `dense`.
        """
        ...

    def apply(self, gradients: Params) -> None:
        """One optimiser step with the given gradients; masked coordinates stay 0."""
        ...

    def load(self, params: Params) -> None: ...

    def params(self) -> Params:
        """A copy of all tensors (parameters and buffers), masked coordinates exactly 0."""
        ...


class Engine(Protocol):
    """Opens sessions.  `arithmetic` says whether a mask saves anything here."""

    name: str
    arithmetic: Literal["masked", "sparse"]
    instruction_set: str  # results are bit-equal on the same one only

    def open(
        self,
        spec: ModelSpec,
        params: Params,
        sub_model: SubModel,
        *,
        batch_size: int,
        optimizer: SGD,
        loss: Loss = "ce",
    ) -> Session: ...
