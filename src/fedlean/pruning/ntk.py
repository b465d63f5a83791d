"""NTK-SAP: which weights hold up the trace of the neural tangent kernel, before training.

Wang, Li and Sun, "NTK-SAP: improving neural network pruning by aligning training dynamics", ICLR
2023.  The trace is estimated by one random direction,

    ‖Θ‖_tr = ‖∇_θ f(X; θ)‖_F² ≈ ‖f(X; θ) - f(X; θ + Δθ)‖² / ε²,   Δθ ~ N(0, ε² I),

and a weight's score is how much that depends on the weight being there, with all m_j = 1,

    s_j = ∂/∂m_j ‖f(X; θ ⊙ m) - f(X; (θ + Δθ) ⊙ m)‖² / ε²,

of which the paper takes the absolute value.  θ is drawn anew for each mini-batch.  The squared norm
is a sum over examples, and so are the scores: those of several clients, taken with the same seed,
add up to the score of their pooled examples.  Hence they stay signed until all are summed.

OURS: θ and Δθ are those of the prunable weights; biases are 0 and norms are the identity (a
BatchNorm by its initial statistics, so that no example depends on another), and neither moves.  The
factor 1/ε², which changes no order.
"""

# r = f(X; θ ⊙ m) - f(X; (θ + Δθ) ⊙ m), (examples, *output)

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import isfinite

import numpy as np

from fedlean.core import Masks, Params, SubModel, derive_seed, generator
from fedlean.engine.protocol import SGD, Engine, Session
from fedlean.models.initialise import init_params
from fedlean.spec import ModelSpec

Difference = Callable[..., tuple[dict[str, np.ndarray], float]]  # as `difference_gradient`


@dataclass(frozen=True)
class NtkScores:
    """Sums over draws and examples; the sums of disjoint examples add up to those of all."""

    scores: dict[str, np.ndarray]  # signed s_j of the prunable weights, float64; 0 where pruned
    trace: float  # ‖r‖² / ε²
    examples: int  # examples times draws

    def mean(self) -> dict[str, np.ndarray]:
        """s_j per example, float32: what a client sends, to be weighted by its examples."""
        return {name: (s / self.examples).astype(np.float32) for name, s in self.scores.items()}


def ntk_scores(
    engine: Engine,
    spec: ModelSpec,
    masks: Masks,
    inputs: Iterable[np.ndarray],
    seed: int,
    *,
    epsilon: float = 0.01,
    init: str = "pytorch",
    batch_size: int = 256,
    difference: Difference | None = None,
) -> NtkScores:
    """The scores of one draw of θ and Δθ for each of `inputs`, summed.

    masks: of prunable weights; a tensor without one is dense
    inputs: at least one x float32 (examples, *input_shape), e.g. `gaussian_inputs`
    seed: of θ and Δθ; clients whose scores are to add up share it, and the number of inputs
    init: the scheme of `init_params`; batch_size: examples per pass, changes memory only
    difference: what computes a draw; None: `difference_gradient`, by backpropagation

    With that, three forward and two backward passes per example.  Raises ValueError.
    """
    if not (isfinite(epsilon) and epsilon > 0):
        raise ValueError(f"epsilon must be finite and positive, got {epsilon!r}")
    total = {name: np.zeros(spec.param_shapes[name]) for name in spec.prunable}
    squares, examples = 0.0, 0
    for draw, x in enumerate(inputs):
        start, moved = draw_weights(spec, seed, draw, epsilon, init)
        scores, square = (difference or difference_gradient)(
            engine, spec, masks, x, start, moved, batch_size=batch_size
        )
        for name, values in scores.items():
            total[name] += values
        squares += square
        examples += len(x)
    if not examples:
        raise ValueError("inputs holds no examples, expected at least one batch")
    for values in total.values():
        values /= epsilon**2
    return NtkScores(total, squares / epsilon**2, examples)


