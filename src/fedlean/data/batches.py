"""A client's share of the training set as `fedlean.core.Batches`, and batches of the test set."""

# B batch, C channels, H height, W width, n examples of the client

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fedlean.data.dataset import Dataset
from fedlean.data.stratify import stratified_sample

SUBSET_SEED = 0  # see ClientData.draw
OWN_INPUTS, OWN_BATCH = 500, 100  # see own_inputs
Batch = tuple[np.ndarray, np.ndarray]  # x float32 (B, C, H, W) normalised, y int64 (B,)


class ClientData:
    """The training examples `indices` of a data set, as one client holds them.

    indices: integers (n,), n >= 1, as `partition` gives them; the images are not copied.
    Raises ValueError when they are empty or lie outside the training set.
    """

    def __init__(self, dataset: Dataset, indices: np.ndarray) -> None:
        total = len(dataset.y_train)
        if indices.ndim != 1 or indices.dtype.kind not in "iu" or not len(indices):
            raise ValueError(
                f"indices is {indices.dtype} {indices.shape}, expected integers (n,) with n >= 1;"
                " a client without examples cannot take part"
            )
        if indices.min() < 0 or indices.max() >= total:
            raise ValueError(
                f"indices are in {indices.min()}..{indices.max()}, expected 0..{total - 1}, the"
                f" training examples of {dataset.name!r}"
            )
        self.dataset = dataset
        self.indices = indices
        self.num_examples = len(indices)

    @property
    def labels(self) -> np.ndarray:
        """int64 (n,), in the order of the indices."""
        return self.dataset.y_train[self.indices]

    def draw(
        self, *, steps: int, batch_size: int, seed: int, examples: int | None = None
    ) -> Iterator[Batch]:
        """`steps` batches of exactly `batch_size`; a pure function of the arguments.

        Shuffled passes, end to end: a batch may span two passes, and each pass holds every example
        once.  `examples` restricts to that many (all, where the client has fewer).  Which ones is
        fixed by the data and not by `seed`, so that draws with different seeds (as PruneFL's
        initial pruning makes) see the same examples: the first of a shuffle on SUBSET_SEED.

        Raises ValueError when steps < 0, batch_size < 1 or examples < 1.
        """
        return self._batches(drawn_positions(self.num_examples, steps, batch_size, seed, examples))

    def _batches(self, positions: Iterator[np.ndarray]) -> Iterator[Batch]:
        for at in positions:
            chosen = self.indices[at]
            yield self.dataset.normalise(self.dataset.x_train[chosen]), self.dataset.y_train[chosen]


def drawn_positions(
    num_examples: int, steps: int, batch_size: int, seed: int, examples: int | None = None
) -> Iterator[np.ndarray]:
    """Of `Batches.draw`: which of a client's examples are in each batch, int64 (batch_size,).

    A pure function of its arguments; what they mean, and what is refused, as in `ClientData.draw`.
    """
    _at_least("steps", steps, 0)
    _at_least("batch_size", batch_size, 1)
    pool = np.arange(num_examples)
    if examples is not None:
        _at_least("examples", examples, 1)
        if examples < num_examples:
            pool = _generator(SUBSET_SEED).permutation(pool)[:examples]
    return _passes(pool, steps, batch_size, seed)


def _passes(pool: np.ndarray, steps: int, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    rng = _generator(seed)
    queue = rng.permutation(pool)
    for _ in range(steps):
        pieces, missing = [], batch_size
        while missing > len(queue):
            pieces.append(queue)
            missing -= len(queue)
            queue = rng.permutation(pool)
        pieces.append(queue[:missing])
        queue = queue[missing:]
        yield np.concatenate(pieces)


def eval_batches(
    dataset: Dataset, batch_size: int, indices: np.ndarray | None = None
) -> Iterator[Batch]:
    """The test set (or its examples `indices`) in order, once; the last batch may be shorter.

    Raises ValueError when batch_size < 1.
    """
    _at_least("batch_size", batch_size, 1)
    chosen = np.arange(len(dataset.y_test)) if indices is None else indices
    return (
        (dataset.normalise(dataset.x_test[part]), dataset.y_test[part])
        for part in (chosen[i : i + batch_size] for i in range(0, len(chosen), batch_size))
    )


def test_subset(dataset: Dataset, n: int) -> np.ndarray:
    """Sorted int64 indices of `n` test examples in the classes' proportions; always the same ones.

    All of them where the test set is not larger.  Raises ValueError when n < 1.
    """
    _at_least("n", n, 1)
    return stratified_sample(dataset.y_test, min(n, len(dataset.y_test)), SUBSET_SEED)


def own_inputs(dataset: Dataset) -> Iterator[Batch]:
    """At most 500 test examples, always the same ones, in batches of one size: up to 100.

    For what a server finds out by inputs alone; their labels are not for training.
    """
    size = min(OWN_BATCH, len(dataset.y_test))
    count = min(OWN_INPUTS, len(dataset.y_test)) // size * size
    return eval_batches(dataset, size, test_subset(dataset, count))


def _generator(seed: int) -> np.random.Generator:
    # Philox on the given seed itself: tasks carry seeds that `derive_seed` has made already.
    return np.random.Generator(np.random.Philox(seed))


def _at_least(name: str, value: int, low: int) -> None:
    if value < low:
        raise ValueError(f"{name} is {value}, expected at least {low}")
