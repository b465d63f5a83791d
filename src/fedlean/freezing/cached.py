"""What a frozen beginning makes of a client's whole data, computed once.

Later passes then train the rest of the model (`session.open_rest`) on that.  It is for data that is
the same at each draw: whoever augments (crops, flips, noise) must not use it, since an example has
one activation here.  `Batches` says nothing of augmentation, so nothing here can refuse it.
"""

# n examples of the client, m of a micro-batch

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np

from fedlean.core import Batches, Params, SubModel
from fedlean.data.batches import drawn_positions
from fedlean.engine.protocol import Engine
from fedlean.freezing.beginning import Split
from fedlean.freezing.session import FLOAT_BYTES, check_micro_batch, held, part, tensors_of

PASS_SEED = 0  # of the one pass over the data


class CachedBatches:
    """`Batches` of activations: the examples, labels and draws of the data that they are made of.

    features float32 (n, *shape), y int64 (n,), in the order of the client's data.
    """

    def __init__(self, features: np.ndarray, y: np.ndarray):
        self.features, self.y = features, y
        self.num_examples = len(y)

    @property
    def features_bytes(self) -> int:
        """In memory or in the file."""
        return features_bytes(self.features.shape[1:], self.num_examples)

    def draw(
        self, *, steps: int, batch_size: int, seed: int, examples: int | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """As `fedlean.data.batches.ClientData.draw`, with x float32 (batch_size, *shape)."""
        drawn = drawn_positions(self.num_examples, steps, batch_size, seed, examples)
        return ((np.array(self.features[at]), self.y[at]) for at in drawn)


def features_bytes(shape: tuple[int, ...], num_examples: int) -> int:
    """What activations of `shape` take."""
    return FLOAT_BYTES * num_examples * prod(shape)


def cache(
    engine: Engine,
    cut: Split,
    params: Params,
    sub_model: SubModel,
    batches: Batches,
    *,
    micro_batch: int,
    folder: Path | None = None,
) -> CachedBatches:
    """Runs the beginning of `cut` once over all of `batches`, `micro_batch` examples at a time.

    params, sub_model: of the whole model.  With `folder` the activations lie in a file there that
    has no name and goes when nobody holds them; otherwise in memory.  The session of the beginning
    is closed when this returns.

    Raises ValueError as `Engine.open_forward` does.
    """
    check_micro_batch(micro_batch)
    beginning, rest, name = cut
    count = batches.num_examples
    size = min(micro_batch, count)
    features = _array((count, *rest.input_shape), folder)
    session = engine.open_forward(
        beginning, tensors_of(beginning, params), part(sub_model, beginning), batch_size=size
    )
    y = np.empty(count, np.int64)
    steps = -(-count // size)
    places = drawn_positions(count, steps, size, PASS_SEED)
    left = count
    for (x, labels), at in zip(
        batches.draw(steps=steps, batch_size=size, seed=PASS_SEED), places, strict=True
    ):
        new = min(size, left)  # the last batch goes on into another pass
        features[at[:new]] = session.forward(x[:new])[name]
        y[at[:new]] = labels[:new]
        left -= new
    return CachedBatches(features, y)


def _array(shape: tuple[int, ...], folder: Path | None) -> np.ndarray:
    if folder is None:
        return held(shape)
    with tempfile.TemporaryFile(dir=folder) as file:
        return np.memmap(file, np.float32, "w+", shape=shape)
