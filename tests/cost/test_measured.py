"""Measured times: what they say by hand, how they replace the rates, and what is refused."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlean.core import Work
from fedlean.cost.measured import LayerTime, MeasuredTime, OperationTime, measured_from
from fedlean.cost.price import round_seconds
from fedlean.cost.profile import faster, from_document, load_profile, other_model, to_document
from fedlean.cost.time import forward_seconds, linear_round_time, step_seconds, work_seconds
from fedlean.cost.way import as_done
from fedlean.engine.pieces import Piece
from fedlean.layers import Linear
from fedlean.spec import sequential

SPEC = sequential((4,), [("fc1", Linear(5)), ("fc2", Linear(3))])  # 20 and 15 weights
SIZES = {"fc1.weight": 20, "fc2.weight": 15}
KEPT = {"fc1.weight": 3, "fc2.weight": 10}


def operation(constant, dense, fc1, fc2, full1=None, full2=None):
    layers = {"fc1.weight": LayerTime(fc1, full1, 0.5), "fc2.weight": LayerTime(fc2, full2, 1.0)}
    return OperationTime(constant, dense, layers)


MEASURED = MeasuredTime(
    model="mine",
    spec_hash=SPEC.hash,
    batch_size=10,
    session=operation(2.0, 4.0, 0.125, 0.25),
    step=operation(1.0, 8.0, 0.5, 1.0, full1=6.0, full2=7.0),
    forward=operation(0.5, 2.0, 0.25, 0.0),
    importance_seconds=1.5,
    dense_importance_seconds=0.25,
    conditions={"machine": "a board", "threads": 1},
)
# 2 bytes a second up, 4 down: a value costs 2 + 1 = 3 seconds both ways
PROFILE = replace(
    load_profile("generic"), uplink_bytes_per_s=2.0, downlink_bytes_per_s=4.0, measured=MEASURED
)


# By hand


def test_an_operation_is_linear_up_to_the_full_layer():
    step = MEASURED.step
    assert step.seconds({"fc1.weight": 3, "fc2.weight": 2}, SIZES) == 1 + 3 * 0.5 + 2 * 1.0
    # 20 · 0.5 and 15 · 1 are more than the layers were measured to take in full
    assert step.seconds({"fc1.weight": 20, "fc2.weight": 15}, SIZES) == 1 + 6 + 7
    assert step.seconds({"fc2.weight": 2}, SIZES) == 1 + 6 + 2  # without a mask: in full
    assert step.seconds({}, SIZES) == 8
    assert replace(step, dense_seconds=None).seconds({}, SIZES) == 14


def test_a_step_takes_the_shorter_way_and_grows_with_the_batch():
    few = {"fc1.weight": 2, "fc2.weight": 1}
    assert step_seconds(SPEC, few, 10, PROFILE) == 1 + 1 + 1
    assert step_seconds(SPEC, few, 20, PROFILE) == 6
    assert step_seconds(SPEC, KEPT, 10, PROFILE) == 8  # sparse: 1 + 1.5 + 7 = 9.5
    assert step_seconds(SPEC, {}, 10, PROFILE) == 8


def test_importance_costs_what_it_was_measured_to_cost():
    few = {"fc1.weight": 2, "fc2.weight": 1}
    assert step_seconds(SPEC, few, 10, PROFILE, importance=True) == 3 + 1.5
    assert step_seconds(SPEC, KEPT, 10, PROFILE, importance=True) == 8 + 0.25
    assert step_seconds(SPEC, {}, 10, PROFILE, importance=True) == 8.25


def test_a_piece_costs_its_share_of_it():
    """3 of 5 rows of fc1's 20 weights: 12 of all 35."""
    few, piece = {"fc1.weight": 2, "fc2.weight": 1}, (Piece("fc1.weight", 0, 3),)
    assert SPEC.param_shapes["fc1.weight"] == (5, 4)
    found = step_seconds(SPEC, few, 10, PROFILE, importance=piece)
    assert found == pytest.approx(3 + 1.5 * 12 / 35)


def test_inference():
    assert forward_seconds(SPEC, {"fc1.weight": 2, "fc2.weight": 1}, 30, PROFILE) == 3 * 1.0
    assert forward_seconds(SPEC, SIZES, 10, PROFILE) == 2  # not 0.5 + 20 · 0.25


def test_work_opens_one_session():
    few = {"fc1.weight": 2, "fc2.weight": 1}
    session = 2 + 2 * 0.125 + 1 * 0.25
    work = Work(3, 10, importance_steps=1, forward_examples=20, kept=few)
    assert work_seconds(SPEC, work, PROFILE) == session + 2 * 3 + 4.5 + 2 * 1.0
    assert work_seconds(SPEC, Work(0, 10, kept=few), PROFILE) == 0
    assert work_seconds(SPEC, Work(1, 10), PROFILE) == 4 + 8


