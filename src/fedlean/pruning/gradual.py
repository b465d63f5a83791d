"""Gradual pruning: from dense to a final density, fast first and slow at the end.

Zhu & Gupta, "To prune, or not to prune", 2017, arXiv 1710.01878, eq. (1), with densities instead of
sparsities and without its pause between steps, which belongs to the caller.
"""

from __future__ import annotations


def gradual_density(step: int, steps: int, final: float) -> float:
    """d_f + (1 - d_f)·(1 - step/steps)³, and `final` from `steps` on.

    Raises ValueError when step < 0, steps < 1 or final is not in [0, 1].

    >>> [gradual_density(step, 10, 0.2) for step in (0, 5, 10, 99)]
    [1.0, 0.30000000000000004, 0.2, 0.2]
    """
    if step < 0 or steps < 1:
        raise ValueError(f"step must be >= 0 and steps >= 1, got {step} of {steps}")
    if not 0 <= final <= 1:
        raise ValueError(f"final must be a density in [0, 1], got {final}")
    left = max(0.0, 1 - step / steps)
    return final + (1 - final) * left**3
