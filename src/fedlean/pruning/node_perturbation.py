"""Scores for devices that can only run forward: one unit is bumped at a time.

With h_u the pre-activation of an output unit u and a_j an input of its layer,

    ∂f/∂w_uj = a_j · ∂f/∂h_u   and   ∂f/∂h_u ≈ (f(h_u + ε) - f) / ε,

so a forward per unit gives what backpropagation gives, but for kinks within ε and for rounding.
Two scores are made of that:

    `node_gradient`  NTK-SAP's own signed score of `ntk`, which adds up with that of clients that
                     can run backward
    `node_scores`    s_uj = Σ_x a_j(x)² ‖∂f/∂h_u(x)‖² = Σ_x ‖∂f/∂w_uj(x)‖², the weight's share of
                     the trace; half the price, and without the noise of a random direction

Twice a weight's share is one of the two parts of NTK-SAP's expected score.  The other, how the
weight changes the shares of all others, is left out: over the L layers of a bias-free ReLU chain it
adds up to L - 1 times as much (`ntk.layer_sums`), so the two scores rank differently.

OURS: all of it.  In a convolution the whole channel is bumped, and a_j or a_j² is its mean over the
places that the kernel visits: exact where that is the same everywhere, an approximation elsewhere.
Biases are 0 and norms the identity, as in `ntk`.
"""

# B examples, C outputs, O output units of a layer, I inputs per group, G groups, k kernel

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from math import isfinite
from typing import NamedTuple

import numpy as np

from fedlean.core import Masks, Params, SubModel
from fedlean.engine.protocol import Engine
from fedlean.layers import Conv2d, Linear, as_image
from fedlean.pruning.ntk import draw_model
from fedlean.spec import INPUT, ModelSpec, Node


def node_scores(
    engine: Engine,
    spec: ModelSpec,
    masks: Masks,
    inputs: Iterable[np.ndarray],
    seed: int,
    *,
    init: str = "pytorch",
    batch_size: int = 256,
    bump: float = 1e-3,
) -> dict[str, np.ndarray]:
    """s of all prunable weights, float64 and >= 0, 0 where pruned, summed over draws and examples.

    inputs, seed, init, batch_size: as in `ntk.ntk_scores`; a model is drawn for each of `inputs`
    bump: ε, in units of a pre-activation

    Costs, for each draw and example, a forward per output unit of the prunable layers and one per
    layer.  Additive over examples and so over clients.  Raises ValueError.
    """
    total = {name: np.zeros(spec.param_shapes[name]) for name in spec.prunable}
    for draw, x in enumerate(inputs):
        params = draw_model(spec, seed, draw, init)
        bumped = Bumped(engine, spec, masks, params, x, batch_size=batch_size, bump=bump)
        for name, node in _prunable(spec):
            a, slopes = bumped.layer(node)
            steepness = np.stack([np.sum(slope**2, 1) for slope in slopes], 1)  # ‖∂f/∂h_u‖²
            total[name] += _product(steepness, _seen(spec, node, a**2), spec.param_shapes[name])
    return {name: total[name] * masks.get(name, True) for name in total}


def node_gradient(
    engine: Engine,
    spec: ModelSpec,
    masks: Masks,
    x: np.ndarray,
    start: Params,
    moved: Params,
    *,
    batch_size: int = 256,
    bump: float = 1e-3,
) -> tuple[dict[str, np.ndarray], float]:
    """`ntk.difference_gradient` by forward passes alone: the same arguments and results.

    Costs, for each example and each of both models, a forward per output unit of the prunable
    layers and one per layer, and one more.
    """
    scores = {name: np.zeros(spec.param_shapes[name]) for name in spec.prunable}
    sides = [
        Bumped(engine, spec, masks, params, x, batch_size=batch_size, bump=bump)
        for params in (start, moved)
    ]
    r = sides[0].outputs() - sides[1].outputs()
    for side, params, entering in zip(sides, (start, moved), (2 * r, -2 * r), strict=True):
        for name, node in _prunable(spec):
            a, slopes = side.layer(node)
            pulls = np.stack([np.sum(entering * slope, 1) for slope in slopes], 1)
            pulled = _product(pulls, _seen(spec, node, a), spec.param_shapes[name])
            scores[name] += pulled * params[name] * masks.get(name, True)
    return scores, float(np.sum(r**2))


class Layer(NamedTuple):
    """What bumps say of one layer: its inputs a, and ∂f/∂h_u, one output unit after the other."""

    inputs: np.ndarray  # float64 (B, *shape)
    slopes: Iterator[np.ndarray]  # O of them, float64 (B, C); a convolution's summed over places


