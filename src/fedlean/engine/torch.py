"""The PyTorch engine: runs any `ModelSpec`, with masks as multiplications (*masked* arithmetic).

It saves no operations and no memory for a pruned model: it is the oracle of the native engine and
the engine of simulations.  GPUs are not covered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from fedlean.core import Params, SubModel
from fedlean.engine import checks
from fedlean.engine.directions import Kind, direction
from fedlean.engine.dropout import dropout_key, factors
from fedlean.engine.gradient_flow import needed
from fedlean.engine.memory import forward_memory, step_memory
from fedlean.engine.pieces import Importance, Pieces, piece_shape, pieces_of, whole
from fedlean.engine.protocol import SGD, Loss
from fedlean.engine.torch_layers import Tensors, run_layer
from fedlean.layers import Dropout
from fedlean.spec import INPUT, ModelSpec


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
        slower: frozenset[str] = frozenset(),
        seed: int = 0,
    ) -> TorchSession:
        """Raises ValueError when the parameters or the sub-model do not fit the spec."""
        checks.check_settings(batch_size, loss)
        checks.check_sub_model(spec, sub_model)
        return TorchSession(spec, params, sub_model, batch_size, optimizer, loss, seed)

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
    ) -> TorchForwardSession:
        """As `open`.  Directions come one after the other: torch's threads share each layer."""
        checks.check_directions_at_once(directions_at_once)
        return TorchForwardSession(
            self.open(spec, params, sub_model, batch_size=batch_size, optimizer=SGD(0.0), loss=loss)
        )


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
        seed: int = 0,
    ):
        self._spec = spec
        self._seed, self._passes = seed, 0
        self._batch_size = batch_size
        self._optimizer = optimizer
        self._loss_name = loss
        self._trainable = [name for name in spec.param_shapes if name not in sub_model.frozen]
        self._frozen = sub_model.frozen
        self._masks = {
            name: torch.from_numpy(np.ascontiguousarray(mask, np.float32))
            for name, mask in sub_model.masks.items()
        }
        self._loaded: dict[str, torch.Tensor] = {}
        self._velocity: dict[str, torch.Tensor] = {}
        self._importance: dict[str, torch.Tensor] = {}
        self._summed = whole(spec, sub_model.frozen)
        self._kept_graph: dict[str, torch.Tensor] = {}  # of the training forward, by node
        self._kept_examples = 0
        self._state: dict[str, torch.Tensor] = {}
        self.load(params)
        self.peak_memory_bytes = step_memory(
            spec,
            dict.fromkeys(self._masks, 0),
            batch_size=batch_size,
            optimizer_floats=bool(optimizer.momentum) + bool(optimizer.proximal),
            frozen=sub_model.frozen,
            sparse=False,
        ).peak_bytes

    def load(self, params: Params) -> None:
        checks.check_params(self._spec, params, self._patterns())
        self._kept_graph = {}
        for name in self._spec.tensor_shapes:
            tensor = self._unpacked(name, torch.tensor(params[name]))
            if self._optimizer.proximal and name in self._trainable:
                self._loaded[name] = tensor.clone()
            self._state[name] = tensor.requires_grad_(name in self._trainable)

    def _patterns(self) -> dict[str, np.ndarray]:
        """The masks as they came, bool; made from the factors, since the caller's may change."""
        return {name: factor.numpy() != 0 for name, factor in self._masks.items()}

    def _unpacked(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Dense, with exactly +0 at pruned coordinates."""
        if name not in self._masks:
            return tensor
        kept = self._masks[name] != 0
        if tensor.shape == kept.shape:  # not a multiplication: NaN·0 is NaN and -1·0 is -0
            return torch.where(kept, tensor, 0.0)
        return torch.zeros(kept.shape).masked_scatter_(kept, tensor)

    def params(self, *, packed: bool = False) -> dict[str, np.ndarray]:
        masks = self._patterns() if packed else {}
        held = {name: tensor.detach().numpy() for name, tensor in self._state.items()}
        return {n: v[masks[n]] if n in masks else v.copy() for n, v in held.items()}

    def step(self, x: np.ndarray, y: np.ndarray, *, importance: Importance = False) -> float:
        pieces = pieces_of(self._spec, self._frozen, importance)
        self._check_batch(x, y)
        checks.check_moments(self._spec, len(x), self._frozen)
        self._kept_graph = {}
        loss = self._loss(self._run(_tensor(x), training=True)[self._output], y)
        gradients = self._gradients([loss], [None])
        self._accumulate(gradients, pieces)
        self._descend(gradients)
        return float(loss.detach())

    def importance(self) -> dict[str, np.ndarray]:
        zeros = {p.tensor: torch.zeros(piece_shape(self._spec, p)) for p in self._summed}
        return {n: total.numpy().copy() for n, total in (zeros | self._importance).items()}

    @torch.no_grad()
    def loss(self, x: np.ndarray, y: np.ndarray) -> float:
        self._check_batch(x, y)
        self._kept_graph = {}
        return float(self._loss(self._run(_tensor(x), training=False)[self._output], y))

    def forward(
        self, x: np.ndarray, *, taps: Sequence[str] = (), training: bool = False
    ) -> dict[str, np.ndarray]:
        checks.check_input(self._spec, x, self._batch_size)
        checks.check_taps(self._spec, taps)
        if training:
            checks.check_moments(self._spec, len(x), self._frozen)
        wanted = {*taps, self._output}
        with torch.set_grad_enabled(training):
            # a copy, since the caller may write to x before the backward
            values = self._run(torch.tensor(x), training=training, keep=wanted)
        self._kept_graph = {name: values[name] for name in wanted} if training else {}
        self._kept_examples = len(x)
        return {name: values[name].detach().numpy().copy() for name in wanted}

    def backward(
        self, output_gradients: Mapping[str, np.ndarray], *, dense: bool = False
    ) -> dict[str, np.ndarray]:
        gradients = self._pulled_back(output_gradients)
        if not dense:
            gradients = {name: g * self._masks.get(name, 1) for name, g in gradients.items()}
        return {name: gradient.numpy() for name, gradient in gradients.items()}

    def descend(
        self, output_gradients: Mapping[str, np.ndarray], *, importance: Importance = False
    ) -> None:
        pieces = pieces_of(self._spec, self._frozen, importance)
        gradients = self._pulled_back(output_gradients)
        self._accumulate(gradients, pieces)
        self._descend(gradients)

    def apply(self, gradients: Params) -> None:
        checks.check_gradients(self._spec, gradients)
        self._kept_graph = {}
        self._descend({n: torch.tensor(gradients[n]) for n in self._trainable if n in gradients})

    @property
    def _output(self) -> str:
        return self._spec.nodes[-1].name

    def _check_batch(self, x: np.ndarray, y: np.ndarray) -> None:
        checks.check_batch(self._spec, x, y, self._batch_size, self._spec.output_shape[0])

    def _pulled_back(self, output_gradients: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """Through the last training forward, which this uses up."""
        checks.check_output_gradients(
            self._spec, output_gradients, self._kept_graph, self._kept_examples
        )
        outputs = [self._kept_graph[name] for name in output_gradients]
        self._kept_graph = {}
        return self._gradients(outputs, [_tensor(g) for g in output_gradients.values()])

    def _gradients(
        self, outputs: Sequence[torch.Tensor], entering: Sequence[torch.Tensor | None]
    ) -> dict[str, torch.Tensor]:
        """Of the trainable tensors, for dL/doutputs `entering` (None: the output is the loss)."""
        held = {name: self._state[name] for name in self._trainable}
        flows = [flow for flow in zip(outputs, entering, strict=True) if flow[0].requires_grad]
        if not flows or not held:  # torch refuses what nothing trainable reaches
            return {name: torch.zeros_like(tensor) for name, tensor in held.items()}
        gradients = torch.autograd.grad(
            [output for output, _ in flows],
            list(held.values()),
            [gradient for _, gradient in flows],
            allow_unused=True,
            materialize_grads=True,
        )
        return dict(zip(held, gradients, strict=True))

    @torch.no_grad()
    def _accumulate(self, gradients: Tensors, pieces: Pieces) -> None:
        """On the sums of the same pieces; others are given up."""
        if pieces and pieces != self._summed:
            self._importance, self._summed = {}, pieces
        for name, first, rows in pieces:
            gradient = gradients[name][first : first + rows]
            if name not in self._importance:
                self._importance[name] = torch.zeros_like(gradient)
            self._importance[name].addcmul_(gradient, gradient)

    @torch.no_grad()
    def _descend(self, gradients: Tensors) -> None:
        """One step of SGD (see the protocol); overwrites the gradients."""
        sgd = self._optimizer
        for name in gradients.keys() & self._masks.keys():
            gradients[name].masked_fill_(self._masks[name] == 0, 0)  # NaN·0 is NaN
        if sgd.clip_norm is not None:
            _clip(gradients, sgd.clip_norm)
        for name, gradient in gradients.items():
            weight = self._state[name]
            if sgd.weight_decay:
                gradient.add_(weight, alpha=sgd.weight_decay)
            if sgd.proximal:
                gradient.add_(weight - self._loaded[name], alpha=sgd.proximal)
            if sgd.momentum:
                if name not in self._velocity:
                    self._velocity[name] = torch.zeros_like(gradient)
                gradient = self._velocity[name].mul_(sgd.momentum).add_(gradient)
            weight.sub_(gradient, alpha=sgd.lr)

    def _loss(self, logits: torch.Tensor, labels: np.ndarray) -> torch.Tensor:
        target = _tensor(labels)
        if self._loss_name == "ce":
            return F.cross_entropy(logits, target)
        one_hot = F.one_hot(target, logits.shape[1]).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, one_hot)

    def _run(
        self,
        x: torch.Tensor,
        *,
        training: bool,
        keep: set[str] | None = None,
        state: Tensors | None = None,
    ) -> dict[str, torch.Tensor]:
        """Activations still needed: those in `keep` and the output."""
        state = self._state if state is None else state
        values = {INPUT: x}
        keep = (keep or set()) | {self._output}
        used = needed(self._spec, keep, training=training, frozen=self._frozen)
        nodes = [node for node in self._spec.nodes if node.name in used]
        passes = self._passes
        self._passes += training
        readers = Counter(source for node in nodes for source in node.inputs)
        for node in nodes:
            inputs = [values[source] for source in node.inputs]
            moves = training and f"{node.name}.running_mean" not in self._frozen
            if training and isinstance(node.layer, Dropout):
                key = dropout_key(self._seed, passes, node.name)
                drawn = factors(node.layer, key, tuple(inputs[0].shape))
                values[node.name] = inputs[0] * torch.from_numpy(drawn)
            else:
                values[node.name] = run_layer(node, inputs, state, moves)
            readers.subtract(node.inputs)
            for name in (node.name, *node.inputs):
                if readers[name] == 0 and name not in keep:
                    values.pop(name, None)
        return values


class TorchForwardSession:
    """See `fedlean.engine.protocol.ForwardSession`."""

    def __init__(self, session: TorchSession):
        self._session = session
        self.peak_memory_bytes = forward_memory(
            session._spec,
            dict.fromkeys(session._masks, 0),
            batch_size=session._batch_size,
            frozen=session._frozen,
            sparse=False,
        ).peak_bytes
        self.loss, self.load, self.params = session.loss, session.load, session.params

    @torch.no_grad()
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
        self._session._check_batch(x, y)
        checks.check_perturbation(seed, ks, sigma, kind)
        losses = np.empty(len(ks), np.float64)
        for i, k in enumerate(ks):
            moved = _Moved(self._session, seed, k, sigma, kind)
            logits = self._session._run(_tensor(x), training=False, state=moved)
            losses[i] = float(self._session._loss(logits[self._session._output], y))
        return losses

    def forward(self, x: np.ndarray, *, taps: Sequence[str] = ()) -> dict[str, np.ndarray]:
        return self._session.forward(x, taps=taps)


class _Moved(Mapping[str, torch.Tensor]):
    """A session's tensors at params + sigma·z_k, each made when it is asked for."""

    def __init__(self, session: TorchSession, seed: int, k: int, sigma: float, kind: Kind):
        self._state, self._masks = session._state, session._masks
        self._trainable = frozenset(session._trainable)
        self._seed, self._k, self._sigma = seed, k, np.float32(sigma)
        self._kind: Kind = kind

    def __getitem__(self, name: str) -> torch.Tensor:
        held = self._state[name]
        if name not in self._trainable:
            return held
        mask = self._masks[name].numpy() != 0 if name in self._masks else None
        z = direction(self._seed, self._k, name, tuple(held.shape), mask, self._kind)
        moved = held.detach().numpy().copy()
        moved.reshape(-1)[... if mask is None else mask.reshape(-1)] += self._sigma * z
        return torch.from_numpy(moved)

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def _tensor(array: np.ndarray) -> torch.Tensor:
    """Shares memory where it can; torch has no read-only tensors, so those are copied."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _clip(gradients: Tensors, clip_norm: float) -> None:
    """Scales the gradients to an L2 norm of at most clip_norm over all of them."""
    norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients.values()]
    norm = float(torch.stack(norms).norm()) if norms else 0.0
    if norm > clip_norm:
        for gradient in gradients.values():
            gradient.mul_(clip_norm / norm)
