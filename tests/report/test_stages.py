"""Stretches of stages, their table and the borders between them, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlean.report.borders import borders
from fedlean.report.run_folder import Run, able_shares, memories
from fedlean.report.stage_table import stage_rows, stages_section
from fedlean.report.stages import bordered, stages_notes, stretches, take_turns
from fedlean.report.tables import mean_memory, median_memory, participation, summary_rows

KB = 1000


def run_of(rows: list[dict[str, Any]]) -> Run:
    return Run("a", Path("a"), {}, rows, None)


def step(round: int, stage: str | None, phase: str = "train", **values: Any) -> dict[str, Any]:
    return {"round": round, "stage": stage, "phase": phase, "cohort": [1], **values}


def spans(run: Run) -> list[tuple[str, int, int]]:
    return [(one.name, one.begin, one.end) for one in stretches(run)]


def test_an_old_run_and_one_without_stages_have_no_stretch():
    assert stretches(run_of([{"round": 1, "phase": "train", "cohort": [1]}])) == []
    assert stretches(run_of([step(1, None)])) == [] and stretches(run_of([])) == []


def test_a_step_that_asked_nobody_belongs_to_the_stage_before_it():
    """Nobody was there in the second step, and the server did something after the third."""
    run = run_of(
        [step(1, "a"), step(1, None, cohort=[]), step(2, "a"), step(2, None, "merge", cohort=[])]
    )
    assert spans(run) == [("a", 0, 2)]
    assert len(stretches(run)[0].rows) == 4


def test_the_phase_is_named_where_stages_have_several():
    run = run_of([step(1, "a", "shrink"), step(2, "b", "shrink"), step(5, "a", "grow")])
    assert spans(run) == [("shrink a", 0, 1), ("shrink b", 1, 2), ("grow a", 2, 5)]
    # what precedes the stages goes by its phase, and gives them none
    run = run_of([step(0, None, "initial"), step(3, "a")])
    assert spans(run) == [("initial", 0, 0), ("a", 0, 3)]


def test_stages_take_turns():
    one_after_the_other = run_of([step(i + 1, f"s{i // 2}") for i in range(40)])
    assert not take_turns(stretches(one_after_the_other))  # 19 changes of 20 stages
    again = run_of([step(i + 1, f"s{i % 2}") for i in range(6)])
    assert take_turns(stretches(again)) and bordered(again) == []  # 5 changes of 2
    many = run_of([step(i + 1, f"s{i}") for i in range(32)])
    assert take_turns(stretches(many))  # 31 changes
    assert stages_notes(["many"], [many]) == [
        "In many stages take turns, 31 changes in 32 rounds: the plots show no borders."
    ]
    assert stages_notes(["one"], [run_of([step(1, "a"), step(2, "a")])]) == []


@pytest.fixture
def run() -> Run:
    """Two stages of three and two rounds; the second step asked nobody."""

    def row(round: int, stage: str | None, memory: int, able: int | None, **values: Any):
        traffic: dict[str, Any] = {"downlink_bytes": memory * round, "uplink_bytes": memory}
        sums = ("downlink_bytes", "uplink_bytes", "flops_per_client", "wall_seconds")
        traffic["total"] = dict.fromkeys(sums, 0)
        known = {"peak_memory_bytes": memory, "devices": 10, "able_devices": able, **traffic}
        return step(round, stage, **known | values)

    return run_of(
        [
            row(1, "a", 10 * KB, 9, cohort=[1, 2], left_out={"3": "x"}, accuracy=0.25),
            row(1, None, 0, None, cohort=[], downlink_bytes=0, uplink_bytes=0),
            row(2, "a", 20 * KB, 7, cohort=[1, 2], left_out={"3": "x", "4": "y"}),
            row(3, "a", 30 * KB, 8, cohort=[2], accuracy=0.5),
            row(4, "b", 40 * KB, None, cohort=[1, 2]),
            row(5, "b", 40 * KB, None, cohort=[1, 2], accuracy=0.75),
        ]
    )


def test_memory_counts_every_step_with_clients_at_work_once(run: Run):
    assert memories(run.rounds) == [10 * KB, 20 * KB, 30 * KB, 40 * KB, 40 * KB]
    assert mean_memory(run.rounds) == 28 * KB and median_memory(run.rounds) == 30 * KB
    assert mean_memory([]) is None and median_memory([{"peak_memory_bytes": 0}]) is None
    shown = dict(summary_rows([run]))
    assert shown["peak memory, modelled"] == ["40.0 kB"]
    assert shown["mean memory over rounds"] == ["28.0 kB"]
    assert shown["memory of the median round"] == ["30.0 kB"]


def test_participation(run: Run):
    assert able_shares(run.rounds) == [0.9, 0.7, 0.8]
    assert participation(run.rounds) == "80.0% (least 70.0%)"
    assert participation(run.rounds[:1]) == "90.0%" and participation([{}]) == "–"


def test_the_table(run: Run):
    """Down: 10, 40, 90 kB in stage a, and 160, 200 in b; the step that asked nobody is no round."""
    assert stage_rows(run) == [
        ["a", "3", "30.0 kB", "20.0 kB", "20.0 kB", "40.0 kB", "20.0 kB",
         "8 of 10, least 7", "5", "3", "50.0%"],
        ["b", "2", "40.0 kB", "40.0 kB", "40.0 kB", "180 kB", "40.0 kB",
         "–", "4", "0", "75.0%"],
        ["whole run", "5", "40.0 kB", "30.0 kB", "28.0 kB", "90.0 kB", "30.0 kB",
         "8 of 10, least 7", "9", "3", "75.0%"],
    ]  # fmt: skip


def test_rows_of_stages_that_return_are_one():
    rows = stage_rows(run_of([step(1, "b"), step(2, "a"), step(3, "b")]))
    assert [row[:2] for row in rows] == [["b", "2"], ["a", "1"], ["whole run", "3"]]


def test_of_many_stages_the_first_are_shown():
    page = stages_section(run_of([step(i + 1, f"s{i}") for i in range(100)]))
    assert "The first 60 of 100 stages." in page and page.count("<tr>") == 62
    assert ">s59</th>" in page and ">s60</th>" not in page and ">whole run</th>" in page
    assert stages_section(run_of([step(1, None)])) == ""


def test_borders_lie_where_a_stage_ended():
    shown = borders([run_of([step(0, "a"), step(10, "a"), step(40, "b"), step(100, "c")])])
    assert shown.at == (10, 40) and not shown.upright
    assert shown.names == ((5.0, "a"), (25.0, "b"), (70.0, "c"))


def test_names_without_room_stand_upright_and_give_way_to_longer_stretches():
    """1 round of 200 is 1.35 points wide: the name of "two" would lie on that of "one"."""
    rows = [step(100, "one"), step(101, "two"), step(102, "three"), step(200, "four")]
    shown = borders([run_of(rows)])
    assert shown.upright and shown.at == (100, 101, 102)
    assert [name for _, name in shown.names] == ["one", "two", "four"]
    long = borders([run_of([step(1, 90 * "x"), step(2, "y")])])
    assert len(long.names[0][1]) == 16 and long.inches < 1.2


def test_runs_compared_have_ticks_of_their_own():
    staged = run_of([step(10, "a"), step(40, "b")])
    shown = borders([run_of([step(40, None)]), staged])
    assert shown.ticks == ((1, (10,)),) and shown.at == () and shown.names == ()
    assert len(borders([staged] * 9).ticks) == 6
