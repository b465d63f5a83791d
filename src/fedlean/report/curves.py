"""Arithmetic for plots: series out of rounds, thinned so that a long run stays a small page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from fedlean.report.run_folder import Row, Run, number

MAX_POINTS = 400


def series(
    rows: Sequence[Row], x: Callable[[Row], float | None], y: Callable[[Row], float | None]
) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) of all rows where both are known, in order."""
    pairs = [(x(row), y(row)) for row in rows]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    points = np.array(known, np.float64).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def thin(x: np.ndarray, y: np.ndarray, limit: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most about `limit` points that draw the same line: first, last, extremes of each bin."""
    if len(x) <= limit:
        return x, y
    keep = {0, len(x) - 1}
    edges = np.linspace(0, len(x), limit // 2 + 1).astype(int)
    for low, high in pairwise(edges.tolist()):
        keep |= {low + int(np.argmin(y[low:high])), low + int(np.argmax(y[low:high]))}
    at = sorted(keep)
    return x[at], y[at]


def binned(values: np.ndarray, limit: int = 120) -> tuple[np.ndarray, np.ndarray]:
    """(edges, means) over at most `limit` nearly equal stretches of the steps."""
    edges = np.unique(np.linspace(0, len(values), min(len(values), limit) + 1).astype(int))
    return edges, np.add.reduceat(values, edges[:-1]) / np.diff(edges)


def layer_names(runs: Sequence[Run]) -> list[str]:
    """All prunable tensors that the runs report, in order of first appearance."""
    # Only the last steps: the set of prunable tensors belongs to the model, not to a round.
    found: dict[str, None] = {}
    for run in runs:
        for row in run.rounds[-1:]:
            found |= dict.fromkeys(row.get("layer_density") or {})
    return list(found)


def layer_density(row: Row, layer: str) -> float | None:
    """Kept fraction of one tensor after one step."""
    return number((row.get("layer_density") or {}).get(layer))


def layer_grid(run: Run, layers: Sequence[str], columns: int = 120) -> tuple[np.ndarray, int]:
    """Densities [layers, columns] at evenly spaced rounds, and the number of rounds."""
    last = {row["round"]: row for row in run.rounds}  # of several initial steps, the last
    rounds = np.array(sorted(last))
    wanted = np.linspace(rounds[0], rounds[-1], min(columns, int(rounds[-1] - rounds[0]) + 1))
    picked = rounds[np.searchsorted(rounds, wanted, side="right") - 1]
    grid = [[layer_density(last[int(r)], layer) for r in picked] for layer in layers]
    return np.array(grid, np.float64), int(rounds[-1])
