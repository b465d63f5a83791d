"""Which channels of a space a width slice keeps: a prefix, a rolling window or random ones.

A `Choose` takes the name of the space, its count of channels and how many stay, and gives ids (K,)
in ascending order.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fedlean.core import generator

Choose = Callable[[str, int, int], np.ndarray]


def prefix(space: str, count: int, kept: int) -> np.ndarray:
    """The first ones, so that smaller models lie within larger ones.

    HeteroFL (Diao et al., ICLR 2021, arXiv 2010.01264) and FjORD's ordered dropout (Horváth et al.,
    NeurIPS 2021, arXiv 2102.13451).
    """
    return np.arange(kept)


def rolling(offset: int) -> Choose:
    """FedRolex's window (Alam et al., NeurIPS 2022, arXiv 2212.01548, Algorithm 1).

    Ids offset, offset + 1, ... modulo the count.  With the number of the round as offset, each
    channel is kept equally often in as many rounds as the space has channels.

    >>> rolling(3)("conv1", 5, 3)
    array([0, 3, 4])
    """
    return lambda space, count, kept: np.sort((offset + np.arange(kept)) % count)


def random(seed: int) -> Choose:
    """Uniform without replacement, each space on its own: Federated Dropout.

    Caldas et al. 2018, arXiv 1812.07210.  `seed` comes from `core.derive_seed`, so that each round
    and client has its own.
    """

    def choose(space: str, count: int, kept: int) -> np.ndarray:
        drawn = generator(seed, 0, 0, f"channels/{space}")
        return np.sort(drawn.permutation(count)[:kept])

    return choose
