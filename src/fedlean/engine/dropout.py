"""What a pass of training drops, the same on every engine and machine.

Nobody stores or sends it: it is drawn again from a counter-based generator (Philox4x64-10, see
`engine.directions`) whose key follows from the session's seed, how many passes of training it has
made, and the layer's name.  An element is kept where its number of 16 bits is not below p·65536, so
p is taken to the nearest 65,536th.
"""

from __future__ import annotations

from math import prod

import numpy as np

from fedlean.core import derive_seed
from fedlean.layers import Dropout
from fedlean.spec import ModelSpec, Node

_BLOCK = 16  # numbers of 16 bits in one block of Philox; each example starts with one


def dropouts(spec: ModelSpec) -> tuple[Node, ...]:
    """The layers that draw random numbers, in their order."""
    return tuple(node for node in spec.nodes if isinstance(node.layer, Dropout))


def dropout_key(seed: int, passes: int, name: str) -> int:
    """Of the layer `name` in the session's pass of training number `passes` (0: the first)."""
    return derive_seed(seed, 0, passes, f"dropout/{name}")


def factors(layer: Dropout, key: int, shape: tuple[int, ...]) -> np.ndarray:
    """float32, 0 where an element of a batch (B, C, ...) is dropped, 1/(1-p) where it is kept.

    Of the shape, or (B, C, 1, ...) where whole channels are dropped.
    """
    shape = (*shape[:2], *[1] * (len(shape) - 2)) if layer.channels else shape
    size = prod(shape[1:])
    blocks = -(-size // _BLOCK)
    words = np.random.Philox(key=key).random_raw(shape[0] * blocks * 4)
    numbers = words.astype("<u8").view("<u2").reshape(shape[0], -1)[:, :size]
    below = min(65535, int(layer.p * 65536 + 0.5))
    scale = np.float32(1 / (1 - below / 65536))
    return np.where(numbers >= below, scale, np.float32(0)).reshape(shape)
