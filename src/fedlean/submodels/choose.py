"""Which channels of a space a width slice keeps: a prefix, a rolling window or random ones.

A `Choose` takes the name of the space, its count of channels and how many stay, and gives ids (K,)
in ascending order.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import Literal

import numpy as np

from fedlean.core import generator

Choose = Callable[[str, int, int], np.ndarray]
Stride = Literal["channel", "window"]


def prefix(space: str, count: int, kept: int) -> np.ndarray:
    """The first ones, so that smaller models lie within larger ones.

    HeteroFL (Diao et al., ICLR 2021, arXiv 2010.01264) and FjORD's ordered dropout (Horváth et al.,
    NeurIPS 2021, arXiv 2102.13451).
    """
    return np.arange(kept)


def rolling(moves: int, *, by: Stride = "channel", shuffle_seed: int | None = None) -> Choose:
    """FedRolex's window after so many moves (Alam et al., NeurIPS 2022, arXiv 2212.01548, Alg. 1).

    Ids o, o + 1, ... modulo the count, where o grows by 1 with each move, or by as many as are kept
    ("window", ours).  A cycle ends when o is 0 again, and each channel is kept equally often in it:
    by channels, `kept` times in `count` moves; by windows, where those fill the space, once in
    count / kept moves.  With `shuffle_seed` each cycle has the channels in an order of its own.

    >>> rolling(3)("conv1", 5, 3), rolling(3, by="window")("conv1", 5, 3)
    (array([0, 3, 4]), array([0, 1, 4]))
    """

    def choose(space: str, count: int, kept: int) -> np.ndarray:
        stride = kept if by == "window" else 1
        ids = (moves * stride + np.arange(kept)) % count
        if shuffle_seed is not None:
            cycle = moves // (count // gcd(count, stride))
            ids = generator(shuffle_seed, cycle, 0, f"order/{space}").permutation(count)[ids]
        return np.sort(ids)

    return choose


def random(seed: int) -> Choose:
    """Uniform without replacement, each space on its own: Federated Dropout.

    Caldas et al. 2018, arXiv 1812.07210.  `seed` comes from `core.derive_seed`, so that each round
    and client has its own.
    """

    def choose(space: str, count: int, kept: int) -> np.ndarray:
        drawn = generator(seed, 0, 0, f"channels/{space}")
        return np.sort(drawn.permutation(count)[:kept])

    return choose
