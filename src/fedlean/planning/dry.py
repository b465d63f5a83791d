"""An engine that computes nothing: a client's half runs on it to see what it would send.

Sessions have the shapes of `fedlean.engine.protocol`.  What they give is generic: positive numbers
that no lossless code shortens, drawn once for a model, and parameters as they were loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod, sqrt
from typing import Literal

import numpy as np

from fedlean.core import Params, SubModel, generator
from fedlean.engine import checks
from fedlean.engine.directions import Kind
from fedlean.engine.memory import forward_memory, optimizer_floats, step_memory
from fedlean.engine.pieces import Importance, pieces_of
from fedlean.engine.protocol import SGD, Loss
from fedlean.spec import ModelSpec
from fedlean.tree import apply_mask, kept_counts, pack, unpack

LOSS = 2.302585092994046  # of every batch: a number of as many digits as losses have


class DryEngine:
    """Opens sessions that move nothing; memory is planned as for the native engine."""

    name = "dry"
    arithmetic: Literal["masked", "sparse"] = "sparse"
    instruction_set = "none"

    def __init__(self) -> None:
        self._drawn: dict[str, Params] = {}

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
    ) -> DrySession:
        """Raises ValueError naming the setting, mask or frozen tensor that does not fit."""
        checks.check_settings(batch_size, loss)
        checks.check_sub_model(spec, sub_model)
        return DrySession(self, spec, params, sub_model, batch_size, optimizer)

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
    ) -> DryForwardSession:
        """Raises ValueError as `open`."""
        checks.check_settings(batch_size, loss)
        checks.check_directions_at_once(directions_at_once)
        checks.check_sub_model(spec, sub_model)
        return DryForwardSession(spec, params, sub_model, batch_size, directions_at_once)

    def generic(self, spec: ModelSpec) -> Params:
        """float32, positive, for every trainable tensor in its dense shape; not to be changed.

        Uniform up to √fan_in: times initial weights, which are drawn up to its inverse, scores are
        alike in all layers, so that a mask by scores is spread evenly over them.
        """
        if spec.hash not in self._drawn:
            drawn = {}
            for name, shape in spec.param_shapes.items():
                values = generator(0, 0, 0, f"dry/{name}").random(shape, dtype=np.float32)
                np.subtract(np.float32(1), values, out=values)
                values *= np.float32(sqrt(prod(shape[1:])))
                drawn[name] = values
            self._drawn[spec.hash] = drawn
        return self._drawn[spec.hash]


class _Held:
    """The tensors of a session, and forward passes that give zeros."""

    def __init__(self, spec: ModelSpec, params: Params, sub_model: SubModel):
        self._spec, self._params, self._sub_model = spec, params, sub_model

    def load(self, params: Params) -> None:
        self._params = params

    def params(self, *, packed: bool = False) -> dict[str, np.ndarray]:
        masks = self._sub_model.masks
        if packed:
            found = pack(self._params, masks)
        else:
            dense = {
                name: unpack(value, masks[name]) if name in masks else value
                for name, value in self._params.items()
            }
            found = apply_mask(dense, masks)
        return {
            name: value.copy() if value is self._params[name] else value
            for name, value in found.items()
        }

    def loss(self, x: np.ndarray, y: np.ndarray) -> float:
        return LOSS

    def _forward(self, x: np.ndarray, taps: Sequence[str]) -> dict[str, np.ndarray]:
        checks.check_taps(self._spec, taps)
        names = dict.fromkeys((*taps, self._spec.nodes[-1].name))
        return {name: np.zeros((len(x), *self._spec.shapes[name]), np.float32) for name in names}


class DrySession(_Held):
    """See `fedlean.engine.protocol.Session`."""

    def __init__(
        self,
        engine: DryEngine,
        spec: ModelSpec,
        params: Params,
        sub_model: SubModel,
        batch_size: int,
        optimizer: SGD,
    ):
        super().__init__(spec, params, sub_model)
        self._engine, self._batch_size, self._optimizer = engine, batch_size, optimizer
        self._importance: Importance = False

    @property
    def peak_memory_bytes(self) -> int:
        return step_memory(
            self._spec,
            kept_counts(self._sub_model.masks),
            batch_size=self._batch_size,
            optimizer_floats=optimizer_floats(self._optimizer),
            frozen=self._sub_model.frozen,
            importance=bool(self._importance),
            pieces=[pieces_of(self._spec, self._sub_model.frozen, self._importance)],
        ).peak_bytes

    def step(self, x: np.ndarray, y: np.ndarray, *, importance: Importance = False) -> float:
        self._importance = importance or self._importance
        return LOSS

    def importance(self) -> dict[str, np.ndarray]:
        whole = {name: np.square(values, out=values) for name, values in self._generic().items()}
        if isinstance(self._importance, bool):
            return whole
        pieces = pieces_of(self._spec, self._sub_model.frozen, self._importance)
        return {name: whole[name][first : first + rows] for name, first, rows in pieces}

    def forward(
        self, x: np.ndarray, *, taps: Sequence[str] = (), training: bool = False
    ) -> dict[str, np.ndarray]:
        return self._forward(x, taps)

    def backward(
        self, output_gradients: Mapping[str, np.ndarray], *, dense: bool = False
    ) -> dict[str, np.ndarray]:
        gradients = self._generic()
        return gradients if dense else apply_mask(gradients, self._sub_model.masks)

    def descend(
        self, output_gradients: Mapping[str, np.ndarray], *, importance: Importance = False
    ) -> None:
        self._importance = importance or self._importance

    def apply(self, gradients: Params) -> None:
        checks_of = self._spec.param_shapes
        for name in gradients:
            if name not in checks_of:
                raise ValueError(f"gradient {name!r} is of no trainable tensor of the model")

    def _generic(self) -> dict[str, np.ndarray]:
        frozen = self._sub_model.frozen
        drawn = self._engine.generic(self._spec)
        return {name: values.copy() for name, values in drawn.items() if name not in frozen}


class DryForwardSession(_Held):
    """See `fedlean.engine.protocol.ForwardSession`."""

    def __init__(
        self,
        spec: ModelSpec,
        params: Params,
        sub_model: SubModel,
        batch_size: int,
        directions_at_once: int,
    ):
        super().__init__(spec, params, sub_model)
        self._batch_size, self._at_once = batch_size, directions_at_once

    @property
    def peak_memory_bytes(self) -> int:
        return forward_memory(
            self._spec,
            kept_counts(self._sub_model.masks),
            batch_size=self._batch_size,
            frozen=self._sub_model.frozen,
            directions_at_once=self._at_once,
        ).peak_bytes

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
        checks.check_perturbation(seed, ks, sigma, kind)
        return LOSS + sigma * generator(seed, 0, 0, "dry/slopes").standard_normal(len(ks))

    def forward(self, x: np.ndarray, *, taps: Sequence[str] = ()) -> dict[str, np.ndarray]:
        return self._forward(x, taps)


class DryBatches:
    """Batches of zeros, in which nothing is recognised: their labels are the last class.

    one: the first batch stands for all that are drawn.
    """

    def __init__(
        self, input_shape: Sequence[int], classes: int, num_examples: int, *, one: bool = False
    ):
        self.num_examples = num_examples
        self._shape, self._label, self._one = tuple(input_shape), classes - 1, one

    def draw(
        self, *, steps: int, batch_size: int, seed: int, examples: int | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for _ in range(min(steps, 1) if self._one else steps):
            x = np.zeros((batch_size, *self._shape), np.float32)
            yield x, np.full(batch_size, self._label, np.int64)
