"""Training behind a frozen beginning, which runs a few examples at a time and keeps nothing.

One session evaluates the beginning in micro-batches, another trains the rest on what comes out.
Together they are the `Session` of the whole model, in less memory.
"""

# B examples of a batch, m of a micro-batch

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod

import numpy as np

from fedlean.core import Params, SubModel
from fedlean.engine import checks
from fedlean.engine.pieces import Importance
from fedlean.engine.protocol import SGD, Engine, ForwardSession, Loss, Session
from fedlean.freezing.beginning import Split, split
from fedlean.spec import ModelSpec

FLOAT_BYTES = 4


def part(sub_model: SubModel, spec: ModelSpec) -> SubModel:
    """What of it is about the tensors of `spec`, a part of its model."""
    masks = {name: mask for name, mask in sub_model.masks.items() if name in spec.tensor_shapes}
    return SubModel(masks=masks, frozen=sub_model.frozen.intersection(spec.tensor_shapes))


def tensors_of(spec: ModelSpec, params: Params) -> dict[str, np.ndarray]:
    """Those of `spec`, a part of their model."""
    return {name: params[name] for name in spec.tensor_shapes}


def open_rest(
    engine: Engine,
    cut: Split,
    params: Params,
    sub_model: SubModel,
    *,
    batch_size: int,
    optimizer: SGD,
    loss: Loss = "ce",
) -> Session:
    """A session of what comes after the cut; `params` and `sub_model` are of the whole model."""
    return engine.open(
        cut.rest,
        tensors_of(cut.rest, params),
        part(sub_model, cut.rest),
        batch_size=batch_size,
        optimizer=optimizer,
        loss=loss,
    )


def check_micro_batch(micro_batch: int) -> None:
    """ValueError unless an integer from 1 to the largest batch."""
    whole = isinstance(micro_batch, int) and not isinstance(micro_batch, bool)
    if not whole or not 1 <= micro_batch <= checks.MAX_BATCH_SIZE:
        raise ValueError(
            f"micro_batch must be an integer from 1 to {checks.MAX_BATCH_SIZE}, "
            f"got {micro_batch!r:.40}"
        )


def held(shape: tuple[int, ...]) -> np.ndarray:
    """An array that is in memory at once: a device's limit counts it when sessions are opened."""
    values = np.empty(shape, np.float32)
    values.fill(0)  # what nobody has written to takes no memory yet
    return values


def features_of(session: ForwardSession, name: str, x: np.ndarray, out: np.ndarray, m: int) -> None:
    """Writes the activation of `name` on x (B, ...) to `out` (B, ...), m examples at a time."""
    for at in range(0, len(x), m):
        out[at : at + m] = session.forward(x[at : at + m])[name]


class BeginningSession:
    """A `fedlean.engine.protocol.Session` of `spec` whose frozen beginning only runs forward.

    Its calls are those of one session on the whole model, with the same results; on the native
    engine bit for bit.  BatchNorm in the beginning takes its running statistics, which are frozen.
    Taps are layers of the rest.

    batch_size, optimizer, loss: of the rest.  micro_batch: examples of a pass of the beginning; it
    changes memory and speed and no bit of a native result.  at: where the model is cut, "" after
    the largest frozen beginning.

    Raises ValueError as `Engine.open` and `freezing.beginning.split` do.
    """

    def __init__(
        self,
        engine: Engine,
        spec: ModelSpec,
        params: Params,
        sub_model: SubModel,
        *,
        batch_size: int,
        micro_batch: int,
        optimizer: SGD,
        loss: Loss = "ce",
        at: str = "",
    ):
        check_micro_batch(micro_batch)
        checks.check_settings(batch_size, loss)
        checks.check_sub_model(spec, sub_model)
        checks.check_params(spec, params, sub_model.masks)
        self._spec, self._sub_model = spec, sub_model
        self.cut: Split = split(spec, sub_model.frozen, at=at)
        beginning, rest, self.name = self.cut
        self._batch_size = batch_size
        self.micro_batch = min(micro_batch, batch_size)
        self._features = held((batch_size, *rest.input_shape))
        self.beginning: ForwardSession = engine.open_forward(
            beginning,
            tensors_of(beginning, params),
            part(sub_model, beginning),
            batch_size=self.micro_batch,
        )
        self.rest: Session = open_rest(
            engine,
            self.cut,
            params,
            sub_model,
            batch_size=batch_size,
            optimizer=optimizer,
            loss=loss,
        )

    @property
    def features_bytes(self) -> int:
        """Of what passes from the beginning to the rest: the batch, and the part that arrives."""
        examples = self._batch_size + self.micro_batch
        return FLOAT_BYTES * examples * prod(self.cut.rest.input_shape)

    @property
    def peak_memory_bytes(self) -> int:
        """Of both sessions, which are held together, and of what passes between them."""
        sessions = self.beginning.peak_memory_bytes + self.rest.peak_memory_bytes
        return sessions + self.features_bytes

    def features(self, x: np.ndarray) -> np.ndarray:
        """The rest's input for x (B, *input_shape): (B, *shape), a buffer that the next call takes.

        Raises ValueError where x is not what the model takes.
        """
        checks.check_input(self._spec, x, self._batch_size)
        out = self._features[: len(x)]
        features_of(self.beginning, self.name, x, out, self.micro_batch)
        return out

    def step(self, x: np.ndarray, y: np.ndarray, *, importance: Importance = False) -> float:
        checks.check_batch(self._spec, x, y, self._batch_size, self._spec.output_shape[0])
        return self.rest.step(self.features(x), y, importance=importance)

    def importance(self) -> Params:
        return self.rest.importance()

    def loss(self, x: np.ndarray, y: np.ndarray) -> float:
        checks.check_batch(self._spec, x, y, self._batch_size, self._spec.output_shape[0])
        return self.rest.loss(self.features(x), y)

    def forward(
        self, x: np.ndarray, *, taps: Sequence[str] = (), training: bool = False
    ) -> Mapping[str, np.ndarray]:
        self._check_taps(taps)
        return self.rest.forward(self.features(x), taps=taps, training=training)

    def backward(
        self, output_gradients: Mapping[str, np.ndarray], *, dense: bool = False
    ) -> Params:
        return self.rest.backward(output_gradients, dense=dense)

    def descend(
        self, output_gradients: Mapping[str, np.ndarray], *, importance: Importance = False
    ) -> None:
        self.rest.descend(output_gradients, importance=importance)

    def apply(self, gradients: Params) -> None:
        checks.check_gradients(self._spec, gradients)
        own = self.cut.rest.param_shapes
        self.rest.apply({name: value for name, value in gradients.items() if name in own})

    def load(self, params: Params) -> None:
        checks.check_params(self._spec, params, self._sub_model.masks)
        self.beginning.load(tensors_of(self.cut.beginning, params))
        self.rest.load(tensors_of(self.cut.rest, params))

    def params(self, *, packed: bool = False) -> Params:
        held = {**self.beginning.params(packed=packed), **self.rest.params(packed=packed)}
        return {name: held[name] for name in self._spec.tensor_shapes}

    def _check_taps(self, taps: Iterable[str]) -> None:
        checks.check_taps(self._spec, taps)
        for tap in taps:
            if tap not in self.cut.rest.by_name:
                raise ValueError(
                    f"layer {tap!r} is in the frozen beginning, which ends at {self.name!r}: tap a "
                    "layer after it, or open one session of the whole model"
                )
