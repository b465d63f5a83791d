"""What of PruneFL's Σ g² goes up where it is taken in pieces, and how the server joins them.

OURS: the paper (arXiv 1909.12326) has every client hold and send all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil

import numpy as np

from fedlean.core import ClientTask, Masks, Params, Statistic, StatisticForm
from fedlean.engine.pieces import Part, Piece, Pieces, parts_taken, piece_shape, sweep
from fedlean.patterns.largest import largest
from fedlean.spec import ModelSpec
from fedlean.tree import kept_counts, kept_values
from fedlean.wire import round_bfloat16


def piece_name(piece: Piece) -> str:
    """As it travels.

    >>> piece_name(Piece("fc.weight", 8, 4))
    'fc.weight/8'
    """
    return f"{piece.tensor}/{piece.first_row}"


def statistic_name(first_part: int) -> str:
    """Of the parts of a sweep from that one on: their norms are compared with each other's only."""
    return f"importance/{first_part}"


def ordered(task: ClientTask) -> tuple[Part, ...]:
    """What the task's steps sum g² of, where that is a piece at a time."""
    h = task.hparams
    if not h.get("piece_bytes", 0):
        return ()
    steps, budget_bytes, first = (int(h[k]) for k in ("local_steps", "piece_bytes", "first_piece"))
    return parts_taken(task.spec, steps, budget_bytes, first)


def sent_form(task: ClientTask) -> dict[str, StatisticForm]:
    """Of what is sent of it, which may be packed."""
    shapes = {
        piece_name(piece): piece_shape(task.spec, piece)
        for part in ordered(task)
        for piece in part.pieces
    }
    name = statistic_name(int(task.hparams["first_piece"]))
    return {name: StatisticForm(shapes, non_negative=True)}


class SentPieces:
    """What a client holds of its sums until they go up: of each piece what is sent, and no more."""

    def __init__(self, masks: Masks, multiple: float, dtype: str):
        """multiple, dtype: as `sent_importance.largest_sums` takes them."""
        self._masks, self._multiple, self._dtype = masks, multiple, dtype
        self._kept = kept_counts(masks)
        self._values: dict[str, np.ndarray] = {}
        self._chosen: dict[str, np.ndarray] = {}

    def take(self, pieces: Pieces, sums: Params, scale: float) -> None:
        """Of each masked tensor's rows the largest sums; the others stand for 0."""
        for piece in pieces:
            name, values = piece_name(piece), sums[piece.tensor]
            count = self._count(piece, values.size)
            if count < values.size:
                chosen = largest(values.ravel(), count).reshape(values.shape)
                self._chosen[name], values = chosen, kept_values(values, chosen)
            values = values * np.float32(scale)
            self._values[name] = round_bfloat16(values) if self._dtype == "bf16" else values

    def statistic(self) -> Statistic:
        return Statistic(self._values, "mean", self._chosen)

    def _count(self, piece: Piece, size: int) -> int:
        """`multiple` times what the rows keep, or would keep at the density of their layer.

        By the larger of both: rows that lost their weights can get them back, and rows that have
        more than others are judged by all of them.
        """
        mask = self._masks.get(piece.tensor)
        if mask is None or not self._multiple:
            return size
        rows = mask[piece.first_row : piece.first_row + piece.rows]
        share = self._kept[piece.tensor] * piece.rows / len(mask)
        return ceil(self._multiple * max(int(np.count_nonzero(rows)), share))


def added(sums: Params, more: Params) -> dict[str, np.ndarray]:
    """Sums by piece, with those of one more round."""
    return {**sums, **{n: sums[n] + values if n in sums else values for n, values in more.items()}}


def joined(spec: ModelSpec, sums: Mapping[str, np.ndarray], budget_bytes: int) -> Params:
    """Sums by tensor, of all pieces of a sweep; {} where one is missing."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in spec.param_shapes}
    for pieces in sweep(spec, budget_bytes):
        for piece in pieces:
            if piece_name(piece) not in sums:
                return {}
            found[piece.tensor].append(sums[piece_name(piece)])
    return {name: np.concatenate(values) for name, values in found.items()}
