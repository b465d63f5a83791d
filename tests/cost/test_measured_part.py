"""Times measured on a model, shared out to its spans: by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedlean.core import Work
from fedlean.cost.measured import LayerTime, MeasuredTime, OperationTime
from fedlean.cost.measured_part import profile_of_part
from fedlean.cost.profile import load_profile
from fedlean.cost.time import work_seconds
from fedlean.layers import Linear, ReLU
from fedlean.spans import span
from fedlean.spec import sequential

# activations 5, 5, 3; weights 20 and 15 with biases 25 and 18
SPEC = sequential((4,), [("fc1", Linear(5)), ("relu", ReLU()), ("fc2", Linear(3))])
FIRST, REST = span(SPEC, "", "relu"), span(SPEC, "relu")


def operation(constant, dense, fc1, fc2, full1=None, full2=None):
    layers = {"fc1.weight": LayerTime(fc1, full1, 0.5), "fc2.weight": LayerTime(fc2, full2, 1.0)}
    return OperationTime(constant, dense, layers)


MEASURED = MeasuredTime(
    model="mine",
    spec_hash=SPEC.hash,
    batch_size=10,
    session=operation(4.3, 8.6, 0.125, 0.25),
    step=operation(13.0, 17.0, 0.5, 1.0, full1=6.0, full2=7.0),
    forward=operation(1.3, 7.0, 0.25, 0.5, full1=3.0, full2=4.0),
    importance_seconds=7.0,
    dense_importance_seconds=3.5,
    conditions={},
)
PROFILE = replace(load_profile("generic"), measured=MEASURED)


def part(spec):
    measured = profile_of_part(PROFILE, SPEC, spec).measured
    assert measured is not None and measured.of(spec)
    return measured


def test_the_beginning():
    """10 of 13 activations, 25 of 43 values, 20 of 35 weights forward; of a step 40 of 85."""
    of = part(FIRST)
    assert of.session == OperationTime(
        pytest.approx(2.5), pytest.approx(5.0), {"fc1.weight": LayerTime(0.125, None, 0.5)}
    )
    assert of.forward.constant_seconds == pytest.approx(1.0)
    assert of.forward.dense_seconds == pytest.approx(4.0)
    assert of.step.constant_seconds == pytest.approx(10.0)
    assert of.step.dense_seconds == pytest.approx(17 * 40 / 85)
    assert of.step.layers == {"fc1.weight": LayerTime(0.5, 6.0, 0.5)}  # nothing is left out
    assert of.importance_seconds == pytest.approx(4.0)
    assert of.dense_importance_seconds == pytest.approx(2.0)


def test_the_rest_takes_no_gradient_of_its_input():
    """fc2 does two passes of three: of the 0.5 and 3 seconds of its backward pass a half."""
    of = part(REST)
    assert of.step.layers == {"fc2.weight": LayerTime(0.75, 5.5, 1.0)}
    assert of.step.dense_seconds == pytest.approx(17 * 30 / 85)
    assert of.forward.layers == {"fc2.weight": LayerTime(0.5, 4.0, 1.0)}
    assert of.forward.constant_seconds == pytest.approx(0.3)


def test_the_parts_of_a_forward_pass_are_the_whole():
    for kept in ({}, {"fc1.weight": 4, "fc2.weight": 3}):
        whole, *parts = (
            work_seconds(SPEC, Work(0, 10, forward_examples=30, kept=kept, **given), PROFILE)
            for given in ({}, {"end": "relu"}, {"begin": "relu"})
        )
        assert sum(parts) == pytest.approx(whole)


def test_a_model_that_was_not_measured():
    other = sequential((4,), [("a", Linear(5)), ("b", Linear(3))])
    assert profile_of_part(PROFILE, other, span(other, "a")) is PROFILE
    assert profile_of_part(PROFILE, SPEC, SPEC) is PROFILE
    unmeasured = replace(PROFILE, measured=None)
    assert profile_of_part(unmeasured, SPEC, REST) is unmeasured


def test_a_slice_is_another_model_that_was_not_measured():
    half, rates = Work(2, 4, width=0.5), replace(PROFILE, measured=None)
    assert work_seconds(SPEC, half, PROFILE) == work_seconds(SPEC, half, rates)
    assert work_seconds(SPEC, Work(2, 4), PROFILE) != work_seconds(SPEC, Work(2, 4), rates)
