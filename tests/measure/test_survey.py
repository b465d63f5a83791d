"""The measuring itself, on an engine whose costs are known."""

from __future__ import annotations

import pytest
from measure.fake import FORWARD, NEW_MASKS, OPEN, SIZES, SPEC, STEP, TICK, Engine, seconds

from fedlean.measure.cases import plan
from fedlean.measure.survey import MEMORY_MARGIN, survey
from fedlean.measure.visit import Setting, visit

DENSITIES = (1.0, 0.5, 0.2, 0.1)
PLAN = plan(SPEC, DENSITIES)
SETTING = Setting(batch_size=4, local_steps=5)


def surveyed(repeats=2, budget_seconds=1e9, available=lambda: None, **more):
    engine = Engine()
    result = survey(
        engine,
        SPEC,
        PLAN,
        SETTING,
        repeats=repeats,
        budget_seconds=budget_seconds,
        clock=engine.clock,
        available=available,
        **more,
    )
    return engine, result


def test_a_visit_by_hand():
    engine = Engine()
    one = visit(engine, SPEC, PLAN.base, SETTING, engine.clock, importance=True)
    step = seconds(STEP, 1000 * TICK, one.kept)
    session = seconds(OPEN, 100 * TICK, one.kept) + (7 + 3) * TICK  # a cold step, reading back
    assert one.step == pytest.approx(step, rel=1e-12)
    assert one.session == pytest.approx(session, rel=1e-9)
    assert one.round == pytest.approx(session + 5 * step, rel=1e-12)
    assert one.new_masks == pytest.approx(NEW_MASKS, rel=1e-9)  # once, and in no other figure
    assert one.forward == pytest.approx(seconds(FORWARD, 10 * TICK, one.kept), rel=1e-12)
    assert one.importance == pytest.approx(step + 5000 * TICK, rel=1e-12)
    assert (engine.alive, engine.most_alive) == (0, 1)


def test_of_a_visits_tries_the_fastest_counts():
    """Another process that doubles every other call changes nothing."""
    engine = Engine()
    plain = visit(engine, SPEC, PLAN.base, SETTING, engine.clock)
    disturbed, calls = Engine(), 0

    def clock():
        nonlocal calls
        calls += 1
        if calls % 4 == 0:
            disturbed.clock.now += 1 * TICK
        return disturbed.clock.now

    assert visit(disturbed, SPEC, PLAN.base, SETTING, clock).step == plain.step


def test_every_case_is_visited_in_turns():
    engine, result = surveyed(repeats=3)
    assert [point.case for point in result.points] == list(PLAN.cases)
    assert all(point.visits == 3 for point in result.points)
    assert result.left_out == ()
    assert engine.most_alive == 1
    with_importance = [p.case for p in result.points if p.importance is not None]
    assert with_importance == [PLAN.dense, PLAN.base]


def test_passes_alternate_their_direction():
    told = []
    surveyed(repeats=2, tell=lambda what, done, planned: told.append((what, done, planned)))
    names, count = [what for what, _, _ in told], len(PLAN.cases)
    assert names[:count] == [str(case) for case in PLAN.cases]
    assert names[count:] == names[:count][::-1]
    assert [(done, planned) for _, done, planned in told] == [
        (i, 2 * count) for i in range(2 * count)
    ]


def times_of_visits() -> list[float]:
    """When each visit of one pass begins."""
    engine, began = Engine(), []
    survey(
        engine,
        SPEC,
        PLAN,
        SETTING,
        repeats=1,
        budget_seconds=1e9,
        clock=engine.clock,
        available=lambda: None,
        tell=lambda *_: began.append(engine.clock.now),
    )
    return began


def test_a_budget_leaves_the_least_useful_out_and_says_so():
    began = times_of_visits()
    _, result = surveyed(repeats=1, budget_seconds=began[PLAN.needed + 1])
    assert len(result.points) == PLAN.needed + 2
    assert [point.case for point in result.points] == list(PLAN.cases[: PLAN.needed + 2])
    (line,) = result.left_out
    missing = len(PLAN.cases) - PLAN.needed - 2
    assert f"no time for {missing} of {len(PLAN.cases)} sub-models" in line
    assert str(PLAN.cases[PLAN.needed + 2]) in line


def test_a_budget_leaves_repeats_out_and_says_so():
    began = times_of_visits()
    _, result = surveyed(repeats=3, budget_seconds=2.5 * began[-1])
    assert len(result.points) == len(PLAN.cases)
    assert min(point.visits for point in result.points) == 2
    (line,) = result.left_out
    assert "all 3 repeats" in line and "2 times" in line


def test_a_budget_too_short_for_a_fit_is_refused():
    began = times_of_visits()
    with pytest.raises(ValueError, match=rf"was enough for 3 of the {PLAN.needed} ") as error:
        surveyed(budget_seconds=began[2])
    assert "allow at least" in str(error.value)


def test_what_memory_has_no_room_for_is_left_out():
    """Bytes a weight: 4 in the values to open with, 4 in the session, 4 of importance sums.

    The middle density needs 4 of importance, 1 of mask and a fifth of what is kept.
    """
    _, result = surveyed(available=lambda: MEMORY_MARGIN * 11 * SPEC.num_params)
    cases = [point.case for point in result.points]
    assert PLAN.dense not in cases and PLAN.base in cases
    assert any("fc1.weight at 1" in line and "memory" in line for line in result.left_out)
    assert any("the dense model: too little memory" in line for line in result.left_out)


def test_too_little_memory_for_the_sparse_range_is_refused():
    with pytest.raises(ValueError, match=r"too little memory to measure all layers at 0\.2"):
        surveyed(available=lambda: 20_000)


def test_points_by_layer_and_by_density():
    _, result = surveyed(repeats=1)
    for name in SIZES:
        counts = [point.kept[name] for point in result.varying(name)]
        assert len(counts) == 4 and counts == sorted(counts) and counts[-1] == SIZES[name]
    assert [point.case.density for point in result.uniform()] == [0.1, 0.2, 0.5, 1.0]
