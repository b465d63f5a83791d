"""Directional derivatives of the loss by forward passes alone: the client's half of training.

Feng et al., "Does Federated Learning Really Need Backpropagation?" (BAFFLE): a client evaluates the
loss at K points θ + σ z_k around the model, z_k from shared seeds, and sends K numbers.  Spall's
simultaneous perturbation is the central difference with ±1 directions.
"""

# B examples, K directions

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedlean.engine.directions import Kind
from fedlean.engine.protocol import ForwardSession

Differences = Literal["forward", "central"]
Form = Literal["fp32", "fp16", "int8"]


@dataclass(frozen=True)
class Probe:
    """Where the loss is evaluated; server and client agree on it."""

    directions: int  # K
    sigma: float  # σ, in units of the parameters
    kind: Kind = "gaussian"
    differences: Differences = "forward"

    @property
    def evaluations(self) -> int:
        """Forward passes per example: K + 1, or 2K."""
        return self.directions + 1 if self.differences == "forward" else 2 * self.directions


def directional_derivatives(
    session: ForwardSession, x: np.ndarray, y: np.ndarray, probe: Probe, *, seed: int, at_once: int
) -> np.ndarray:
    """c float64 (K,): the slope of the mean loss on x (B, *input_shape), y (B,) along each z_k.

        forward   c_k = (L(θ + σ z_k) - L(θ)) / σ
        central   c_k = (L(θ + σ z_k) - L(θ - σ z_k)) / 2σ

    seed: of the directions (`fedlean.engine.directions`); at_once: examples per forward pass, at
    most the session's batch size.  It changes memory and nothing else: the mean over the examples
    is the mean of the parts' means, weighted by their sizes, taken before the difference.
    """
    if probe.differences == "forward":
        above = _losses(session, x, y, probe, seed, at_once, probe.sigma)
        here = sum(len(b) / len(y) * session.loss(a, b) for a, b in _parts(x, y, at_once))
        return (above - here) / probe.sigma
    above, below = (
        _losses(session, x, y, probe, seed, at_once, sigma) for sigma in (probe.sigma, -probe.sigma)
    )
    return (above - below) / (2 * probe.sigma)


def _losses(
    session: ForwardSession,
    x: np.ndarray,
    y: np.ndarray,
    probe: Probe,
    seed: int,
    at_once: int,
    sigma: float,
) -> np.ndarray:
    """L(θ + sigma·z_k), float64 (K,)."""
    ks = range(probe.directions)
    total = np.zeros(probe.directions)
    for part_x, part_y in _parts(x, y, at_once):
        losses = session.losses_perturbed(
            part_x, part_y, seed=seed, ks=ks, sigma=sigma, kind=probe.kind
        )
        total += len(part_y) / len(y) * losses
    return total


def _parts(x: np.ndarray, y: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for at in range(0, len(y), size):
        yield x[at : at + size], y[at : at + size]
