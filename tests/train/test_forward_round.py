"""What a client is asked in a round of forward passes, what it answers and what it takes.

Slopes themselves are tested in test_zeroth_order.py, whole rounds in tests/methods/test_ntk_zo.py.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from federation import ENGINE, SPEC, client_data, params, same

from fedlean.core import ClientTask, SubModel
from fedlean.cost.way import peak_memory_bytes
from fedlean.engine.open import open_engine
from fedlean.runtime.remote.limit import LimitedEngine
from fedlean.runtime.remote.room import TooLarge
from fedlean.train.forward_round import GRADIENT, SLOPE_LIMIT, ForwardRound, answer, forms, work
from fedlean.train.last_block import last_block
from fedlean.train.zeroth_order import Probe, directional_derivatives

ASKED = ForwardRound(8, 0, "ce", 6, 0.02, "gaussian", "forward", "fp32", "zeroth")
TWO_BLOCKS = replace(
    SPEC,
    nodes=tuple(replace(n, block="head" if n.name == "fc2" else "body") for n in SPEC.nodes),
)
MASKS = {"fc2.weight": np.arange(36).reshape(3, 12) % 3 == 0}


def task(asked: ForwardRound, spec=SPEC, masks=None) -> ClientTask:
    hparams = {**asked.to_hparams(), "direction_seed": 5}
    exact = asked.exact(spec)
    frozen = frozenset(spec.tensor_shapes.keys() - exact if exact else ())
    sub_model = SubModel(masks=masks or {}, frozen=frozen)
    return ClientTask(1, "train", 0, 7, spec, params(), sub_model, hparams)


def test_hparams_bring_all_of_it():
    assert ForwardRound.from_hparams({**ASKED.to_hparams(), "direction_seed": 5}) == ASKED


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"micro_batch": -1},
        {"loss": "mse"},
        {"directions": 0},
        {"sigma": 1e-9},
        {"kind": "cauchy"},
        {"differences": "backward"},
        {"scalars": "fp8"},
        {"last_block": "frozen"},
    ],
)
def test_what_is_out_of_range_is_named(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=rf"^{name} must"):
        replace(ASKED, **wrong)
    with pytest.raises(ValueError, match=rf"^{name} must"):
        ForwardRound.from_hparams({**ASKED.to_hparams(), **wrong})


@pytest.mark.parametrize(("micro_batch", "at_once"), [(0, 8), (3, 3), (8, 8), (20, 8)])
def test_no_more_examples_in_memory_than_there_are(micro_batch, at_once):
    assert replace(ASKED, micro_batch=micro_batch).at_once == at_once


def test_work_by_hand():
    """8 examples at 6 + 1 points, or at 2 · 6; three steps of 3, 3 and 2 for the last block."""
    (along,) = work(task(ASKED, masks=MASKS))
    assert (along.steps, along.batch_size, along.forward_examples) == (0, 8, 56)
    assert along.kept == {"fc2.weight": 12}
    (along,) = work(task(replace(ASKED, differences="central", micro_batch=3)))
    assert (along.batch_size, along.forward_examples) == (3, 96)
    exact, along = work(task(replace(ASKED, last_block="backprop", micro_batch=3), TWO_BLOCKS))
    assert (exact.steps, exact.batch_size, exact.forward_examples) == (3, 3, 0)
    assert (along.steps, along.batch_size, along.forward_examples) == (0, 3, 56)


def test_forms_by_hand():
    """K slopes; of the last block's gradient the kept coordinates."""
    found = forms(task(ASKED, masks=MASKS))
    assert {name: form.shapes for name, form in found.items()} == {"c": {"c": (6,)}}
    assert found["c"].limit == SLOPE_LIMIT
    both = forms(task(replace(ASKED, last_block="backprop"), TWO_BLOCKS, MASKS))
    assert both[GRADIENT].shapes == {"fc2.weight": (12,), "fc2.bias": (3,)}


def test_slopes_are_of_all_but_the_last_block():
    """And of the parameters given, which are not the task's where a client replays."""
    asked = replace(ASKED, last_block="backprop")
    here = {name: value * np.float32(0.5) for name, value in params().items()}
    update = answer(task(asked, TWO_BLOCKS, MASKS), here, client_data()[0], ENGINE)

    ((x, y),) = client_data()[0].draw(steps=1, batch_size=8, seed=7)
    frozen = SubModel(masks=MASKS, frozen=frozenset(last_block(TWO_BLOCKS)))
    session = ENGINE.open_forward(TWO_BLOCKS, here, frozen, batch_size=8)
    slopes = directional_derivatives(session, x, y, Probe(6, 0.02), seed=5, at_once=8)
    assert np.array_equal(update.statistics["c"].tensors["c"], slopes.astype(np.float32))
    assert update.work == work(task(asked, TWO_BLOCKS, MASKS)) and not update.params
    sent = {name: value.shape for name, value in update.statistics[GRADIENT].tensors.items()}
    assert sent == dict(forms(task(asked, TWO_BLOCKS, MASKS))[GRADIENT].shapes)


def test_micro_batches_change_memory_only():
    whole, parts = (
        answer(task(replace(ASKED, micro_batch=micro)), params(), client_data()[0], ENGINE)
        for micro in (0, 3)
    )
    np.testing.assert_allclose(
        parts.statistics["c"].tensors["c"], whole.statistics["c"].tensors["c"], atol=1e-3
    )
    assert not same(whole.work, parts.work)


@pytest.mark.usefixtures("has_native")
@pytest.mark.parametrize("masks", [{}, MASKS])
def test_the_last_block_fits_where_there_is_as_much_memory_as_is_priced(masks):
    """Less than a tenth of it is not used."""
    ordered = task(replace(ASKED, last_block="backprop"), TWO_BLOCKS, masks)
    frozen = ordered.sub_model.frozen
    said = peak_memory_bytes(TWO_BLOCKS, work(ordered), frozen=frozen)
    native, data = open_engine("native", 1), client_data()[0]
    answer(ordered, params(), data, LimitedEngine(native, said, emulated=True))
    with pytest.raises(TooLarge):
        answer(ordered, params(), data, LimitedEngine(native, said * 9 // 10, emulated=True))


def test_directions_are_of_what_is_not_frozen():
    frozen = frozenset({"conv.weight", "fc1.bias"})
    plain = task(ASKED)
    held = replace(plain, sub_model=SubModel(frozen=frozen))
    session = ENGINE.open_forward(SPEC, params(), SubModel(frozen=frozen), batch_size=8)
    ((x, y),) = client_data()[0].draw(steps=1, batch_size=8, seed=7)
    by_hand = directional_derivatives(session, x, y, ASKED.probe, seed=5, at_once=8)
    found, other = (
        answer(one, params(), client_data()[0], ENGINE).statistics["c"].tensors["c"]
        for one in (held, plain)
    )
    assert same(found, by_hand.astype(np.float32)) and not same(found, other)
