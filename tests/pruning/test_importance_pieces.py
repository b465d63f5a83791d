"""What of the sums of a piece is held and sent, and how the server joins them."""

from __future__ import annotations

import numpy as np
import pytest
from federation import SPEC

from fedlean.engine.pieces import Piece, sweep
from fedlean.pruning.importance_pieces import SentPieces, added, joined, piece_name
from fedlean.tree import unpack


def sent(sums, masks, multiple=1.5, dtype="fp32", scale=1.0, first=0):
    """The statistic of one piece of 'w'."""
    holding = SentPieces(masks, multiple, dtype)
    holding.take((Piece("w", first, len(sums)),), {"w": np.asarray(sums, np.float32)}, scale)
    return holding.statistic()


def test_the_largest_by_hand():
    """Rows 1 and 2 of 4 keep 2 of the 3 weights of the layer: ceil(1.5·2) = 3 of 4 sums go up."""
    mask = np.array([[1, 0], [1, 0], [1, 0], [0, 0]], bool)
    statistic = sent([[5, 1], [7, 6]], {"w": mask}, first=1, scale=2.0)
    assert statistic.reduction == "mean"
    (values,), (chosen,) = statistic.tensors.values(), statistic.masks.values()
    assert list(statistic.tensors) == list(statistic.masks) == ["w/1"]
    assert values.tolist() == [10, 14, 12]
    assert chosen.tolist() == [[True, False], [True, True]]


def test_rows_that_keep_nothing_send_what_their_layer_would():
    """3 of 8 kept: two rows would keep 1.5 of 4, so ceil(2.25) = 3 sums go up."""
    mask = np.array([[1, 1], [1, 0], [0, 0], [0, 0]], bool)
    assert sent(np.ones((2, 2)), {"w": mask}, first=2).tensors["w/2"].size == 3
    assert not sent(np.ones((2, 2)), {"w": mask}).masks, "1.5·3 are all four"


@pytest.mark.parametrize(("masks", "multiple"), [({}, 1.5), ({"w": np.eye(2, dtype=bool)}, 0.0)])
def test_without_a_mask_or_a_multiple_all_goes_up(masks, multiple):
    statistic = sent([[4, 1], [2, 3]], masks, multiple)
    assert not statistic.masks and statistic.tensors["w/0"].tolist() == [[4, 1], [2, 3]]


def test_bfloat16_rounds_what_is_sent():
    value = np.float32(1 + 2**-9)
    (exact,), (rounded,) = (
        sent([[value]], {}, dtype=dtype).tensors.values() for dtype in ("fp32", "bf16")
    )
    assert exact[0, 0] == value and rounded[0, 0] == 1


def test_joined_is_the_whole():
    rng = np.random.default_rng(0)
    whole = {n: rng.random(shape, np.float32) for n, shape in SPEC.param_shapes.items()}
    parts = {
        piece_name(piece): whole[piece.tensor][piece.first_row : piece.first_row + piece.rows]
        for pieces in sweep(SPEC, 600)
        for piece in pieces
    }
    found = joined(SPEC, parts, 600)
    assert found.keys() == whole.keys()
    assert all(np.array_equal(found[name], whole[name]) for name in whole)
    parts.popitem()
    assert joined(SPEC, parts, 600) == {}


def test_sums_of_two_rounds_by_hand():
    one, two = np.float32([1, 2]), np.float32([3, 4])
    total = added({"a": one, "b": one}, {"b": two, "c": two})
    assert {name: values.tolist() for name, values in total.items()} == {
        "a": [1, 2],
        "b": [4, 6],
        "c": [3, 4],
    }


def test_what_is_packed_unpacks_to_the_largest():
    rng = np.random.default_rng(1)
    sums, mask = rng.random((20, 30), np.float32), rng.random((20, 30)) < 0.1
    statistic = sent(sums, {"w": mask})
    dense = unpack(statistic.tensors["w/0"], statistic.masks["w/0"])
    count = int(np.ceil(1.5 * mask.sum()))
    smallest = np.sort(sums, axis=None)[-count]
    assert np.array_equal(dense, np.where(sums >= smallest, sums, 0))
