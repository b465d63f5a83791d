"""What an engine is: the seam between the methods and whatever does the arithmetic.

An engine opens a session for (spec, params, sub-model, batch size, optimiser, loss).  Arrays cross
at task boundaries only; between them the session keeps its own buffers: it never keeps or changes
an array of the caller's, and what it returns is the caller's.

Every call checks its arguments before it computes or changes anything (`fedlean.engine.checks`) and
raises ValueError naming the one that is wrong; the session goes on as if the call had not been.
Arrays are C-contiguous; x, parameters and gradients are float32 and finite, y is int64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Literal, Protocol

import numpy as np

from fedlean.core import Params, SubModel
from fedlean.engine.directions import Kind
from fedlean.engine.pieces import Importance
from fedlean.spec import ModelSpec

Loss = Literal["ce", "bce"]  # cross-entropy; BCE-with-logits on one-hot, mean over batch × classes


@dataclass(frozen=True)
class SGD:
    """PyTorch's SGD without dampening, with clipping and FedProx's proximal term.

    For the gradient g of the loss, in this order, on trainable and kept coordinates only:

        g <- g · min(1, clip_norm / ‖g‖)    ‖g‖ over all tensors together
        g <- g + weight_decay·w + proximal·(w - w_loaded)
        v <- momentum·v + g
        w <- w - lr·v

    w_loaded is what the last `open` or `load` brought (Li et al., MLSys 2020, eq. (2)).  Clipping
    is that of torch.nn.utils.clip_grad_norm_ without the 1e-6 that it adds to the norm.  A step
    clips what that step gives; `apply` clips the gradients given to it.  Raises ValueError naming
    the field that is not finite or out of range.
    """

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float | None = None  # None: no clipping
    proximal: float = 0.0  # μ of FedProx

    def __post_init__(self) -> None:
        for name in ("lr", "momentum", "weight_decay", "proximal"):
            value = getattr(self, name)
            if not 0 <= value < inf:
                raise ValueError(f"{name} must be finite and at least 0, got {value!r}")
        if self.clip_norm is not None and not 0 < self.clip_norm < inf:
            raise ValueError(f"clip_norm must be finite and positive, got {self.clip_norm!r}")


class Session(Protocol):
    """One sub-model in training.  B is the number of examples in x, at most batch_size."""

    @property
    def peak_memory_bytes(self) -> int:
        """What the engine says it needs for a step."""
        ...

    def step(self, x: np.ndarray, y: np.ndarray, *, importance: Importance = False) -> float:
        """Forward, backward, update on x (B, *input_shape), y (B,); the mean loss before it.

        With `importance`, adds g² of every coordinate, pruned ones too, to `importance()`, g being
        the loss's gradient: not clipped, no decay.  Where it names pieces, of those alone: no other
        dense gradients are computed, and no other sums held.
        """
        ...

    def importance(self) -> Params:
        """Σ g² over the importance steps so far, for every trainable tensor (dense shapes).

        Where the last ones named pieces, of each the sums (rows, *shape[1:]) by the tensor's name.
        A step that names others gives up the sums so far, and starts anew at 0.
        """
        ...

    def loss(self, x: np.ndarray, y: np.ndarray) -> float:
        """Mean loss, forward only, in evaluation mode."""
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

        Gradients enter at nodes that the forward returned, each (B, *shape).  All trainable tensors
        come back in their dense shapes; pruned coordinates are 0 unless `dense`.  Each training
        forward serves one backward or `descend`, and none once the session has computed anything
        else.
        """
        ...

    def descend(
        self, output_gradients: Mapping[str, np.ndarray], *, importance: Importance = False
    ) -> None:
        """Backward from the last training forward and one optimiser step: `apply(backward(...))`.

        No gradient leaves the engine, so that it costs what the rest of a `step` costs after the
        loss: it is for losses that the engine does not know.  Gradients enter as in `backward`,
        each (B, *shape), and are refused as there.  All trainable tensors move, those that no
        gradient reaches by what `SGD` does with 0.  `importance` as in `step`, g being what
        `backward` would give with `dense`.
        """
        ...

    def apply(self, gradients: Params) -> None:
        """One optimiser step with the given dense gradients; pruned coordinates stay 0.

        Tensors without a gradient stay as they are, and so do frozen ones with one.
        """
        ...

    def load(self, params: Params) -> None:
        """Replaces all tensors, in the form that `open` takes; the optimiser's momentum is kept."""
        ...

    def params(self, *, packed: bool = False) -> Params:
        """A copy of all tensors (parameters and buffers), pruned coordinates exactly +0.

        With `packed`, masked tensors are their kept values alone (K,), row-major.
        """
        ...


class ForwardSession(Protocol):
    """One sub-model that is only evaluated, at its parameters or near them: no backpropagation.

    It holds the weights, the activations that live at once, and the perturbed weights of the layer
    in work: never a second copy of the model.  Conventions and checks are those of `Session`;
    BatchNorm takes its running statistics.
    """

    @property
    def peak_memory_bytes(self) -> int:
        """What the engine says it needs for any call but `forward`, whose taps come on top."""
        ...

    def loss(self, x: np.ndarray, y: np.ndarray) -> float:
        """Mean loss on x (B, *input_shape), y (B,)."""
        ...

    def losses_perturbed(
        self,
        x: np.ndarray,
        y: np.ndarray,
        *,
        seed: int,
        ks: Sequence[int],
        sigma: float,
        kind: Kind = "gaussian",
    ) -> np.ndarray:
        """Mean losses float64 (len(ks),), each at params + sigma·z_k.

        z_k is the direction `k` of `seed` (`fedlean.engine.directions`) of every tensor that is
        not frozen, on kept coordinates.  A perturbed weight is w + float32(sigma)·z, product and
        sum each rounded to float32, on every engine.  `sigma` may be negative.
        """
        ...

    def forward(self, x: np.ndarray, *, taps: Sequence[str] = ()) -> Mapping[str, np.ndarray]:
        """Activations (B, ...) of the tapped nodes and of the output node, by node name."""
        ...

    def load(self, params: Params) -> None:
        """Replaces all tensors, in the form that `open_forward` takes."""
        ...

    def params(self, *, packed: bool = False) -> Params:
        """A copy of all tensors, as `Session.params`."""
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
        slower: frozenset[str] = frozenset(),
        seed: int = 0,
    ) -> Session:
        """`params` holds every tensor of the spec.

        A masked one is dense, and its pruned coordinates are ignored, or packed: its kept values
        (K,) in the row-major order of its mask, as they travel.  `slower` names the layers that an
        engine of two forms holds in the slower one (`engine.forms`); others take no notice.  `seed`
        is what a Dropout draws from (`engine.dropout`); sessions of one seed drop the same.  Raises
        ValueError, also for what this engine does not support.
        """
        ...

    def open_forward(
        self,
        spec: ModelSpec,
        params: Params,
        sub_model: SubModel,
        *,
        batch_size: int,
        loss: Loss = "ce",
        directions_at_once: int = 1,
        slower: frozenset[str] = frozenset(),
    ) -> ForwardSession:
        """`params` and `slower` as `open` takes them.

        With `directions_at_once`, an engine of several threads may evaluate so many perturbed
        models at the same time, each in memory of its own; results do not depend on it.  Raises
        ValueError, also for what this engine does not support.
        """
        ...