def gaussian_inputs(spec: ModelSpec, examples: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """`draws` times X ~ N(0, I), float32 (examples, *input_shape): no data needed."""
    for draw in range(draws):
        rng = generator(seed, 0, draw, "ntk/inputs")
        yield rng.standard_normal((examples, *spec.input_shape), dtype=np.float32)


def draw_weights(
    spec: ModelSpec, seed: int, draw: int, epsilon: float, init: str = "pytorch"
) -> tuple[Params, Params]:
    """θ and θ + Δθ, all tensors of `spec`, dense.  They do not depend on any mask."""
    start = draw_model(spec, seed, draw, init)
    moved = dict(start)
    for name in spec.prunable:
        rng = generator(seed, 0, draw, f"ntk/direction/{name}")
        step = rng.standard_normal(spec.param_shapes[name], dtype=np.float32)
        step *= np.float32(epsilon)
        step += start[name]
        moved[name] = step
    return start, moved


def draw_model(spec: ModelSpec, seed: int, draw: int, init: str = "pytorch") -> Params:
    """θ alone."""
    start = dict(init_params(spec, derive_seed(seed, 0, draw, "ntk/weights"), init))
    for node in spec.weighted:
        if f"{node.name}.bias" in start:
            start[f"{node.name}.bias"] = np.zeros_like(start[f"{node.name}.bias"])
    return start


def difference_gradient(
    engine: Engine,
    spec: ModelSpec,
    masks: Masks,
    x: np.ndarray,
    start: Params,
    moved: Params,
    *,
    batch_size: int = 256,
) -> tuple[dict[str, np.ndarray], float]:
    """∂‖r‖²/∂m_j of the prunable weights, float64, 0 where pruned, and ‖r‖², for θ and θ + Δθ.

    By the product rule 2r·∂f/∂w_j at θ times θ_j, less the same at θ + Δθ: two vector-Jacobian
    products.  One session computes both, so that a device holds one model.
    """
    output = spec.nodes[-1].name
    frozen = frozenset(spec.tensor_shapes.keys() - set(spec.prunable))
    session = engine.open(
        spec,
        moved,
        SubModel(masks=masks, frozen=frozen),
        batch_size=max(1, min(batch_size, len(x))),
        optimizer=SGD(0.0),
    )
    parts = [x[at : at + batch_size] for at in range(0, len(x), batch_size)]
    # all of f(θ + Δθ) first: one load of each model, and outputs are small
    r = [-session.forward(part, training=True)[output] for part in parts]
    scores = {name: np.zeros(spec.param_shapes[name]) for name in spec.prunable}
    session.load(start)
    for part, difference in zip(parts, r, strict=True):
        difference += session.forward(part, training=True)[output]
        _add_pull(scores, session, {output: 2 * difference}, start)
    session.load(moved)
    for part, difference in zip(parts, r, strict=True):
        session.forward(part, training=True)
        _add_pull(scores, session, {output: -2 * difference}, moved)
    return scores, sum(float(np.sum(np.square(part, dtype=np.float64))) for part in r)


def _add_pull(
    scores: Mapping[str, np.ndarray],
    session: Session,
    entering: Mapping[str, np.ndarray],
    weights: Params,
) -> None:
    """scores += (entering · ∂f/∂w_j) · w_j, in place; the engine gives 0 where pruned."""
    gradients = session.backward(entering)
    for name, values in scores.items():
        values += np.multiply(gradients[name], weights[name], dtype=np.float64)


def layer_sums(scores: Params) -> dict[str, float]:
    """Σ_{j in layer} m_j s_j by tensor, with the signs.

    OURS: in a bias-free ReLU network without residuals f is homogeneous of degree 1 in each layer's
    weights, hence ‖r‖² of degree 2 in its m, and by Euler each layer's sum is twice the trace
    estimate, for every draw and every ε.  Pools and Flatten change nothing in that.

    >>> layer_sums({"fc.weight": np.array([[1.0, -3.0]])})
    {'fc.weight': -2.0}
    """
    return {name: float(np.sum(values, dtype=np.float64)) for name, values in scores.items()}
