"""The fit: by hand, and exact on times that are linear."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from measure.fake import FORWARD, SIZES, SPEC, STEP, TICK, Engine

from fedlean.measure.cases import plan
from fedlean.measure.fit import Line, fit_line, fit_operation
from fedlean.measure.survey import survey
from fedlean.measure.visit import Setting


def test_a_line_by_hand():
    """Means 1 and 1; slope (1·1) / 2; left over -0.5, 1, -0.5 of 1, 1, 0 squared: 1 - 1.5 / 2."""
    assert fit_line([0, 1, 2], [0, 2, 1]) == Line(slope=0.5, intercept=0.5, r_squared=0.25)


def test_a_falling_line_has_no_slope():
    assert fit_line([0, 1, 2], [2, 1, 0]) == Line(slope=0.0, intercept=1.0, r_squared=0.0)


@pytest.mark.parametrize(("x", "y"), [([3, 3], [1, 2]), ([1, 2], [5, 5])])
def test_nothing_that_varies(x, y):
    assert fit_line(x, y) == Line(0.0, sum(y) / 2, 0.0)


@given(
    st.floats(0, 1e3),
    st.floats(0, 1e3),
    st.lists(st.integers(0, 10**7), min_size=3, max_size=9, unique=True),
)
def test_a_line_comes_back(slope, intercept, x):
    line = fit_line(x, [intercept + slope * value for value in x])
    assert line.slope == pytest.approx(slope, rel=1e-6, abs=1e-9)
    assert line.intercept == pytest.approx(intercept, rel=1e-6, abs=1e-6 * (1 + slope * max(x)))


@pytest.fixture(scope="module")
def surveyed():
    engine = Engine()
    return survey(
        engine,
        SPEC,
        plan(SPEC, (1.0, 0.5, 0.2, 0.1)),
        Setting(4, 5),
        repeats=1,
        budget_seconds=1e9,
        clock=engine.clock,
        available=lambda: None,
    )


def test_coefficients_of_an_operation_come_back(surveyed):
    """Linear below half, three quarters of the line in full: as the fake engine's costs."""
    fit = fit_operation(surveyed, lambda point: point.step)
    assert fit.constant_seconds == pytest.approx(1000 * TICK, rel=1e-6)
    for name, layer in fit.layers.items():
        assert layer.seconds_per_weight == pytest.approx(STEP[name], rel=1e-9)
        assert layer.full_seconds == pytest.approx(0.75 * STEP[name] * SIZES[name], rel=1e-6)
        assert layer.r_squared == pytest.approx(1, abs=1e-12)
    dense = 1000 * TICK + sum(0.75 * STEP[name] * size for name, size in SIZES.items())
    assert fit.dense_seconds == pytest.approx(dense, rel=1e-12)


def test_a_layer_that_costs_nothing(surveyed):
    fit = fit_operation(surveyed, lambda point: point.forward)
    assert fit.layers["fc1.weight"].seconds_per_weight == pytest.approx(0, abs=1e-15)
    assert fit.layers["fc1.weight"].full_seconds == pytest.approx(0, abs=1e-9)
    assert fit.layers["conv.weight"].seconds_per_weight == pytest.approx(FORWARD["conv.weight"])


def test_a_constant_below_zero_is_zero(surveyed):
    """An operation that only the 30th part of the weights costs is no line through the origin."""

    def seconds(point):
        return max(0.0, point.kept.get("fc1.weight", 0) - 3000) * TICK

    assert fit_operation(surveyed, seconds).constant_seconds == 0


def test_full_layers_that_were_not_measured():
    engine = Engine()
    result = survey(
        engine,
        SPEC,
        plan(SPEC, (0.5, 0.2, 0.1)),
        Setting(4, 5),
        repeats=1,
        budget_seconds=1e9,
        clock=engine.clock,
        available=lambda: None,
    )
    fit = fit_operation(result, lambda point: point.step)
    assert all(layer.full_seconds is None for layer in fit.layers.values())
    assert fit.dense_seconds is not None