class Bumped:
    """One model and a batch, of which single units are bumped through their bias.

    A forward pass and a load of the tensors for each bump; only one layer's inputs are held at a
    time, for those of all layers are what backpropagation needs.
    """

    def __init__(
        self,
        engine: Engine,
        spec: ModelSpec,
        masks: Masks,
        params: Params,
        x: np.ndarray,
        *,
        batch_size: int,
        bump: float,
    ):
        """Raises ValueError unless bump, ε, is finite and positive."""
        if not (isfinite(bump) and bump > 0):
            raise ValueError(f"bump must be finite and positive, got {bump!r}")
        biased = with_biases(spec)
        self._params = {
            name: params[name] if name in params else np.zeros(shape, np.float32)
            for name, shape in biased.tensor_shapes.items()
        }
        self._bump, self._output = np.float32(bump), spec.nodes[-1].name
        self._parts = [x[at : at + batch_size] for at in range(0, len(x), batch_size)]
        self._session = engine.open_forward(
            biased,
            self._params,
            SubModel(masks=masks),
            batch_size=max(1, min(batch_size, len(x))),
        )

    def outputs(self) -> np.ndarray:
        """f, float64 (B, C)."""
        return self._run([])[self._output].reshape(self._examples, -1)

    def layer(self, node: Node) -> Layer:
        """The slopes are computed as they are taken, and to be taken before another call."""
        source = node.inputs[0]
        seen = self._run([source] if source != INPUT else [])
        a = np.concatenate(self._parts) if source == INPUT else seen[source]
        f = seen[self._output].reshape(self._examples, -1)
        return Layer(a.astype(np.float64), self._slopes(f"{node.name}.bias", f))

    def _slopes(self, bias: str, f: np.ndarray) -> Iterator[np.ndarray]:
        for unit in range(len(self._params[bias])):
            moved = self._params[bias].copy()
            moved[unit] += self._bump
            step = np.float64(moved[unit]) - self._params[bias][unit]  # as float32 has it
            self._session.load({**self._params, bias: moved})
            yield (self.outputs() - f) / step
        self._session.load(self._params)

    @property
    def _examples(self) -> int:
        return sum(map(len, self._parts))

    def _run(self, taps: Sequence[str]) -> dict[str, np.ndarray]:
        runs = [self._session.forward(part, taps=taps) for part in self._parts]
        return {
            name: np.concatenate([run[name] for run in runs]).astype(np.float64) for name in runs[0]
        }


def with_biases(spec: ModelSpec) -> ModelSpec:
    """The same model, in which every Linear and Conv2d has a bias."""
    nodes = (
        replace(node, layer=replace(node.layer, bias=True))
        if isinstance(node.layer, Linear | Conv2d)
        else node
        for node in spec.nodes
    )
    return replace(spec, nodes=tuple(nodes))


def _prunable(spec: ModelSpec) -> Iterator[tuple[str, Node]]:
    for name in spec.prunable:
        yield name, spec.by_name[name.removesuffix(".weight")]


def _seen(spec: ModelSpec, node: Node, a: np.ndarray) -> np.ndarray:
    """What each weight of an output unit reads, of inputs (B, *shape): (B, G, I, ...).

    A convolution's weight reads many places; their mean, padding included.
    """
    layer = node.layer
    if not isinstance(layer, Conv2d):
        return a[:, None]
    kernel, stride, padding, dilation = layer.window
    _, rows, columns = as_image(spec.shapes[node.name])
    a = a.reshape(len(a), *as_image(a.shape[1:]))
    a = np.pad(a, ((0, 0), (0, 0), *((p, p) for p in padding)))
    seen = np.empty((*a.shape[:2], *kernel))
    for i, j in np.ndindex(kernel):
        y, x = i * dilation[0], j * dilation[1]
        read = a[:, :, y : y + stride[0] * rows, x : x + stride[1] * columns]
        seen[:, :, i, j] = read[:, :, :: stride[0], :: stride[1]].mean((2, 3))
    return seen.reshape(len(a), layer.groups, -1, *kernel)


def _product(units: np.ndarray, seen: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Σ_x units (B, O) · seen (B, G, I, ...), within groups, in the weight's shape."""
    examples, groups = seen.shape[:2]
    units = units.reshape(examples, groups, -1)
    return np.einsum("bgo,bgi->goi", units, seen.reshape(examples, groups, -1)).reshape(shape)