def test_work_is_done_densely_where_that_is_shorter():
    work = Work(5, 10, kept=SIZES)  # masked: 2 + 2.5 + 3.75 to open, then dense steps
    assert as_done(SPEC, work, PROFILE).work.kept == {}


def test_frozen_layers_by_hand():
    """fc1 frozen: its forward pass is left, and of fc2's backward the half, no gradient flows on.

    Kept 2 and 4: fc1 2 · 0.25 instead of 2 · 0.5; fc2, forward free, 4 · 1 / 2.  Of 8 outputs 3
    take a gradient: 0.5 + 3/8 · (1 - 0.5).  Densely 2 + 6 · 15/50, where backward takes 20 + 15 +
    15.  Of 35 importances 15 are left.
    """
    few, frozen = {"fc1.weight": 2, "fc2.weight": 4}, frozenset({"fc1.weight", "fc1.bias"})
    sparse = 0.5 + 0.5 * 3 / 8 + 2 * 0.25 + 4 * 1.0 / 2
    dense = 2 + 6 * 15 / 50
    assert step_seconds(SPEC, few, 10, PROFILE, frozen=frozen) == pytest.approx(sparse)
    assert step_seconds(SPEC, {}, 20, PROFILE, frozen=frozen) == pytest.approx(2 * dense)
    many = step_seconds(SPEC, few, 10, PROFILE, importance=True, frozen=frozen)
    assert many == pytest.approx(min(sparse + 1.5 * 15 / 35, dense + 0.25 * 15 / 35))
    alone = step_seconds(SPEC, SIZES, 10, PROFILE, frozen=frozen, dense_too=False)
    assert alone == pytest.approx(0.6875 + 5 + 7 / 2)  # 20 · 0.25, and fc2 in full
    time = linear_round_time(SPEC, PROFILE, batch_size=20, local_steps=2, frozen=frozen)
    assert time.constant_seconds == pytest.approx(2 + 4 * 0.6875 + 8 * 3)
    assert time.seconds_per_weight == {
        "fc1.weight": 0.125 + 4 * 0.25 + 3,
        "fc2.weight": 0.25 + 4 * 0.5 + 3,
    }
    # all frozen: a forward pass; where nothing that trains is frozen, to the bit what it was
    everything = frozenset(SPEC.param_shapes)
    passed = forward_seconds(SPEC, few, 10, PROFILE)
    assert step_seconds(SPEC, few, 10, PROFILE, frozen=everything) == passed
    assert step_seconds(SPEC, {}, 10, PROFILE, importance=True, frozen=everything) == 2
    biases = frozenset({"fc1.bias"})
    assert step_seconds(SPEC, few, 10, PROFILE, frozen=biases) == 1 + 1 + 4


def test_the_linear_round_by_hand():
    """Two steps of 20 examples cost four of those measured; 8 biases travel."""
    time = linear_round_time(SPEC, PROFILE, batch_size=20, local_steps=2)
    assert time.constant_seconds == 2 + 4 * 1 + 8 * 3
    assert time.seconds_per_weight == {
        "fc1.weight": 0.125 + 4 * 0.5 + 3,
        "fc2.weight": 0.25 + 4 * 1.0 + 3,
    }


def test_the_device_round_by_hand():
    few = {"fc1.weight": 2, "fc2.weight": 1}
    seconds = round_seconds(SPEC, few, PROFILE, batch_size=10, local_steps=2)
    assert seconds == 2.5 + 2 * 3 + (3 + 8) * 3
    # with all weights the dense round is the shorter: 4 + 2 · 8, not 8.25 + 2 · 8
    full = round_seconds(SPEC, SIZES, PROFILE, batch_size=10, local_steps=2)
    assert full == 4 + 16 + (35 + 8) * 3


counts = st.fixed_dictionaries({name: st.integers(0, size) for name, size in SIZES.items()})


@settings(deadline=None, max_examples=60)
@given(counts, st.sampled_from(sorted(SIZES)), st.integers(1, 40), st.integers(0, 5))
def test_the_device_round_is_monotone(kept, name, batch_size, local_steps):
    if kept[name] == SIZES[name]:
        return
    more = {**kept, name: kept[name] + 1}
    low, high = (
        round_seconds(SPEC, k, PROFILE, batch_size=batch_size, local_steps=local_steps)
        for k in (kept, more)
    )
    assert low < high


# Another model


