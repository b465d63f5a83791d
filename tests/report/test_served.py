"""Whom it serves, on the page: from a summary that may hold anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlean.report.run_folder import Run
from fedlean.report.served import served_section


def section(**summary: Any) -> str:
    return served_section(Run("a", Path("a"), {}, [], summary))


CLIENTS = {"count": 2, "worst": 0.5, "worst_client": 7, "percentile_10": 0.55, "median": 0.75}


def test_clients_classes_and_gains():
    page = section(
        served={
            "classes": ["cat", "<b>"],
            "recall": [0.75, None],
            "confusion": [[3, 1], [0, 0]],
            "clients": CLIENTS,
        },
        personal={"steps": 5, "clients": CLIENTS, "gain": {**CLIENTS, "worst": -0.015}},
    )
    assert "Client 7 is served worst." in page
    assert "<td>the common model</td><td>50.0%</td><td>55.0%</td><td>75.0%</td>" in page
    assert "<td>after 5 steps of its own</td>" in page and "<td>-1.5</td>" in page
    assert "&lt;b&gt;" in page and "<b>" not in page
    assert '<td>75.0%</td><td style="--share:0.750">3</td>' in page


def test_of_many_classes_the_worst_are_listed():
    names = [f"c{at}" for at in range(60)]
    page = section(served={"classes": names, "recall": [1 - at / 100 for at in range(60)]})
    assert page.count("<tr><td>") == 10 and page.index("c59") < page.index("c58")


@pytest.mark.parametrize(
    "served",
    [
        None,
        [],
        {"classes": ["a"], "recall": "no", "clients": 3},
        {"classes": ["a"], "recall": []},
        {"classes": 4, "recall": 4, "confusion": 4},
    ],
)
def test_nothing_where_there_is_nothing(served):
    assert section(served=served) == ""


@pytest.mark.parametrize("matrix", [[[-1]], [[True]], [["<b>"]], [[1, 2]], [1], [[1e400]]])
def test_a_matrix_that_is_none_is_left_out(matrix):
    page = section(served={"classes": ["a"], "recall": [0.5], "confusion": matrix})
    assert "confusion" not in page and "<td>50.0%</td>" in page
