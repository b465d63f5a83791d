"""How far an update moves the model, and the bound that the clients set each other."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import numpy as np
import pytest
from federation import SPEC, params

from fedlean.core import ClientTask, ClientUpdate, Statistic, StatisticForm, SubModel
from fedlean.layers import BatchNorm, Linear
from fedlean.runtime.moves import (
    BUFFERS,
    FACTOR,
    KEPT,
    KEPT_ALIKE,
    LEAST,
    MODEL,
    MODELS,
    SMALL,
    STATISTIC_FACTOR,
    Bound,
    Move,
    Moved,
    Moves,
)
from fedlean.runtime.moves import moved as moved_of
from fedlean.spec import sequential
from fedlean.tree import apply_mask, pack

MASKS = {
    name: np.arange(params()[name].size).reshape(params()[name].shape) % 3 > 0
    for name in ("conv.weight", "fc1.weight")
}
NORMED = sequential((4,), [("bn", BatchNorm()), ("fc", Linear(2))])


def task(masks=None, spec=SPEC, values=None) -> ClientTask:
    masks = masks or {}
    values = apply_mask(params(), masks) if values is None else values
    return ClientTask(1, "train", 0, 5, spec, values, SubModel(masks=masks), {})


def answer(asked: ClientTask, **changed: np.ndarray) -> ClientUpdate:
    return ClientUpdate(0, 40, {**asked.params, **changed}, asked.sub_model)


def moved(update: ClientUpdate, asked: ClientTask) -> Moved:
    return moved_of(update, asked, {})


def test_one_value_moved_by_3_and_another_by_4_are_a_move_of_5():
    bias = params()["fc1.bias"].copy()
    bias[:2] += [3, 4]
    for masks in ({}, MASKS):
        asked = task(masks)
        far = moved(answer(asked, **{"fc1.bias": bias}), asked)
        assert far[MODEL].far == pytest.approx(5) and far[BUFFERS] == Move(0, 0, SPEC.hash)
        norm = sum(float(np.sum(np.square(value))) for value in asked.params.values()) ** 0.5
        assert far[MODEL].asked == pytest.approx(norm)


@pytest.mark.parametrize("sent_packed", [False, True])
@pytest.mark.parametrize("asked_packed", [False, True])
def test_dense_and_packed_alike(sent_packed, asked_packed):
    asked = task(MASKS)
    changed = asked.params["fc1.weight"] * np.float32(2)
    update = answer(asked, **{"fc1.weight": changed})
    if sent_packed:
        update = replace(update, params=pack(update.params, MASKS))
    if asked_packed:
        asked = replace(asked, params=pack(asked.params, MASKS))
    norm = float(np.linalg.norm(params()["fc1.weight"][MASKS["fc1.weight"]]))
    assert moved(update, asked)[MODEL].far == pytest.approx(norm)


def test_masks_that_the_client_chose():
    """The task is dense, the update packed by masks of its own: what they prune counts as moved."""
    asked = task()
    held = replace(answer(asked), params=pack(params(), MASKS), sub_model=SubModel(masks=MASKS))
    pruned = sum(float(np.sum(np.square(params()[n][~MASKS[n]]))) for n in MASKS)
    assert moved(held, asked)[MODEL].far == pytest.approx(pruned**0.5)


def test_running_statistics_are_apart():
    values = {
        "bn.weight": np.ones(4, np.float32),
        "bn.bias": np.zeros(4, np.float32),
        "bn.running_mean": np.zeros(4, np.float32),
        "bn.running_var": np.ones(4, np.float32),
        "fc.weight": np.ones((2, 4), np.float32),
        "fc.bias": np.zeros(2, np.float32),
    }
    asked = task(spec=NORMED, values=values)
    update = answer(asked, **{"bn.running_var": np.full(4, 4, np.float32)})
    assert moved(update, asked) == {
        MODEL: Move(0, 12**0.5, NORMED.hash),
        BUFFERS: Move(6, 2, NORMED.hash),
    }  # 4 times 3, squared: 36


def test_values_whose_squares_are_beyond_float32():
    asked = task()
    update = answer(asked, **{"fc1.bias": np.full(12, 1e38, np.float32)})
    assert moved(update, asked)[MODEL].far == pytest.approx(12**0.5 * 1e38)


NOTHING = {kind: Move(0, 0, SPEC.hash) for kind in (MODEL, BUFFERS)}


def test_a_task_without_values_and_frozen_tensors_say_nothing():
    asked = task()
    assert moved(answer(asked), replace(asked, params={})) == NOTHING
    frozen = replace(asked, sub_model=SubModel(frozen=frozenset(SPEC.tensor_shapes)))
    assert moved(answer(asked), frozen) == NOTHING


def both(model: float, buffers: float = 0.0, asked: float = 0.0) -> Moved:
    return {MODEL: Move(model, asked), BUFFERS: Move(buffers)}


def each(*moved: Moved) -> dict[int, Moved]:
    """Of clients 0, 1, 2 ..."""
    return dict(enumerate(moved))


def history(*trained: float, phase: str = "train") -> Moves:
    return Moves().after(phase, each(*[both(far, far / 10) for far in trained]))


def test_the_bound_is_a_multiple_of_the_lower_median():
    bound = history(1, 2, 3, 1000).bound(None, "train")
    assert bound.most == {MODEL: FACTOR * 2, BUFFERS: pytest.approx(FACTOR * 0.2)}
    assert bound.exceeded(both(FACTOR * 2, 0)) is None
    reason = bound.exceeded(both(FACTOR * 2 + 1, 0)) or ""
    assert "moved the model by 101, more than 50 times the median of the clients" in reason
    assert "running statistics by 11" in (bound.exceeded(both(0, 11)) or "")


def test_less_than_a_tenth_of_the_model_is_always_taken():
    """Most clients have nothing to learn any more, one has."""
    bound = history(1e-9, 1e-9, 1e-9).bound(None, "train")
    assert bound.exceeded(both(0.9, 0, 10)) is None
    assert bound.exceeded(both(SMALL * 10 + 0.1, 0, 10)) is not None


def test_too_few_moves_or_none_at_all_say_nothing():
    for moves in (history(*[1.0] * (LEAST - 1)), history(0, 0, 0)):
        assert moves.bound(None, "train").exceeded(both(1e17, 1e17)) is None
    assert not history(1, 1).suffice("train", ()) and history(1, 1, 1).suffice("train", ())


def test_another_phase_begins_anew():
    moves = history(1, 2, 3)
    assert moves.bound(None, "prune") == Bound() and not moves.suffice("prune", ())
    assert moves.after("prune", each(both(7))).last[MODEL] == ((0, 7),)


def test_what_is_given_counts_alone_and_0_is_off():
    moves = history(1, 2, 3)
    bound = moves.bound(5, "train")
    assert bound == Bound(given=5) and bound.exceeded(both(3, 3.9)) is None
    assert bound.exceeded(both(3, 4.1)) == "moved the model by 5.08, the bound is 5"
    assert moves.bound(0, "train") == Bound(given=inf)


def test_a_statistic_has_a_bound_of_its_own():
    forms = {
        "slopes": StatisticForm({"slopes": (2,)}),
        "importance": StatisticForm({"w": (1,)}, non_negative=True),
    }
    statistics = {
        "slopes": Statistic({"slopes": np.array([3, 4], np.float32)}, "mean"),
        "importance": Statistic({"w": np.array([49], np.float32)}, "mean"),
    }
    update = ClientUpdate(0, 40, {}, SubModel(), statistics)
    far = moved_of(update, task(), forms)
    assert (far["slopes"].far, far["importance"].far) == (5, 7)  # of squares, the root
    moves = Moves().after("train", each(far, far, far))
    bound = moves.bound(None, "train")
    assert bound.most["slopes"] == STATISTIC_FACTOR * 5
    assert bound.exceeded({"slopes": Move(499)}) is None
    assert bound.exceeded({"slopes": Move(501)}) == (
        "sent the statistic slopes of norm 501, more than 100 times the median of the clients, "
        "which is 5"
    )
    assert moves.suffice("train", ["slopes"]) and not moves.suffice("train", ["gradient"])


@pytest.mark.parametrize("cohort", [3, 4, 6, 10, 50])
def test_a_jump_of_all_clients_passes_in_the_third_round(cohort):
    """Honest moves that grow a hundredfold at once are refused twice, not for good."""
    moves, taken = history(*[1.0] * cohort), []
    for _ in range(9):
        moves = moves.after("train", each(*[both(1.0)] * cohort))
    for _ in range(3):
        bound = moves.bound(None, "train")
        taken.append(bound.exceeded(both(100.0)) is None)
        moves = moves.after("train", each(*[both(100.0)] * cohort))
    assert taken == [False, False, True]


def test_two_clients_set_each_other_no_bound():
    """However often they have moved: one that hardly moves would have the other refused."""
    moves = Moves()
    for _ in range(9):
        moves = moves.after("train", each(both(1e-6), both(1.0)))
    assert moves.bound(None, "train").exceeded(both(1.0)) is None
    assert not moves.suffice("train", ())


def test_moves_of_clients_that_are_drawn_one_at_a_time():
    moves = Moves()
    for client in range(8):
        assert moves.suffice("train", ()) == (client >= LEAST)
        moves = moves.after("train", {client: both(1.0)})
    assert moves.bound(None, "train").most[MODEL] == FACTOR


def test_a_statistic_that_was_sent_too_seldom_is_waited_for():
    twice = each(*[{MODEL: Move(1.0), "s": Move(1.0)}] * 2)
    moves = Moves().after("train", twice).after("train", each(*[both(1.0)] * 3))
    assert moves.suffice("train", ()) and not moves.suffice("train", ["s"])


def test_a_rogue_in_every_round_does_not_lift_the_bound():
    moves = Moves()
    for _ in range(50):
        moves = moves.after("train", each(*[both(1.0)] * 4, both(1e17)))
    assert moves.bound(None, "train").most[MODEL] == FACTOR
    assert len(moves.last[MODEL]) == max(KEPT, 10)


def of(spec_hash: str, far: float) -> Moved:
    return {MODEL: Move(far, 0, spec_hash)}


def test_who_trains_the_same_model_is_compared_with_each_other_where_that_allows_more():
    """Most train wide slices, which move by 1, three a narrow one, which moves by 30."""
    wide = {client: of("wide", 1.0) for client in range(7)}
    moves = Moves().after("train", wide | {client: of("narrow", 30.0) for client in (7, 8, 9)})
    bound = moves.bound(None, "train")
    assert bound.exceeded(of("narrow", FACTOR * 30)) is None
    reason = bound.exceeded(of("narrow", FACTOR * 30 + 1)) or ""
    assert "more than 50 times the median of the clients, which is 30" in reason
    for other in ("wide", "deep"):  # what is known of the narrow says nothing of these
        assert bound.exceeded(of(other, FACTOR)) is None
        assert bound.exceeded(of(other, FACTOR + 1)) is not None
    assert moves.bound(None, "grow") == Bound()


@pytest.mark.parametrize("narrow", [{8: 1e9, 9: 1e9}, {7: 0.0, 8: 0.0, 9: 0.0}])
def test_two_who_train_the_same_or_such_as_do_not_move_lift_no_bound(narrow):
    moves = Moves().after("train", {client: of("wide", 1.0) for client in range(6)})
    moves = moves.after("train", {client: of("narrow", far) for client, far in narrow.items()})
    assert moves.bound(None, "train").limit(MODEL, Move(1e9, 0, "narrow")) <= FACTOR


def test_a_rogue_that_is_asked_more_often_does_not_outweigh_those_with_its_model():
    moves = Moves().after("train", {1: of("narrow", 1.0), 2: of("narrow", 1.0)})
    for _ in range(50):
        moves = moves.after(
            "train", {3: of("narrow", 1e9)} | {c: of("wide", 1.0) for c in (4, 5, 6)}
        )
    assert moves.bound(None, "train").limit(MODEL, Move(1e9, 0, "narrow")) == FACTOR


def test_what_is_kept_of_moves_of_different_models_does_not_grow():
    moves = Moves()
    for number in range(10 * MODELS):
        moves = moves.after("train", {number: of(f"spec {number % (2 * MODELS)}", 1.0)})
    assert len(moves.alike) == MODELS
    for number in range(10 * KEPT_ALIKE):
        moves = moves.after("train", {number: of("one", 1.0)})
    assert max(map(len, moves.alike.values())) == KEPT_ALIKE