def test_another_model_takes_the_rates():
    other = sequential((4,), [("fc1", Linear(5)), ("fc2", Linear(2))])
    plain = replace(PROFILE, measured=None)
    kept = {"fc1.weight": 1, "fc2.weight": 1}
    for spec, measured_counts in ((other, False), (SPEC, True)):
        same = step_seconds(spec, kept, 10, PROFILE) == step_seconds(spec, kept, 10, plain)
        assert same != measured_counts
    assert linear_round_time(other, PROFILE, batch_size=1, local_steps=1) == linear_round_time(
        other, plain, batch_size=1, local_steps=1
    )
    line = other_model(PROFILE, other)
    assert line and "(mine)" in line and "\n" not in line
    assert other_model(PROFILE, SPEC) is None
    assert other_model(plain, SPEC) is None


@pytest.mark.parametrize("name", ["session", "step", "forward"])
def test_layers_that_are_not_the_models_are_named(name):
    layers = {"fc1.weight": LayerTime(1.0, None, 1.0), "conv9.weight": LayerTime(1.0, None, 1.0)}
    wrong = replace(getattr(MEASURED, name), layers=layers)
    profile = replace(PROFILE, measured=replace(MEASURED, **{name: wrong}))
    with pytest.raises(ValueError, match=r"differ in conv9\.weight, fc2\.weight"):
        step_seconds(SPEC, {}, 1, profile)
    with pytest.raises(ValueError, match=r"conv9\.weight"):
        other_model(profile, SPEC)


# The file


def document() -> dict[str, Any]:
    return json.loads(json.dumps(to_document(PROFILE)))


def test_round_trip(tmp_path):
    path = tmp_path / "board"  # any file name will do
    path.write_text(json.dumps({**to_document(PROFILE), "derivation": {"points": []}}))
    assert load_profile(str(path)) == PROFILE
    assert from_document(document()) == PROFILE
    assert measured_from(json.loads(json.dumps(asdict(MEASURED)))) == MEASURED


def test_a_dense_model_that_did_not_fit_is_null():
    given = document()
    given["measured"]["step"]["dense_seconds"] = None
    loaded = from_document(given).measured
    assert loaded is not None and loaded.step.dense_seconds is None


NUMBERS = [
    ("importance_seconds",),
    ("dense_importance_seconds",),
    ("step", "constant_seconds"),
    ("session", "dense_seconds"),
    ("forward", "layers", "fc1.weight", "seconds_per_weight"),
    ("step", "layers", "fc2.weight", "full_seconds"),
]


@pytest.mark.parametrize("path", NUMBERS, ids=lambda path: path[-1])
@pytest.mark.parametrize("value", [-1e-9, float("nan"), float("inf"), True, "5", [], 10**400])
def test_a_bad_number_names_its_place(path, value):
    given = document()
    inner = given["measured"]
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(ValueError) as error:
        from_document(given)
    where = [key for key in path if key != "layers"]
    assert ".".join(["measured", *where]) in str(error.value)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("value", [1.5, float("nan"), None, "1"])
def test_r_squared_is_at_most_1(value):
    given = document()
    given["measured"]["step"]["layers"]["fc1.weight"]["r_squared"] = value
    with pytest.raises(ValueError, match=r"measured\.step\.fc1\.weight\.r_squared"):
        from_document(given)


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "20", None])
def test_batch_size_is_a_count(value):
    given = document()
    given["measured"]["batch_size"] = value
    with pytest.raises(ValueError, match=r"measured\.batch_size"):
        from_document(given)


@pytest.mark.parametrize("path", [("step",), ("step", "layers"), ("step", "layers", "fc1.weight")])
@pytest.mark.parametrize("value", [None, 3, [], "text"])
def test_objects_must_be_objects(path, value):
    given = document()
    inner = given["measured"]
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(ValueError, match=r"measured\.step"):
        from_document(given)


@pytest.mark.parametrize("value", [3, [], "text", {}, {"model": "x"}])
def test_measured_must_be_whole(value):
    with pytest.raises(ValueError, match="measured"):
        from_document({**document(), "measured": value})


@pytest.mark.parametrize("key", list(asdict(MEASURED)))
def test_missing_and_unknown_fields_are_named(key):
    given = document()
    del given["measured"][key]
    with pytest.raises(ValueError, match=rf"missing \['{key}'\]"):
        from_document(given)
    with pytest.raises(ValueError, match=r"unknown \['more'\]"):
        from_document({**document(), "measured": {**document()["measured"], "more": 1}})


@pytest.mark.parametrize("value", [None, [], {"a": None}, {"a": []}])
def test_conditions_are_texts_and_numbers(value):
    given = document()
    given["measured"]["conditions"] = value
    with pytest.raises(ValueError, match="conditions"):
        from_document(given)


@pytest.mark.parametrize("kept", [{}, KEPT])
def test_twice_as_fast_a_device_takes_half_of_what_was_measured(kept):
    for work in (Work(3, 20, 1, kept=kept), Work(forward_examples=40, kept=kept)):
        seconds, half = (work_seconds(SPEC, work, each) for each in (PROFILE, faster(PROFILE, 2)))
        assert half == seconds / 2
