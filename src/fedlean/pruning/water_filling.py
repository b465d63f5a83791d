"""One budget for all layers, as far as each has weights: min(n_l, c).

OURS, from a conservation law: in a bias-free ReLU network without residuals the scores of NTK-SAP
add up to the same in every layer (`ntk.layer_sums`), so no layer deserves more weights than another
and a small one is kept whole.
"""

from __future__ import annotations

from collections.abc import Mapping


def water_filling(sizes: Mapping[str, int], target: int) -> dict[str, int]:
    """Kept weights by tensor: min(n_l, c), in whole numbers that add up to `target` exactly.

    sizes: n_l, coordinates by tensor; target: in [0, Σ n_l].  What the largest whole c leaves over,
    fewer than there are tensors with n_l > c, goes to the first of those, one each, in the order of
    `sizes`.  Raises ValueError.

    >>> water_filling({"fc1": 100, "fc2": 100, "fc3": 10}, 71)
    {'fc1': 31, 'fc2': 30, 'fc3': 10}
    """
    if any(size < 0 for size in sizes.values()):
        raise ValueError(f"sizes must be at least 0, got {dict(sizes)}")
    if not 0 <= target <= sum(sizes.values()):
        raise ValueError(
            f"target must be in [0, {sum(sizes.values())}], the weights of all tensors together, "
            f"got {target}"
        )
    level, left = _level(sorted(sizes.values()), target)
    budgets = {}
    for name, size in sizes.items():
        more = size > level and left > 0
        budgets[name] = min(size, level) + more
        left -= more
    return budgets


def _level(ascending: list[int], target: int) -> tuple[int, int]:
    """The largest whole c with Σ min(n_l, c) <= target, and what is left of the target."""
    for at, size in enumerate(ascending):
        others = len(ascending) - at
        if size * others > target:  # c is below this tensor's size and all later ones'
            return divmod(target, others)
        target -= size
    return ascending[-1] if ascending else 0, 0
