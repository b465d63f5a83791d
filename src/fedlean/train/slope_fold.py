"""The slopes of a round's clients, folded into one step of the model.

Shared directions: ĝ = (1/K) Σ_k (Σ_n p_n c_{n,k}) z_k, eq. (2) of `methods.ntk_zo`.  Directions of
each client's own, as a control: ĝ = Σ_n p_n ĝ_n.  p_n weights clients by their examples.
"""

from __future__ import annotations

import numpy as np

from fedlean.core import ClientUpdate, Params
from fedlean.train.forward_round import GRADIENT, SLOPES
from fedlean.train.forward_updates import (
    Entry,
    Held,
    Rule,
    Space,
    advance,
    estimate,
    replay,
    round_seed,
)
from fedlean.tree import Fold


class SlopeFold:
    """One round's reduction: `add` every update, then read the results."""

    def __init__(self, base: Params, seed: int, round: int, space: Space, *, shared: bool):
        """base: the model's tensors; seed: the run's; shared: all clients have one's directions."""
        self._seed, self._round, self._space = seed, round, space
        self._merged = Fold(base)
        self._own = None if shared else _OwnDirections(seed, round, space)

    def add(self, update: ClientUpdate) -> None:
        self._merged.add(update)
        if self._own is not None:
            self._own.add(update)

    def slopes(self) -> np.ndarray | None:
        """Σ_n p_n c_n, float32 (K,); None: nobody answered."""
        return self._merged.statistic(SLOPES).get(SLOPES)

    def step(self, held: Held, entry: Entry, rule: Rule) -> Held:
        """The model after the round, whose entry in the log is `entry`."""
        exact = self._merged.statistic(GRADIENT)
        if self._own is None and not exact:  # as the clients compute it who replay the log
            return replay(held, [entry], seed=self._seed, space=self._space, rule=rule)
        if self._own is None:
            seed, slopes = round_seed(self._seed, self._round), entry.scalars
            gradient = estimate(seed, slopes, self._space)
        else:
            gradient, slopes = self._own.mean(), self._own.slopes()
        return advance(held, {**gradient, **exact}, rule, entry.lr, slopes)


class _OwnDirections:
    """Σ_n p_n ĝ_n."""

    def __init__(self, seed: int, round: int, space: Space):
        self._seed, self._round, self._space = seed, round, space
        self._sums: dict[str, np.ndarray] = {}
        self._weight = 0.0
        self._slopes: list[np.ndarray] = []

    def add(self, update: ClientUpdate) -> None:
        slopes = update.statistics[SLOPES].tensors[SLOPES]
        seed = own_seed(self._seed, self._round, update.client)
        for name, values in estimate(seed, slopes, self._space).items():
            term = np.multiply(values, update.num_examples, dtype=np.float64)
            self._sums[name] = self._sums[name] + term if name in self._sums else term
        self._weight += update.num_examples
        self._slopes.append(slopes)

    def mean(self) -> dict[str, np.ndarray]:
        return {name: (sums / self._weight).astype(np.float32) for name, sums in self._sums.items()}

    def slopes(self) -> np.ndarray:
        """Of all clients, (N·K,)."""
        return np.concatenate(self._slopes)


def own_seed(seed: int, round: int, client: int) -> int:
    """Of the directions of one client; 0 is that of all clients together (`round_seed`)."""
    return round_seed(seed, round, client + 1)
