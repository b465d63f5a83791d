"""A deterministic sample that keeps the class proportions.  Used for held-out sets, not clients."""

from __future__ import annotations

import numpy as np

from fedlean.core import generator


def stratified_sample(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Sorted int64 indices of `count` examples whose classes are in the proportions of `labels`.

    labels: integers (n,).  Each class gets the floor of its quota, and what is left goes to the
    largest remainders (ties: the smaller label).  Raises ValueError unless 1 <= count <= n.

    >>> stratified_sample(np.array([0] * 8 + [1] * 4), 3, seed=0).tolist()
    [4, 7, 10]
    """
    if not 1 <= count <= len(labels):
        raise ValueError(f"got a sample of {count} examples, expected 1..{len(labels)}")
    rng = generator(seed, 0, 0, "stratify")
    values, sizes = np.unique(labels, return_counts=True)
    # Whole numbers throughout: quotas in floating point could tie differently elsewhere.
    taken, remainders = np.divmod(sizes * count, len(labels))
    left = count - int(taken.sum())
    taken[np.argsort(-remainders, kind="stable")[:left]] += 1
    chosen = [
        rng.permutation(np.flatnonzero(labels == value))[:take]
        for value, take in zip(values, taken, strict=True)
    ]
    return np.sort(np.concatenate(chosen))
