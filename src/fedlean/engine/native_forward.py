"""Evaluation in the native engine, at the weights and near them: no backpropagation.

Perturbed weights are made in C++, one layer at a time and in the order in which the kernels read
them (`native/include/fedlean/direction.h`), so there is no second copy of the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedlean import _native
from fedlean.core import Params, SubModel
from fedlean.engine import checks
from fedlean.engine.directions import Kind, direction_key, normal_table
from fedlean.engine.native_tensors import NativeTensors
from fedlean.engine.protocol import Loss
from fedlean.spec import ModelSpec

_WEIGHT_KEY, _COLUMNS_KEY, _BIAS_KEY, _KEYS = 0, 1, 2, 3  # of a node, in C++'s order
_KEYS_AT_ONCE = 64  # directions


class NativeForwardSession:
    """See `fedlean.engine.protocol.ForwardSession`."""

    def __init__(
        self,
        engine: _native.Engine,
        network: _native.Network,
        spec: ModelSpec,
        params: Params,
        sub_model: SubModel,
        batch_size: int,
        loss: Loss,
        directions_at_once: int,
        again: _native.ForwardSession | None = None,
    ):
        """`again`: the native half of an earlier session that differed in its values only."""
        self._spec = spec
        self._batch_size = batch_size
        self._tensors = tensors = NativeTensors(spec, params, sub_model)
        if again is not None:
            self._session = again
        else:
            self._session = _native.ForwardSession(
                engine,
                network,
                batch_size=batch_size,
                loss=loss,
                directions_at_once=directions_at_once,
                **tensors.options(),
            )
            tensors.build(self._session, sub_model.masks)
        self._load(params)

    @property
    def native(self) -> _native.ForwardSession:
        return self._session

    @property
    def peak_memory_bytes(self) -> int:
        """The plan: everything that a loss holds.  The table of normal values is the process's."""
        return self._session.planned_bytes()

    @property
    def held_bytes(self) -> int:
        """What is allocated now; after a loss, exactly `peak_memory_bytes`."""
        return self._session.held_bytes()

    def load(self, params: Params) -> None:
        checks.check_params(self._spec, params, self._tensors.masks(self._session))
        self._load(params)

    def params(self, *, packed: bool = False) -> dict[str, np.ndarray]:
        return self._tensors.read(self._session, packed=packed)

    def loss(self, x: np.ndarray, y: np.ndarray) -> float:
        try:
            return self._session.loss(x, y)
        except (TypeError, ValueError):
            self._explain(x, y)
            raise

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
        losses = np.empty(len(ks), np.float64)
        normals = normal_table()
        # one call even for no direction, which checks the batch
        for first in range(0, max(1, len(ks)), _KEYS_AT_ONCE):
            some = slice(first, first + _KEYS_AT_ONCE)
            keys = self._keys(seed, ks[some], kind)
            try:
                self._session.losses(x, y, kind, sigma, normals, keys, losses[some])
            except (TypeError, ValueError):
                self._explain(x, y)
                raise
        return losses

    def forward(self, x: np.ndarray, *, taps: Sequence[str] = ()) -> dict[str, np.ndarray]:
        checks.check_input(self._spec, x, self._batch_size)
        checks.check_taps(self._spec, taps)
        values = {
            name: np.empty((len(x), *self._spec.shapes[name]), np.float32)
            for name in (*taps, self._spec.nodes[-1].name)
        }
        nodes = [self._tensors.nodes[name] for name in values]
        self._session.forward(x, nodes, list(values.values()))
        return values

    def _explain(self, x: np.ndarray, y: np.ndarray) -> None:
        """Raises the ValueError that says what the native checks, which are fast, refused."""
        checks.check_batch(self._spec, x, y, self._batch_size, self._spec.output_shape[0])

    def _load(self, params: Params) -> None:
        for name, place in self._tensors.places.items():
            packed = self._tensors.is_packed(name, params[name])
            self._session.load(*place, params[name], packed)

    def _keys(self, seed: int, ks: Sequence[int], kind: Kind) -> np.ndarray:
        """uint64 (len(ks), nodes, 3): those of `fedlean.engine.directions.direction`."""
        keys = np.zeros((len(ks), len(self._spec.nodes), _KEYS), np.uint64)
        uses = [use for name in self._tensors.trainable for use in self._uses(name, kind)]
        for of_direction, k in zip(keys, ks, strict=True):
            for node, key, purpose in uses:
                of_direction[node, key] = direction_key(seed, k, purpose)
        return keys

    def _uses(self, name: str, kind: Kind) -> list[tuple[int, int, str]]:
        """(node, key, purpose) of the numbers that a tensor's direction is made of."""
        node = self._tensors.places[name].node
        if name.endswith(".bias"):
            return [(node, _BIAS_KEY, name)]
        if kind == "rank1" and len(self._spec.param_shapes[name]) > 1:
            return [(node, _WEIGHT_KEY, f"{name}/rows"), (node, _COLUMNS_KEY, f"{name}/columns")]
        return [(node, _WEIGHT_KEY, name)]
