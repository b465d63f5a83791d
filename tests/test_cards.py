"""The tables of a card are those of its `expected.json`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedlean.report.card import (
    card_table,
    clock_table,
    seeds_table,
    targets_table,
    times_table,
)
from fedlean.report.card_files import IN_TURNS, all_tables, brief_table, of_all_seeds

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
CARDS = sorted(path.parent for path in EXPERIMENTS.glob("*/expected.json"))
FEWEST_CELLS = 6  # of the smallest of these tables
MOST_CELLS = 11  # of what a card has room for; `tables.md` has what is wider


def rows_of(group: str, seeds: dict) -> set[str]:
    if group.startswith(IN_TURNS):
        return set(clock_table(seeds).splitlines())
    common = of_all_seeds(seeds)
    rows = {*seeds_table(common).splitlines(), *times_table(common).splitlines()}
    rows |= {*brief_table(seeds).splitlines()}
    for seed, runs in seeds.items():
        rows |= {*card_table(runs).splitlines(), *targets_table(runs).splitlines()}
        rows |= {*brief_table({seed: runs}).splitlines()}
    return rows


def named_rows(page: str, names: set[str]) -> list[str]:
    """The rows of a page that are of a run."""
    return [
        line
        for line in page.splitlines()
        if line.startswith("| ")
        and line.split("|")[1].strip() in names
        and not line.endswith("| all |")  # the head of a table of one run's layers
    ]


@pytest.mark.parametrize("card", CARDS, ids=lambda path: path.name)
def test_every_figure_of_a_run_is_the_recorded_one(card):
    groups = json.loads((card / "expected.json").read_text())
    rows = set().union(*(rows_of(group, seeds) for group, seeds in groups.items()))
    names = {name for seeds in groups.values() for runs in seeds.values() for name in runs}
    shown = named_rows((card / "README.md").read_text(), names)
    figures = [line for line in shown if line.count("|") > FEWEST_CELLS]
    assert len({line.split("|")[1] for line in figures}) >= 2
    assert [line for line in figures if line not in rows] == []
    assert max(line.count("|") - 1 for line in figures) <= MOST_CELLS


@pytest.mark.parametrize("card", CARDS, ids=lambda path: path.name)
def test_all_tables_are_beside_it(card):
    groups = json.loads((card / "expected.json").read_text())
    assert (card / "tables.md").read_text() == all_tables(card.name, groups)


@pytest.mark.parametrize("card", CARDS, ids=lambda path: path.name)
def test_a_card_opens_with_what_came_out_and_a_plot(card):
    """Three sentences, perhaps one more, then a plot that exists."""
    _, opening, plot, *_ = (card / "README.md").read_text().split("\n\n")
    assert 2 <= opening.count(". ") + opening.count(".\n") + 1 <= 5
    assert plot.startswith("![")
    assert (card / plot.split("](")[1].split(")")[0]).is_file()
