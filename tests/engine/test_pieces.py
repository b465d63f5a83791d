"""Σ g² of some rows at a time: what is summed, what is held, and how a model is cut."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import numpy as np
import pytest
from engine.cases import (
    BLOCK,
    CONV,
    FULL_SGD,
    MLP,
    NET,
    assert_near,
    batch,
    masks_of,
    mlp_by_hand,
    opened,
    start,
)
from federation import same
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlean.engine.memory import optimizer_floats, step_memory
from fedlean.engine.open import open_engine
from fedlean.engine.pieces import Piece, parts_taken, sum_bytes, sweep, whole
from fedlean.engine.protocol import SGD
from fedlean.models import catalog
from fedlean.train.loss_gradient import loss_and_gradient
from fedlean.tree import kept_counts

SPECS = {"mlp": MLP, "norms": CONV, "chain": NET, "residual": BLOCK}
RUNS = settings(max_examples=100, deadline=None, derandomize=True, database=None)
STILL = SGD(0.0)  # every step sees the same weights


def budget_of(spec, parts):
    """So many bytes that a sweep has about so many parts."""
    row = max(4 * prod(shape[1:]) for shape in spec.param_shapes.values())
    return max(row, sum_bytes(spec, whole(spec)) // parts)


SOME = (Piece("fc1.weight", 2, 3), Piece("fc2.bias", 1, 2))  # of MLP


# What is summed


def test_sums_by_hand(engine):
    """Two batches, weights that stay: Σ over both of the rows of dL/dw squared."""
    params, batches = start(MLP), [batch(MLP, seed=seed) for seed in (1, 2)]
    masks = masks_of(MLP, 0.4)
    for name, mask in masks.items():
        params[name] = np.where(mask, params[name], np.float32(0))
    session = opened(engine, MLP, params, masks=masks, sgd=STILL)
    first, second = (mlp_by_hand(params, x, y)[2] for x, y in batches)
    for x, y in batches:
        session.step(x, y, importance=SOME)
    squares = {name: first[name] ** 2 + second[name] ** 2 for name in first}
    expected = {"fc1.weight": squares["fc1.weight"][2:5], "fc2.bias": squares["fc2.bias"][1:3]}
    assert session.importance()["fc1.weight"].shape == (3, 7)
    assert_near(session.importance(), expected)


@pytest.mark.parametrize("density", [1.0, 0.6, 0.2])
@pytest.mark.parametrize("name", SPECS)
def test_pieces_of_one_batch_are_the_whole(engine, name, density):
    """Bit for bit, for any cut."""
    spec, (x, y) = SPECS[name], batch(SPECS[name])
    masks = masks_of(spec, density) if density < 1 else {}
    session = opened(engine, spec, masks=masks, sgd=STILL)
    session.step(x, y, importance=True)
    expected = session.importance()
    for parts in (2, 3, 7):
        found = {key: [] for key in spec.param_shapes}
        for pieces in sweep(spec, budget_of(spec, parts)):
            session.step(x, y, importance=pieces)
            sums = session.importance()
            assert set(sums) == {piece.tensor for piece in pieces}
            for key, values in sums.items():
                found[key].append(values)
        assert same({key: np.concatenate(values) for key, values in found.items()}, expected)


@pytest.mark.usefixtures("has_native")
@pytest.mark.parametrize("name", sorted(SPECS.keys() - {"norms"}))  # one is of two values: rounding
def test_engines_agree(name):
    spec, masks = SPECS[name], masks_of(SPECS[name], 0.6)
    native, torch = (
        opened(open_engine(each, 1), spec, masks=masks, sgd=STILL) for each in ("native", "torch")
    )
    for pieces in sweep(spec, budget_of(spec, 4)):
        for seed in (1, 2):
            for session in (native, torch):
                session.step(*batch(spec, seed=seed), importance=pieces)
        found = native.importance()
        for key, values in torch.importance().items():
            near = 2e-4 * float(values.max()) + 1e-12  # below a norm, a bias's is rounding alone
            np.testing.assert_allclose(found[key], values, rtol=0, atol=near, err_msg=key)


@pytest.mark.usefixtures("has_native")
@pytest.mark.parametrize("density", [1.0, 0.3])
def test_threads_do_not_matter(density):
    masks = masks_of(NET, density) if density < 1 else {}
    results = []
    for threads in (1, 2, 3):
        session = opened(open_engine("native", threads), NET, masks=masks)
        for pieces in sweep(NET, 3000):
            session.step(*batch(NET), importance=pieces)
            results.append(session.importance())
    third = len(results) // 3
    assert same(results[:third], results[third : 2 * third])
    assert same(results[:third], results[2 * third :])


@pytest.mark.parametrize("sgd", [SGD(0.1), FULL_SGD], ids=["plain", "all"])
def test_the_update_is_that_of_a_plain_step(engine, sgd):
    masks = masks_of(NET, 0.3)
    plain, summing = (opened(engine, NET, masks=masks, sgd=sgd) for _ in range(2))
    for seed, pieces in enumerate(sweep(NET, 3000)):
        x, y = batch(NET, seed=seed)
        assert plain.step(x, y) == summing.step(x, y, importance=pieces)
    assert same(plain.params(), summing.params())


def test_others_start_anew_and_plain_steps_change_nothing(engine):
    session, (x, y) = opened(engine, MLP, sgd=STILL), batch(MLP)
    assert set(session.importance()) == set(MLP.param_shapes)
    session.step(x, y, importance=SOME)
    once = session.importance()
    session.step(x, y)
    session.step(x, y, importance=())
    assert same(session.importance(), once)
    session.step(x, y, importance=SOME)
    assert_near(session.importance(), {name: 2 * values for name, values in once.items()})
    session.step(x, y, importance=True)
    all_once = session.importance()
    assert set(all_once) == set(MLP.param_shapes)
    assert_near({"w": all_once["fc1.weight"][2:5]}, {"w": once["fc1.weight"]})
    session.step(x, y, importance=SOME)
    assert same(session.importance(), once)
    session.step(x, y, importance=[tuple(piece) for piece in SOME])  # no matter of which type
    assert_near(session.importance(), {name: 2 * values for name, values in once.items()})
    session.step(x, y, importance=whole(MLP))
    session.step(x, y, importance=True)  # the same by another name
    assert_near(session.importance(), {name: 2 * values for name, values in all_once.items()})


def test_descend_sums_them_too(engine):
    masks, pieces = masks_of(NET, 0.3), (Piece("conv2.weight", 3, 6), Piece("fc1.weight", 5, 11))
    step, descend = (opened(engine, NET, masks=masks) for _ in range(2))
    for seed in (1, 2):
        x, y = batch(NET, seed=seed)
        step.step(x, y, importance=pieces)
        logits = descend.forward(x, training=True)["fc2"]
        descend.descend({"fc2": loss_and_gradient(logits, y, "ce")[1]}, importance=pieces)
    assert_near(descend.importance(), step.importance())


def test_frozen_tensors_are_no_pieces(engine):
    frozen = frozenset({"conv1.weight", "fc1.bias"})
    session = opened(engine, NET, masks=masks_of(NET, 0.3), frozen=frozen)
    for pieces in sweep(NET, 3000, frozen):
        assert not frozen & {piece.tensor for piece in pieces}
        session.step(*batch(NET), importance=pieces)


@pytest.mark.parametrize(
    ("pieces", "word"),
    [
        ((Piece("fc3.weight", 0, 1),), "fc3.weight"),
        ((Piece("fc2.weight", 0, 1),), "fc2.weight"),  # frozen
        ((Piece("fc1.weight", 0, 1), Piece("fc1.weight", 3, 1)), "twice"),
        ((Piece("fc1.weight", 3, 4),), "4 rows from 3"),
        ((Piece("fc1.weight", 0, 0),), "0 rows"),
        ((Piece("fc1.weight", -1, 2),), "from -1"),
        (("fc1.weight",), "expected Piece"),
        ((("fc1.weight", 0),), "expected Piece"),
        ((("fc1.weight", 0.0, 1),), "expected Piece"),
    ],
)
def test_what_is_no_piece_is_refused_and_changes_nothing(engine, pieces, word):
    session, (x, y) = opened(engine, MLP, frozen={"fc2.weight"}), batch(MLP)
    session.step(x, y, importance=(Piece("fc1.weight", 0, 2),))
    params, sums = session.params(), session.importance()
    with pytest.raises(ValueError, match=word):
        session.step(x, y, importance=pieces)
    with pytest.raises(ValueError, match="x has shape"):
        session.step(np.ascontiguousarray(x[:, :3]), y, importance=True)
    assert same(session.params(), params) and same(session.importance(), sums)


# What is held


@pytest.mark.usefixtures("has_native")
@pytest.mark.parametrize("sgd", [SGD(0.1), FULL_SGD], ids=["plain", "all"])
@pytest.mark.parametrize("density", [1.0, 0.3, 0.05])
@pytest.mark.parametrize("name", SPECS)
def test_the_plan_is_what_is_held(name, density, sgd):
    """Of one piece to the byte, and of a sweep with the most sums and the largest arena."""
    spec = SPECS[name]
    masks = masks_of(spec, density) if density < 1 else {}
    engine = open_engine("native", 2)

    def claim(*taken):
        return step_memory(
            spec,
            kept_counts(masks),
            batch_size=5,
            optimizer_floats=optimizer_floats(sgd),
            importance=True,
            pieces=taken,
            threads=2,
        ).peak_bytes

    parts = sweep(spec, budget_of(spec, 4))
    swept = opened(engine, spec, masks=masks, sgd=sgd)
    for i, pieces in enumerate(parts):
        session = opened(engine, spec, masks=masks, sgd=sgd)
        session.step(*batch(spec), importance=pieces)
        assert session.held_bytes == session.peak_memory_bytes == claim(pieces)
        swept.step(*batch(spec), importance=pieces)
        assert swept.held_bytes <= swept.peak_memory_bytes == claim(*parts[: i + 1])
    assert claim(*parts) < claim(), "less than all at once"


@pytest.mark.usefixtures("has_native")
def test_conv2_at_a_tenth_holds_its_piece_beside_a_plain_step():
    spec, budget = catalog.build("conv2", (1, 28, 28), 62), 2 << 20
    kept = {name: prod(spec.param_shapes[name]) // 10 for name in spec.prunable}
    plain = step_memory(spec, kept, batch_size=20)
    pieces = step_memory(spec, kept, batch_size=20, importance=True, pieces=sweep(spec, budget))
    whole_bytes = step_memory(spec, kept, batch_size=20, importance=True).peak_bytes
    assert pieces.importance_bytes <= budget
    assert pieces.peak_bytes <= 1.25 * plain.peak_bytes + budget
    assert pieces.peak_bytes < 16e6 < whole_bytes


@pytest.mark.usefixtures("has_native")
def test_a_session_that_serves_again_has_forgotten_them():
    engine = open_engine("native", 1)
    session = opened(engine, MLP)
    planned = session.peak_memory_bytes
    session.step(*batch(MLP), importance=SOME)
    assert session.peak_memory_bytes > planned
    del session
    again = opened(engine, MLP)
    assert again.peak_memory_bytes == planned
    again.step(*batch(MLP))
    assert again.held_bytes == planned
    assert set(again.importance()) == set(MLP.param_shapes)
    assert not any(values.any() for values in again.importance().values())


# How a model is cut


@RUNS
@given(st.sampled_from(sorted(SPECS)), st.integers(1000, 20_000), st.data())
def test_a_sweep_has_every_row_once_and_fits(of, budget, data):
    spec = SPECS[of]
    frozen = data.draw(st.frozensets(st.sampled_from(sorted(spec.param_shapes))))
    taken = []
    parts = sweep(spec, budget, frozen)
    for pieces in parts:
        assert 0 < sum_bytes(spec, pieces) <= budget
        for name, first, rows in pieces:
            taken += [(name, first + row) for row in range(rows)]
    shapes = {n: shape for n, shape in spec.param_shapes.items() if n not in frozen}
    assert taken == [(n, row) for n, shape in shapes.items() for row in range(shape[0])]
    for pieces, after in pairwise(parts):  # as full as can be
        row = 4 * prod(spec.param_shapes[after[0].tensor][1:])
        assert sum_bytes(spec, pieces) + row > budget


def test_a_budget_below_one_row_is_refused():
    assert max(4 * prod(shape[1:]) for shape in MLP.param_shapes.values()) == 28
    sweep(MLP, 28)
    with pytest.raises(ValueError, match=r"27 bytes.*fc1.weight"):
        sweep(MLP, 27)


def test_parts_taken_by_hand():
    """MLP at 100 bytes: rows of 28 (6 of them), 4 (6), 24 (4) and 4 (4)."""
    parts = sweep(MLP, 100)
    assert [sum(p.rows for p in part) for part in parts] == [3, 3 + 4, 2 + 3, 1 + 4]
    assert [s.steps for s in parts_taken(MLP, 5, 100, 0)] == [1, 1, 1, 2]
    assert [s.steps for s in parts_taken(MLP, 3, 100, 0)] == [1, 1, 1]
    assert [s.pieces for s in parts_taken(MLP, 3, 100, 2)] == list(parts[2:])
    assert parts_taken(MLP, 5, 0, 0) == ((whole(MLP), 5),)
    assert parts_taken(MLP, 0, 100, 0) == ()
    with pytest.raises(ValueError, match="part 4"):
        parts_taken(MLP, 5, 100, 4)
