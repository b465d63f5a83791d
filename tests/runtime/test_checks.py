"""Updates that the server must not take: each refused with its reason, and the round goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from federation import SPEC, Around, first_model, fresh_dispatch, params, run, same, server

from fedlean.algorithm import FederatedAlgorithm
from fedlean.core import (
    ClientTask,
    ClientUpdate,
    Statistic,
    StatisticForm,
    SubModel,
    Work,
)
from fedlean.methods import fedavg, prunefl
from fedlean.pruning.density import full_masks
from fedlean.runtime.checks import MAX_EXAMPLES, Expected, refusal
from fedlean.runtime.clientstore import ClientStore
from fedlean.runtime.record import StepRecord
from fedlean.runtime.rounds import LoopState
from fedlean.tree import apply_mask, pack, unpack

POISONED = 1
MASKS = {
    name: np.arange(params()[name].size).reshape(params()[name].shape) % 3 > 0
    for name in ("conv.weight", "fc1.weight")
}
OTHER = {name: ~mask for name, mask in MASKS.items()}
Poison = Callable[[ClientUpdate], ClientUpdate]


def with_value(name: str, value: float) -> Poison:
    def poison(update: ClientUpdate) -> ClientUpdate:
        values = update.params[name].copy()
        values.flat[-1] = value
        return replace(update, params={**update.params, name: values})

    return poison


def with_tensor(name: str, values: np.ndarray) -> Poison:
    return lambda update: replace(update, params={**update.params, name: values})


def with_statistic(name: str, values: np.ndarray) -> Poison:
    zeros = {name: np.zeros(shape, np.float32) for name, shape in SPEC.param_shapes.items()}
    statistic = {"importance": Statistic({**zeros, name: values}, "mean")}
    return lambda update: replace(update, statistics=statistic)


def as_a_sum(update: ClientUpdate) -> ClientUpdate:
    statistic = replace(update.statistics["importance"], reduction="sum")
    return replace(update, statistics={"importance": statistic})


def other_statistic(update: ClientUpdate) -> ClientUpdate:
    return replace(update, statistics={**update.statistics, "else": Statistic({}, "mean")})


def no_statistic(update: ClientUpdate) -> ClientUpdate:
    return replace(update, statistics={})


def importance_of_one_tensor(update: ClientUpdate) -> ClientUpdate:
    statistic = Statistic({"fc1.bias": np.zeros(12, np.float32)}, "mean")
    return replace(update, statistics={"importance": statistic})


def without(name: str) -> Poison:
    return lambda update: replace(
        update, params={key: value for key, value in update.params.items() if key != name}
    )


def claiming(examples: int) -> Poison:
    return lambda update: replace(update, num_examples=examples)


def other_pattern(update: ClientUpdate) -> ClientUpdate:
    return replace(update, params=apply_mask(params(), OTHER), sub_model=SubModel(masks=OTHER))


def no_pattern(update: ClientUpdate) -> ClientUpdate:
    return replace(update, params=params(), sub_model=SubModel())


def other_frozen(update: ClientUpdate) -> ClientUpdate:
    held = replace(update.sub_model, frozen=frozenset(SPEC.tensor_shapes) - {"fc2.bias"})
    return replace(update, sub_model=held, params={"fc2.bias": update.params["fc2.bias"]})


def outside_mask(update: ClientUpdate) -> ClientUpdate:
    values = unpack(update.params["fc1.weight"], MASKS["fc1.weight"])
    values[~MASKS["fc1.weight"]] = 1e-3
    return replace(update, params={**update.params, "fc1.weight": values})


BIAS = np.zeros(12, np.float32)
INFINITE = np.full(12, np.inf, np.float32)
# what is wrong -> (how, what the reason says); these go for every method
PLAIN: dict[str, tuple[Poison, str]] = {
    "nan": (with_value("fc2.weight", np.nan), "'fc2.weight' with values that are not finite"),
    "inf": (with_value("fc1.bias", np.inf), "'fc1.bias' with values that are not finite"),
    "-inf": (with_value("conv.bias", -np.inf), "'conv.bias' with values that are not finite"),
    "shorter": (with_tensor("fc1.bias", BIAS[:-1]), "'fc1.bias' with shape (11,), expected (12,)"),
    "flat": (with_tensor("fc2.weight", np.zeros(36, np.float32)), "expected (3, 12)"),
    "scalar": (with_tensor("fc1.bias", np.zeros((), np.float32)), "expected (12,)"),
    "unknown": (with_tensor("fc9.bias", BIAS), "'fc9.bias', which the model lacks"),
    "no examples": (claiming(0), "claims 0 examples"),
    "negative": (claiming(-5), "claims -5 examples"),
    "absurd": (claiming(10**10), "claims 10000000000 examples"),
    "beyond the header": (claiming(10**30), f"expected 1 to {MAX_EXAMPLES}"),
    "statistic": (with_statistic("fc1.bias", INFINITE), "importance of 'fc1.bias'"),
    "negative importance": (with_statistic("fc1.bias", BIAS - 1), "'fc1.bias' below 0"),
    "whole numbers": (
        with_statistic("fc1.bias", BIAS.astype(np.int64)),
        "of int64, expected float",
    ),
    "sum": (as_a_sum, "as a sum, expected a mean"),
    "unasked": (other_statistic, "the statistics else, importance, expected importance"),
    "unsent": (no_statistic, "the statistics none, expected importance"),
    "partial importance": (importance_of_one_tensor, "of 1 tensors, expected conv.bias"),
    "lacks a tensor": (without("fc2.bias"), "lacks fc2.bias"),
    "frozen": (other_frozen, "other frozen tensors"),
}
MASKED: dict[str, tuple[Poison, str]] = {
    "outside its mask": (outside_mask, "'fc1.weight' with values outside its mask"),
    "other pattern": (other_pattern, "trained the pattern"),
    "no pattern": (no_pattern, "trained the pattern"),
}
# what cannot even travel; in this process it must not stop the run either
UNSENDABLE: dict[str, Poison] = {
    "double precision": with_tensor("fc1.bias", BIAS.astype(np.float64)),
    "metric": lambda update: replace(update, metrics={"train_loss": float("nan")}),
    "work": lambda update: replace(update, work=(Work(steps=-3),)),
    "statistic's shape": with_statistic("fc1.weight", np.zeros(3, np.float32)),
}
FORMS = {"importance": StatisticForm(SPEC.param_shapes, non_negative=True)}
ASKED = Expected(FORMS)
EVERY = {name: poison for name, (poison, _) in {**PLAIN, **MASKED}.items()} | UNSENDABLE


def task(masks) -> ClientTask:
    return ClientTask(
        1, "train", POISONED, 5, SPEC, apply_mask(params(), masks), SubModel(masks=masks), {}
    )


def answer(masks) -> ClientUpdate:
    asked = task(masks)
    zeros = {name: np.zeros(shape, np.float32) for name, shape in SPEC.param_shapes.items()}
    statistics = {"importance": Statistic(zeros, "mean")}
    return ClientUpdate(POISONED, 40, asked.params, asked.sub_model, statistics)


@pytest.mark.parametrize("masks", [{}, MASKS], ids=["dense", "masked"])
@pytest.mark.parametrize("name", PLAIN)
def test_reason(name, masks):
    poison, reason = PLAIN[name]
    assert refusal(answer(masks), task(masks), ASKED) is None
    assert reason in (refusal(poison(answer(masks)), task(masks), ASKED) or "")


@pytest.mark.parametrize("name", MASKED)
def test_reason_under_a_mask(name):
    poison, reason = MASKED[name]
    assert reason in (refusal(poison(answer(MASKS)), task(MASKS), ASKED) or "")


def test_statistic_of_another_shape():
    poison = UNSENDABLE["statistic's shape"]
    assert "importance of 'fc1.weight'" in (refusal(poison(answer({})), task({}), ASKED) or "")


def test_a_packed_statistic_has_as_many_values_as_its_mask_keeps():
    asked, update = task({}), replace(answer({}), statistics={})
    form = {"importance": StatisticForm({"c": (2, 3)}, non_negative=True)}
    mask = np.array([[True, False, True], [False, False, False]])

    def reason(values, mask):
        packed = Statistic({"c": np.asarray(values, np.float32)}, "mean", {"c": mask})
        sent = replace(update, statistics={"importance": packed})
        return refusal(sent, asked, Expected(form))

    assert reason([1, 2], mask) is None
    assert reason(np.ones((2, 3)), mask) is None, "dense all the same"
    assert "shape (3,)" in str(reason([1, 2, 3], mask))
    assert "a mask of bool (3, 2)" in str(reason([1, 2], mask.T))
    assert "a mask of int64" in str(reason([1, 2], mask.astype(np.int64)))
    assert "below 0" in str(reason([1, -2], mask))


def test_importance_of_other_pieces_is_no_answer():
    asked, update = task({}), replace(answer({}), statistics={})
    ordered = Work(2, 8, importance_steps=2, piece_bytes=1000, first_piece=2)
    claims = {
        "other pieces": replace(ordered, first_piece=0),
        "of other": replace(ordered, piece_bytes=2000, first_piece=0),
        "than it was asked for": replace(ordered, piece_bytes=0, first_piece=0),
    }
    for word, claim in claims.items():
        reason = refusal(replace(update, work=(claim,)), asked, Expected(work=(ordered,)))
        assert reason is not None and word in reason
    assert refusal(replace(update, work=(ordered,)), asked, Expected(work=(ordered,))) is None
    for unpriced in (replace(ordered, first_piece=4), replace(ordered, piece_bytes=8)):
        reason = refusal(replace(update, work=(unpriced,)), asked, Expected())
        assert reason is not None and "g² of no pieces" in reason


def test_a_statistic_beyond_its_limit():
    """One number may undo a model that is made of such numbers."""
    forms = {"importance": replace(FORMS["importance"], limit=10.0)}
    poison = with_statistic("fc1.weight", np.full(SPEC.param_shapes["fc1.weight"], 10, np.float32))
    assert refusal(poison(answer({})), task({}), Expected(forms)) is None
    poison = with_statistic("fc1.weight", np.full(SPEC.param_shapes["fc1.weight"], 11, np.float32))
    reason = refusal(poison(answer({})), task({}), Expected(forms)) or ""
    assert "'fc1.weight' with values beyond ±10" in reason


def with_masks(masks) -> ClientUpdate:
    return replace(answer({}), params=pack(params(), masks), sub_model=SubModel(masks=masks))


def test_masks_where_none_were_given():
    """Not even of all weights: a method that gave none reads the values as they are in the task."""
    reason = refusal(with_masks(full_masks(SPEC)), task({}), ASKED) or ""
    assert reason == "holds masks of 3 tensors, and was given none"


def test_masks_that_a_client_may_choose_are_of_all_weights():
    asked = replace(ASKED, own_masks=True)
    some = {"fc1.weight": MASKS["fc1.weight"]}
    assert "masks of 1 of 3 prunable" in (refusal(with_masks(some), task({}), asked) or "")
    assert refusal(with_masks({**full_masks(SPEC), **some}), task({}), asked) is None


def test_no_values_are_an_answer_where_statistics_are_or_masks_are_being_chosen():
    silent = replace(answer({}), params={})
    assert refusal(silent, task({}), ASKED) is None
    silent = replace(silent, statistics={})
    assert (refusal(silent, task({}), Expected()) or "").startswith("lacks conv.bias")
    assert refusal(silent, task({}), Expected(own_masks=True)) is None
    frozen = SubModel(frozen=frozenset(SPEC.tensor_shapes))
    nothing = replace(task({}), sub_model=frozen)
    assert refusal(replace(silent, sub_model=frozen), nothing, Expected()) is None


@pytest.mark.parametrize("examples", [1, MAX_EXAMPLES])
def test_bounds_of_the_example_count(examples):
    assert refusal(claiming(examples)(answer({})), task({}), ASKED) is None


def test_an_equal_pattern_in_another_object_is_taken():
    copied = {name: mask.copy() for name, mask in reversed(MASKS.items())}
    update = replace(answer(MASKS), sub_model=SubModel(masks=copied))
    assert refusal(update, task(MASKS), ASKED) is None


def test_negative_zero_outside_the_mask_is_zero():
    values = np.where(MASKS["fc1.weight"], params()["fc1.weight"], np.float32(-0.0))
    assert refusal(with_tensor("fc1.weight", values)(answer(MASKS)), task(MASKS), ASKED) is None


# In a round


def algorithm() -> FederatedAlgorithm:
    """Its next round, the second, asks for importance."""
    return prunefl.prunefl(
        server(3), local_steps=2, initial_pruning=False, reconfigure_every=2, importance_rounds=1
    )


def one_step(change) -> tuple[object, StepRecord]:
    records: list[StepRecord] = []
    states: list[object] = []
    method = algorithm()
    state = replace(method.init(first_model()), params=apply_mask(params(), MASKS), masks=MASKS)

    def watch(progress: LoopState, record: StepRecord) -> None:
        states.append(progress.state)
        records.append(record)

    run(
        method._replace(done=lambda state: state.round >= 2),
        dispatch=Around(fresh_dispatch(method), change),
        progress=LoopState(replace(state, round=1), ClientStore()),
        watch=watch,
    )
    return states[0], records[0]


@pytest.fixture(scope="module")
def without():
    """The step in which the poisoned client does not answer."""
    return one_step(lambda tasks, updates: [u for u in updates if u.client != POISONED])


@pytest.mark.parametrize("late", [False, True], ids=["in order", "others early"])
@pytest.mark.parametrize("name", EVERY)
def test_the_round_goes_on_without_it(name, late, without):
    expected, _ = without

    def change(tasks, updates):
        changed = [EVERY[name](u) if u.client == POISONED else u for u in updates]
        return reversed(changed) if late else changed

    state, record = one_step(change)
    assert list(record.refused) == [POISONED]
    assert record.answered == [0, 2, 3]
    assert record.attempts == 1
    reason = {**PLAIN, **MASKED}.get(name, (None, ""))[1]
    assert reason in record.refused[POISONED] and "\n" not in record.refused[POISONED]
    assert all(np.isfinite(value).all() for value in state.params.values())
    assert same(state, expected)
    assert set(record.metrics) == {"train_loss"} and np.isfinite(record.metrics["train_loss"])


def test_a_refused_client_keeps_its_committed_state(without):
    """What it holds between rounds is not moved on by an update that was not taken."""
    method = fedavg.fedavg(server(1))
    taken: list[list[int]] = []
    dispatch = Around(
        fresh_dispatch(method),
        lambda tasks, updates: [claiming(0)(u) if u.client == POISONED else u for u in updates],
    )
    dispatch.acknowledge = lambda clients, refused: taken.append([*clients, *refused])
    store = ClientStore()
    run(method, dispatch=dispatch, rounds=1, progress=LoopState(method.init(first_model()), store))
    assert taken == [[0, 2, 3, POISONED]]
    assert not store.known(POISONED).specs and store.known(0).specs == {SPEC.hash}


def test_everybody_refused_costs_the_step_and_the_round_is_asked_in_the_next():
    """In the same step the same client would train the same on the same task."""
    records: list[StepRecord] = []
    calls = []

    def change(tasks, updates):
        calls.append(len(tasks))
        poison = EVERY["nan"]
        return [poison(u) for u in updates] if len(calls) == 1 else updates

    method = fedavg.fedavg(server(2), local_steps=2)
    state = run(
        method,
        dispatch=Around(fresh_dispatch(method), change),
        rounds=2,
        watch=lambda progress, record: records.append(record),
    )
    assert calls == [4, 4, 4] and [record.attempts for record in records] == [1, 1, 1]
    assert [record.answered for record in records] == [[], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert [record.tasks[0].round for record in records] == [1, 1, 2]
    assert sorted(records[0].rejected) == [0, 1, 2, 3] and not records[1].rejected
    assert state.round == 2
