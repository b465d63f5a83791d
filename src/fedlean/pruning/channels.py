"""Which weights make and read the same channel, and what is left when channels go.

A channel is a feature map of an image or a unit of a vector.  Norms, activations and pooling hand
channels on, Flatten spreads each over its pixels, and a depthwise convolution keeps them; Add and
Scale tie channels of several layers into one, which lives while any of them needs it: the "channel
union" of PruneTrain (Lym et al., SC 2019, arXiv 1901.09290).
"""

# O output channels, I input channels (of a group), C channels of the model

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from fedlean.core import Masks, Params
from fedlean.layers import Add, Concat, Conv2d, Flatten, Linear, Scale
from fedlean.spec import INPUT, ModelSpec, Node
from fedlean.tree import read_only


@dataclass(frozen=True)
class Channels:
    """Channels of a model by number, 0 to C - 1."""

    fixed: np.ndarray  # bool (C,), True = an input or output of the model, which always lives
    rows: Mapping[str, np.ndarray]  # weight (O, I, ...) -> the channel that each row makes, (O,)
    columns: Mapping[str, np.ndarray]  # weight -> what each column reads, (groups, I)


def channels(spec: ModelSpec) -> Channels:
    """The channels of `spec`, over all its Linear and Conv2d weights.

    >>> from fedlean.models.lenet300 import lenet300
    >>> found = channels(lenet300((1, 8, 8), 10))
    >>> found.fixed.sum(), found.rows["fc1.weight"].size  # 1 image in, 10 classes out
    (np.int64(11), 300)
    >>> np.array_equal(found.columns["fc2.weight"], found.rows["fc1.weight"][None])
    True
    """
    numbers = _Numbers()
    made = {INPUT: numbers.fresh(spec.input_shape[0])}
    for node in spec.nodes:
        made[node.name] = _made(spec, node, made, numbers)
    merged = numbers.merged()
    fixed = np.zeros(len(merged), bool)
    fixed[merged[made[INPUT]]] = fixed[merged[made[spec.nodes[-1].name]]] = True
    rows, columns = {}, {}
    for node in spec.weighted:
        (source,) = node.inputs
        rows[f"{node.name}.weight"] = merged[made[node.name]]
        columns[f"{node.name}.weight"] = merged[made[source]].reshape(_groups(node), -1)
    return Channels(fixed, rows, columns)


class _Numbers:
    """Hands out numbers of channels, and remembers which of them are one."""

    def __init__(self) -> None:
        self._joined: list[int] = []  # an earlier number of the same channel, or itself

    def fresh(self, count: int) -> np.ndarray:
        start = len(self._joined)
        self._joined += range(start, start + count)
        return np.arange(start, start + count)

    def join(self, left: np.ndarray, right: np.ndarray) -> None:
        for a, b in zip(left.tolist(), right.tolist(), strict=True):
            first, second = sorted((self._first(a), self._first(b)))
            self._joined[second] = first

    def merged(self) -> np.ndarray:
        """For each number handed out, the first number of its channel."""
        return np.array([self._first(number) for number in range(len(self._joined))])

    def _first(self, number: int) -> int:
        while self._joined[number] != number:
            number = self._joined[number]
        return number


def _made(
    spec: ModelSpec, node: Node, made: Mapping[str, np.ndarray], numbers: _Numbers
) -> np.ndarray:
    """Channels of the node's output: one for each entry of its first axis."""
    sources = [made[source] for source in node.inputs]
    match node.layer:
        case Conv2d(groups=groups, out_channels=out) if groups == out == sources[0].size:
            return sources[0]  # depthwise
        case Linear() | Conv2d():
            return numbers.fresh(spec.shapes[node.name][0])
        case Flatten():
            return np.repeat(sources[0], prod(spec.input_shapes(node)[0][1:]))
        case Concat():
            return np.concatenate(sources)
        case Add() | Scale():
            for other in sources[1:]:
                numbers.join(sources[0], other)
    return sources[0]


def _groups(node: Node) -> int:
    return node.layer.groups if isinstance(node.layer, Conv2d) else 1


def living(found: Channels, params: Params, threshold: float) -> np.ndarray:
    """bool (C,): channels that some weight makes or reads with |w| > threshold, and fixed ones."""
    alive = found.fixed.copy()
    for name, rows in found.rows.items():
        columns = found.columns[name]
        large = np.abs(params[name]) > threshold
        used = large.any(axis=tuple(range(2, large.ndim))).reshape(
            len(columns), -1, columns.shape[1]
        )
        alive[rows[used.any(axis=2).ravel()]] = True
        alive[columns[used.any(axis=1)]] = True
    return alive


def channel_masks(found: Channels, alive: np.ndarray, spec: ModelSpec) -> Masks:
    """Masks of the prunable weights of `spec`: a weight stays if both its channels live."""
    masks = {}
    for name in spec.prunable:
        columns, shape = found.columns[name], spec.param_shapes[name]
        made = alive[found.rows[name]].reshape(len(columns), -1, 1)
        both = (made & alive[columns][:, None]).reshape(shape[:2])
        masks[name] = np.broadcast_to(
            both.reshape(*shape[:2], *[1] * (len(shape) - 2)), shape
        ).copy()
    return read_only(masks)
