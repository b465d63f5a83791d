"""Slopes by forward passes: by hand, in parts, and how far the estimate is from the gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from federation import ENGINE, SPEC, client_data, params

from fedlean.core import Params, SubModel
from fedlean.engine.directions import Kind, direction
from fedlean.engine.protocol import SGD
from fedlean.models.initialise import init_params
from fedlean.models.mlp import mlp
from fedlean.train.forward_updates import Space, combine, estimate, round_seed
from fedlean.train.zeroth_order import Probe, directional_derivatives


class Quadratic:
    """A forward session of L(w) = ½ Σ_x (x·w)² / B + y·w, of n parameters and examples (B, n)."""

    def __init__(self, w: np.ndarray):
        self.w, self.calls, self.peak_memory_bytes = w.astype(np.float64), 0, 0

    def loss(self, x: np.ndarray, y: np.ndarray) -> float:
        return self._at(self.w, x, y)

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
        shape = self.w.shape
        return np.array(
            [
                self._at(self.w + sigma * direction(seed, k, "w", shape, None, kind), x, y)
                for k in ks
            ]
        )

    def forward(self, x: np.ndarray, *, taps: Sequence[str] = ()) -> Mapping[str, np.ndarray]:
        raise NotImplementedError

    def load(self, params: Params) -> None:
        raise NotImplementedError

    def params(self, *, packed: bool = False) -> Params:
        raise NotImplementedError

    def _at(self, w: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
        self.calls += 1
        return float(np.mean(0.5 * (x @ w) ** 2 + y * w.sum()))


X = np.array([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0], [2.0, 0.0, 1.0]])
Y = np.array([1.0, 0.0, -4.0])
W = np.array([0.5, -1.0, 0.25])


def gradient() -> np.ndarray:
    """Mean of (x·w)·x + y."""
    return np.mean((X @ W)[:, None] * X + Y[:, None], 0)


@pytest.mark.parametrize("kind", ["gaussian", "sign", "rank1"])
def test_central_slopes_are_exact_on_a_quadratic(kind):
    probe = Probe(directions=4, sigma=0.1, kind=kind, differences="central")
    slopes = directional_derivatives(Quadratic(W), X, Y, probe, seed=3, at_once=3)

    z = np.array([direction(3, k, "w", (3,), None, kind) for k in range(4)])
    np.testing.assert_allclose(slopes, z @ gradient(), rtol=1e-6)


def test_forward_slopes_by_hand():
    """(L(w + σz) - L(w)) / σ = g·z + σ/2 · mean (x·z)²."""
    probe = Probe(directions=2, sigma=0.1)
    slopes = directional_derivatives(Quadratic(W), X, Y, probe, seed=3, at_once=3)

    z = np.array([direction(3, k, "w", (3,), None, "gaussian") for k in range(2)])
    expected = z @ gradient() + 0.05 * np.mean((X @ z.T) ** 2, 0)
    np.testing.assert_allclose(slopes, expected, rtol=1e-6)


@pytest.mark.parametrize(("differences", "evaluations"), [("forward", 6), ("central", 10)])
def test_evaluations_are_those_charged(differences, evaluations):
    session, probe = Quadratic(W), Probe(5, 0.1, differences=differences)
    directional_derivatives(session, X, Y, probe, seed=0, at_once=3)

    assert session.calls == probe.evaluations == evaluations


@pytest.mark.parametrize("differences", ["forward", "central"])
@pytest.mark.parametrize("at_once", [1, 5, 8])
def test_parts_of_a_batch_give_the_slopes_of_the_batch(differences, at_once):
    """On a real network: 20 examples in parts of 1, 5 and 8 (the last of 4)."""
    ((x, y),) = client_data()[1].draw(steps=1, batch_size=20, seed=3)
    probe = Probe(5, 0.05, differences=differences)

    whole, parts = (
        directional_derivatives(
            ENGINE.open_forward(SPEC, params(), SubModel(), batch_size=size),
            x,
            y,
            probe,
            seed=9,
            at_once=size,
        )
        for size in (20, at_once)
    )
    # losses are float32 inside the engine: 1e-7 of them over σ
    np.testing.assert_allclose(parts, whole, rtol=0, atol=2e-5)


def test_slopes_are_the_gradient_along_the_directions():
    """Against backpropagation, with masks; pruned coordinates have no direction."""
    rng = np.random.default_rng(0)
    spec = mlp((1, 4, 4), 3)  # smooth: kinks would show in the differences
    x, y = rng.standard_normal((20, 1, 4, 4), np.float32), rng.integers(0, 3, 20)
    masks = {name: rng.random(spec.param_shapes[name]) < 0.5 for name in spec.prunable}
    sub_model, start = SubModel(masks=masks), init_params(spec, 0)
    session = ENGINE.open(spec, start, sub_model, batch_size=20, optimizer=SGD(1.0))
    before = session.params()
    session.step(x, y)
    exact = {name: before[name] - value for name, value in session.params().items()}

    probe = Probe(4, 1e-3, differences="central")
    forward = ENGINE.open_forward(spec, start, sub_model, batch_size=20)
    slopes = directional_derivatives(forward, x, y, probe, seed=2, at_once=20)

    along = np.zeros(4)
    for k in range(4):
        for name, shape in spec.param_shapes.items():
            mask = masks.get(name)
            z = direction(2, k, name, shape, mask, "gaussian")
            along[k] += float(exact[name][mask if mask is not None else ...].ravel() @ z)
    np.testing.assert_allclose(slopes, along, rtol=0, atol=1e-3)
    assert abs(along).max() > 0.1


# --- how far ĝ is from g: E‖ĝ - g‖² / ‖g‖² with c_k = g·z_k, as on a quadratic with central slopes


def relative_error(n: int, directions: int, kind: Kind, seed: int) -> float:
    g = np.random.default_rng(seed).standard_normal(n)
    space = Space({"w": (n,)}, {}, kind)
    c = [g @ direction(seed, k, "w", (n,), None, kind) for k in range(directions)]
    found = estimate(seed, np.array(c), space)["w"]
    return float(np.sum((found - g) ** 2) / np.sum(g**2))


@pytest.mark.parametrize(("kind", "excess"), [("gaussian", 1), ("sign", -1)])
@pytest.mark.parametrize(("n", "directions"), [(6, 1), (20, 5), (30, 30)])
def test_error_is_n_plus_or_minus_one_over_k(kind, excess, n, directions):
    errors = [relative_error(n, directions, kind, seed) for seed in range(800)]

    mean, standard_error = np.mean(errors), np.std(errors) / len(errors) ** 0.5
    assert abs(mean - (n + excess) / directions) <= 4 * standard_error
    assert standard_error < 0.15 * n / directions  # else the line above would say little


def test_orthogonal_directions_have_no_error():
    """K = n orthogonal directions of length √n: the estimate is the gradient."""
    n = 8
    hadamard = np.array([[1.0]])
    while len(hadamard) < n:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    z = hadamard.astype(np.float32)
    g = np.arange(1.0, n + 1)

    found = combine(z @ g, ["w"], lambda k, name: z[k])["w"]

    np.testing.assert_allclose(found, g, rtol=1e-6)


def test_rank_one_estimates_the_gradient_too():
    """Unbiased, with a larger error: over many directions it comes near."""
    g = np.random.default_rng(0).standard_normal((3, 4))
    space = Space({"w": (3, 4)}, {}, "rank1")
    c = [g.ravel() @ direction(1, k, "w", (3, 4), None, "rank1") for k in range(20000)]

    found = estimate(1, np.array(c), space)["w"]

    assert np.sum((found - g) ** 2) / np.sum(g**2) < 0.01


def test_no_two_rounds_clients_or_directions_share_a_stream():
    """Rounds x clients (0: shared), and within them directions x tensors."""
    seeds = {round_seed(5, round, client) for round in range(1000) for client in range(12)}
    assert len(seeds) == 12000

    drawn = {
        direction(round_seed(5, round), k, name, (2, 8), None, "gaussian").tobytes()
        for round in range(20)
        for k in range(50)
        for name in ("fc1.weight", "fc2.weight", "fc2.bias")
    }
    assert len(drawn) == 20 * 50 * 3
