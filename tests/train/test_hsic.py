"""Normalised HSIC against its formulas, its gradient against differences."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from fedlean.train.hsic import COLUMNS, held_floats, nhsic

BOTH = pytest.mark.parametrize("estimator", ["unbiased", "biased"])


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def kernel(z: np.ndarray, sigma: float) -> np.ndarray:
    """Entry by entry."""
    flat = z.reshape(len(z), -1)
    k = np.zeros((len(z), len(z)))
    for i, one in enumerate(flat):
        for j, other in enumerate(flat):
            distance = sum((a - b) ** 2 for a, b in zip(one, other, strict=True))
            k[i, j] = np.exp(-distance / (2 * sigma**2 * flat.shape[1]))
    return k


def unbiased(k: np.ndarray, other: np.ndarray) -> float:
    """Song et al. 2012, HSIC_1, as sums over indices."""
    m = len(k)
    everyone = range(m)
    trace = sum(k[i, j] * other[j, i] for i in everyone for j in everyone if i != j)
    ours = sum(k[i, j] for i in everyone for j in everyone if i != j)
    theirs = sum(other[i, j] for i in everyone for j in everyone if i != j)
    chain = sum(
        k[i, q] * other[q, j]
        for i in everyone
        for q in everyone
        for j in everyone
        if i != q and q != j
    )
    inside = trace + ours * theirs / ((m - 1) * (m - 2)) - 2 / (m - 2) * chain
    return inside / (m * (m - 3))


def biased(k: np.ndarray, other: np.ndarray) -> float:
    """tr(K H L H) / m², as NeuLite's release has it: the mean of KH ∘ (LH)'."""
    h = np.eye(len(k)) - 1 / len(k)
    return float(np.mean((k @ h) * (other @ h).T))


@BOTH
@pytest.mark.parametrize("sigma", [5.0, 0.7])
@pytest.mark.parametrize("m", [4, 5, 9])
def test_the_value_is_that_of_the_formula(estimator, sigma, m):
    z, other = drawn(m, 2, 3), drawn(m, 4, seed=1)
    hsic = {"unbiased": unbiased, "biased": biased}[estimator]
    k, over = kernel(z, sigma), kernel(other, sigma)
    expected = hsic(k, over) / np.sqrt(hsic(k, k) * hsic(over, over))
    value, _ = nhsic(z, other, sigma=sigma, estimator=estimator)
    assert value == pytest.approx(expected, rel=1e-8, abs=1e-10)


@BOTH
def test_of_a_representation_with_itself_it_is_one(estimator):
    z = drawn(12, 7)
    assert nhsic(z, z, estimator=estimator)[0] == pytest.approx(1.0, abs=1e-12)
    assert nhsic(z, z + 100, estimator=estimator)[0] == pytest.approx(1.0, abs=1e-9)


def test_without_bias_independent_noise_has_none_on_average():
    """400 batches of 16: within four standard errors of 0; that error is below 0.02."""
    values = [nhsic(drawn(16, 5, seed=s), drawn(16, 3, seed=s + 10_000))[0] for s in range(400)]
    error = np.std(values) / np.sqrt(len(values))
    assert error < 0.02
    assert abs(np.mean(values)) < 4 * error


def test_as_released_independent_noise_looks_dependent():
    """64 examples of 3072 features: a distance says nothing, and the diagonal is all there is."""
    z, other = drawn(64, 3072), drawn(64, 3072, seed=1)
    assert nhsic(z, other, estimator="biased")[0] > 0.97
    assert abs(nhsic(z, other)[0]) < 0.1


@BOTH
@pytest.mark.parametrize("shape", [(6, 5), (5, 2, 3, 3), (4, COLUMNS + 3)])
def test_the_gradient_is_that_of_differences(estimator, shape):
    """In float64, at random places; the last shape goes through two pieces of columns."""
    z, other = drawn(*shape), drawn(shape[0], 3, seed=1)
    _, gradient = nhsic(z, other, sigma=1.0, estimator=estimator)
    assert gradient.shape == z.shape and gradient.dtype == z.dtype
    rng, step = np.random.default_rng(2), 1e-5
    scale = abs(gradient).max()
    places = [tuple(rng.integers(0, n) for n in shape) for _ in range(12)]
    places.append(tuple(n - 1 for n in shape))
    for at in places:
        moved = []
        for sign in (1, -1):
            there = z.copy()
            there[at] += sign * step
            moved.append(nhsic(there, other, sigma=1.0, estimator=estimator)[0])
        slope = (moved[0] - moved[1]) / (2 * step)
        assert gradient[at] == pytest.approx(slope, rel=1e-5, abs=1e-5 * scale)


def test_a_step_along_the_gradient_makes_it_larger():
    z, other = drawn(10, 6), np.eye(3)[np.arange(10) % 3]
    value, gradient = nhsic(z, other)
    assert nhsic(z + 0.1 * gradient / abs(gradient).max(), other)[0] > value


@BOTH
def test_float32_is_computed_in_float64(estimator):
    z, other = drawn(8, 3000).astype(np.float32), drawn(8, 4, seed=1).astype(np.float32)
    value, gradient = nhsic(z, other, estimator=estimator)
    exact, slopes = nhsic(z.astype(np.float64), other.astype(np.float64), estimator=estimator)
    assert value == exact and gradient.dtype == np.float32
    np.testing.assert_array_equal(gradient, slopes.astype(np.float32))


@BOTH
@pytest.mark.parametrize("said", ["labels", "z"])
def test_who_says_nothing_depends_on_nothing(estimator, said):
    """Labels of one class, or a representation that has died: 0, and no gradient."""
    one_class, z = np.eye(10)[np.full(6, 3)], drawn(6, 4)
    pair = (z, one_class) if said == "labels" else (one_class, z)
    value, gradient = nhsic(*pair, estimator=estimator)
    assert value == 0.0 and gradient.shape == pair[0].shape and not gradient.any()


def test_labels_that_are_all_different_say_nothing_without_bias():
    """Every pair is as far apart: the kernel is constant off the diagonal."""
    value, gradient = nhsic(drawn(6, 4), np.eye(6))
    assert value == 0.0 and not gradient.any()


def test_what_is_no_number_stays_none():
    z = drawn(5, 3)
    z[2, 1] = np.nan
    assert np.isnan(nhsic(z, drawn(5, 2))[0])


@pytest.mark.parametrize(
    ("lengths", "estimator", "said"),
    [
        ((3, 3), "unbiased", "nHSIC needs 4 examples or more, got 3: take a larger batch_size"),
        ((3, 3), "biased", "nHSIC needs 4 examples"),
        ((5, 4), "unbiased", "5 examples cannot be held against 4"),
        ((5, 5), "median", "the estimator must be unbiased or biased, got 'median'"),
    ],
)
def test_what_is_refused(lengths, estimator, said):
    with pytest.raises(ValueError, match=said):
        nhsic(drawn(lengths[0], 2), drawn(lengths[1], 2), estimator=estimator)


@pytest.mark.parametrize(
    ("m", "d", "other"),
    [(20, 300, 10), (32, 16384, 10), (64, 100, 10), (32, 84, 3072), (20, 16384, 784)],
)
def test_what_is_held_beside_the_arguments(m, d, other):
    z, read = drawn(m, d).astype(np.float32), drawn(m, other).astype(np.float32)
    nhsic(z, read)
    tracemalloc.start()
    nhsic(z, read)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak <= 4 * held_floats(m, d, other) <= 1.6 * peak
