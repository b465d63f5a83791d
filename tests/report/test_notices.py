"""What a page says before its figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedlean.report.notices import notices, notices_section
from fedlean.report.run_folder import Run


def run_of(rows: list[dict[str, Any]], **config: Any) -> Run:
    return Run("a", Path("a"), config, rows, None)


def test_an_old_or_quiet_run_has_none():
    assert notices(run_of([{"round": 1}])) == []
    assert notices_section(run_of([{"round": 1, "rejected": [], "notes": []}])) == ""


def test_notes_changes_and_refusals_in_order():
    rows = [
        {"round": 1, "notes": ["node 7 cannot take part"], "rejected": []},
        {"round": 2, "notes": [], "rejected": [3, 4], "refused": {"3": "is <b>", "4": "b"}},
        {"round": 3, "rejected": [3], "refused": {"3": "c", "9": "no reply"}},
    ]
    data = {"changes": [{"after_round": 1, "changed": ["the labels", "the images"]}]}
    run = run_of(rows, notes=["10 ids are merged"], data=data)
    assert notices(run) == [
        "10 ids are merged",
        "After round 1 the run went on with other data: the labels; the images",
        "Round 1: node 7 cannot take part",
        "3 updates of 2 clients refused; the first, of client 3: round 2: is <b>",
    ]
    page = notices_section(run)
    assert "<td>3</td><td>2</td><td>round 2: is &lt;b&gt;</td>" in page
    assert page.index("<td>3</td>") < page.index("<td>4</td>")


def test_of_many_clients_the_worst_are_shown():
    rows = [{"round": 1, "rejected": list(range(50)), "refused": {}}]
    page = notices_section(run_of(rows))
    assert page.count("<td>round 1: no reason given") == 20 and "the first 20 of 50" in page


def test_tasks_that_were_not_sent_and_steps_that_asked_nobody():
    nobody = "nobody was asked: no device is there"
    rows = [
        {"round": 1, "cohort": [1], "server_only": False, "left_out": {"3": "needs <2", "4": "b"}},
        {"round": 1, "asked_round": 2, "cohort": [], "server_only": False, "notes": [nobody, "x"]},
        {"round": 2, "cohort": [], "server_only": True, "notes": ["pruned"]},
        {"round": 2, "asked_round": 3, "cohort": [], "server_only": False, "notes": [nobody]},
        {"round": 3, "cohort": [1], "server_only": False, "left_out": {"3": "c"}},
    ]
    assert notices(run_of(rows)) == [
        "Round 2: x",
        "Round 2: pruned",
        f"2 steps asked nobody; the first, of round 2: {nobody}",
        "3 tasks of 2 clients not sent, beyond their devices; the first, of client 3: round 1: "
        "needs <2",
    ]
    page = notices_section(run_of(rows))
    assert "Tasks not sent, by client" in page and "Refused updates" not in page
    assert "<td>3</td><td>2</td><td>round 1: needs &lt;2</td>" in page
