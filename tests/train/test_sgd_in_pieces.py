"""Local SGD that sums g² a piece at a time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from federation import ENGINE, SPEC, client_data, params, same

from fedlean.core import SubModel
from fedlean.engine.pieces import Part, Piece
from fedlean.engine.protocol import SGD
from fedlean.train.sgd import local_sgd
from fedlean.train.sgd_in_pieces import sgd_in_pieces

FIRST, SECOND = (Piece("fc1.weight", 0, 4),), (Piece("fc1.weight", 4, 8), Piece("fc2.bias", 0, 3))


def opened():
    return ENGINE.open(SPEC, params(), SubModel(), batch_size=8, optimizer=SGD(0.1))


def test_it_trains_as_local_sgd_does():
    plain, pieces = opened(), opened()
    wanted = local_sgd(plain, client_data()[0], steps=5, batch_size=8, seed=3)
    parts = [Part(FIRST, 2), Part(SECOND, 3)]
    loss = sgd_in_pieces(
        pieces,
        client_data()[0],
        parts=parts,
        batch_size=8,
        seed=3,
        take=lambda *_: None,
    )
    assert loss == wanted and same(plain.params(), pieces.params())


def test_each_part_is_taken_as_it_ends_and_scaled_to_all_steps():
    """Losses 1 to 5: 2 steps of one, 3 of the other, out of 5."""
    happened = []

    def step(x, y, *, importance):
        happened.append(importance)
        return float(len([one for one in happened if one in (FIRST, SECOND)]))

    session = SimpleNamespace(step=step, importance=lambda: {"of": happened[-1]})
    loss = sgd_in_pieces(
        session,
        client_data()[0],
        parts=[Part(FIRST, 2), Part(SECOND, 3)],
        batch_size=4,
        seed=0,
        take=lambda pieces, sums, scale: happened.append((pieces, sums["of"], scale)),
    )
    assert loss == 3.0
    ends = (FIRST, FIRST, 2.5), (SECOND, SECOND, pytest.approx(5 / 3))
    assert happened == [FIRST, FIRST, ends[0], SECOND, SECOND, SECOND, ends[1]]


def test_no_steps():
    loss = sgd_in_pieces(
        opened(), client_data()[0], parts=(), batch_size=8, seed=0, take=lambda *_: None
    )
    assert loss == 0.0
