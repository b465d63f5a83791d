"""How much two representations of a batch depend on each other: normalised HSIC and its gradient.

The Hilbert-Schmidt independence criterion (Gretton et al., ALT 2005) of Gaussian kernel matrices,

    K_ij = exp(-|z_i - z_j|² / (2σ²d)),

d being the number of features.  With Ã a kernel matrix of zero diagonal, the unbiased estimate is
(Song et al., JMLR 2012, HSIC_1)

    HSIC(K, L) = [tr(K̃L̃) + 1'K̃1 · 1'L̃1 / ((m-1)(m-2)) - 2 · 1'K̃L̃1 / (m-2)] / (m(m-3))

and the biased one tr(KHLH)/m² with H = I - 11'/m.  Either is, up to a factor that a ratio loses,
the inner product of two *centred* matrices: U-centred (Székely and Rizzo, Ann. Statist. 2014) or
HKH.  So nHSIC = HSIC(K, L) / √(HSIC(K, K) HSIC(L, L)) is a cosine: from -1 to 1, and 1 at K = L.
Both centrings are orthogonal projections, through which the gradient passes unchanged.
"""

# m examples of a batch, d features

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np

Estimator = Literal["unbiased", "biased"]
LEAST = 4  # examples of an unbiased estimate: it divides by m - 3
COLUMNS = 1024  # features that are in float64 at once
# Of the size of a matrix, what its centred part must exceed: less is rounding of a constant one.
ROUNDING = 1e-9


def nhsic(
    z: np.ndarray, other: np.ndarray, *, sigma: float = 5.0, estimator: Estimator = "unbiased"
) -> tuple[float, np.ndarray]:
    """nHSIC of z (m, ...) and `other` (m, ...), and its gradient at z, of the shape and type of z.

    Distances are float64 sums, however z is stored.  Where one of the two says nothing about which
    example it is of - its kernel matrix is constant off the diagonal, as that of labels of one
    class is - the value is 0, and the gradient too.

    Raises ValueError for fewer than 4 examples, for arrays of unlike lengths and where there is no
    such estimator.

    >>> z = np.array([[0.0], [1.0], [3.0], [7.0], [8.0]])
    >>> round(nhsic(z, 2 * z + 1, sigma=1.0)[0], 2), round(nhsic(z, z, sigma=1.0)[0], 6)
    (0.99, 1.0)
    """
    if estimator not in ("unbiased", "biased"):
        raise ValueError(f"the estimator must be unbiased or biased, got {estimator!r:.40}")
    if len(z) != len(other):
        raise ValueError(f"{len(z)} examples cannot be held against {len(other)}: give one batch")
    if len(z) < LEAST:
        raise ValueError(
            f"nHSIC needs {LEAST} examples or more, got {len(z)}: take a larger batch_size"
        )
    with np.errstate(invalid="ignore", over="ignore"):  # a diverged model has no finite value
        ours, theirs = _off_one(z, sigma), _off_one(other, sigma)
        a, b = _centred(ours, estimator), _centred(theirs, estimator)
        size_a, size_b = np.linalg.norm(a), np.linalg.norm(b)
        if size_a <= ROUNDING * np.linalg.norm(ours) or size_b <= ROUNDING * np.linalg.norm(theirs):
            return 0.0, np.zeros_like(z)
        value = float((a * b).sum() / (size_a * size_b))
        at_kernel = (b / size_b - value * a / size_a) / size_a
        return value, _at_features(z, at_kernel * (ours + 1), sigma)


def held_floats(examples: int, features: int, other: int) -> int:
    """float32s that `nhsic` holds beside its arguments: the gradient, matrices, some columns.

    features, other: of an example in z and in `other`.
    """
    columns = examples * max(10 * min(features, COLUMNS), 5 * min(other, COLUMNS))
    return examples * features + columns + 10 * 2 * examples**2


def _off_one(z: np.ndarray, sigma: float) -> np.ndarray:
    """K - 11', (m, m): its diagonal is 0, and no digits are lost where K is nearly constant.

    Both centrings take a constant away, so it stands for K.
    """
    flat = z.reshape(len(z), -1)
    products = np.zeros((len(z), len(z)))
    for part in _columns(flat):
        part -= part.mean(0)  # distances stay, and their digits
        products += np.einsum("if,jf->ij", part, part)
    squares = products.diagonal()
    distances = np.maximum(squares[:, None] + squares - 2 * products, 0)
    np.fill_diagonal(distances, 0)
    return np.expm1(-distances / (2 * sigma**2 * flat.shape[1]))


def _at_features(z: np.ndarray, weights: np.ndarray, sigma: float) -> np.ndarray:
    """Σ_ij weights_ij · d(-|z_i - z_j|² / (2σ²d))/dz, for symmetric weights (m, m)."""
    flat = z.reshape(len(z), -1)
    out = np.empty_like(flat)
    factor = 2 / (sigma**2 * flat.shape[1])
    sums = weights.sum(1, keepdims=True)
    for at, part in zip(range(0, flat.shape[1], COLUMNS), _columns(flat), strict=True):
        slopes = np.einsum("ij,jf->if", weights, part)
        slopes -= sums * part
        slopes *= factor
        out[:, at : at + COLUMNS] = slopes
    return out.reshape(z.shape)


def _columns(flat: np.ndarray) -> Iterator[np.ndarray]:
    """Some features at a time, float64 copies: a device has no memory for all of them.

    Products of these are `einsum`'s own, since NumPy's BLAS would reserve 40 MB.
    """
    for at in range(0, flat.shape[1], COLUMNS):
        yield flat[:, at : at + COLUMNS].astype(np.float64)


def _centred(k: np.ndarray, estimator: Estimator) -> np.ndarray:
    """(m, m) without what rows, columns and all have in common."""
    m = len(k)
    rows = k.sum(1)
    if estimator == "biased":
        return k - (rows[:, None] + rows) / m + rows.sum() / m**2
    centred = k - (rows[:, None] + rows) / (m - 2) + rows.sum() / ((m - 1) * (m - 2))
    np.fill_diagonal(centred, 0)
    return centred
